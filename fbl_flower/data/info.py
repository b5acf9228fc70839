"""The data sets that have a name, and what is known of each without looking at an image."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fbl_flower.data.readers.tiny_imagenet_names import TINY_IMAGENET


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """What is known of a data set without looking at an image.

    Attributes:
        name: Its name in the configuration.
        class_names: In the order of the labels.
        channels: 1 (grey) or 3 (RGB).
        image_size: Native height and width in pixels.
        shift: Largest shift of the augmentation, in pixels of the native size.
        flip: Whether a mirrored image is still of its class.
        num_test, num_public, num_validation, num_private: Default sizes; validation is a part of public.
    """

    name: str
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    shift: int
    flip: bool
    num_test: int
    num_public: int
    num_validation: int
    num_private: int

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest
    fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse
    mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon
    ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table
    tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_EUROSAT = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop", "Residential", "River",
    "SeaLake",
)  # fmt: skip
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

DATASETS = {
    info.name: info
    for info in (
        DataInfo(
            name="mnist5k", class_names=_DIGITS, channels=1, image_size=28, shift=2, flip=False,
            num_test=1000, num_public=500, num_validation=200, num_private=2000,
        ),
        DataInfo(
            name="digits", class_names=_DIGITS, channels=1, image_size=8, shift=1, flip=False,
            num_test=397, num_public=400, num_validation=100, num_private=1000,
        ),
        DataInfo(
            name="cifar10", class_names=_CIFAR10, channels=3, image_size=32, shift=4, flip=True,
            num_test=10_000, num_public=5_000, num_validation=500, num_private=45_000,
        ),
        DataInfo(
            name="cifar100", class_names=tuple(_CIFAR100.split()), channels=3, image_size=32, shift=4, flip=True,
            num_test=10_000, num_public=10_000, num_validation=1_000, num_private=40_000,
        ),
        DataInfo(
            name="tiny-imagenet", class_names=tuple(TINY_IMAGENET.values()), channels=3, image_size=64, shift=8, flip=True,
            num_test=10_000, num_public=10_000, num_validation=2_500, num_private=90_000,
        ),
        DataInfo(
            name="eurosat", class_names=_EUROSAT, channels=3, image_size=64, shift=8, flip=True,
            num_test=2_700, num_public=2_700, num_validation=675, num_private=21_600,
        ),
        DataInfo(
            name="fashion-mnist", class_names=_FASHION, channels=1, image_size=28, shift=2, flip=True,
            num_test=10_000, num_public=2_000, num_validation=400, num_private=20_000,
        ),
    )
}  # fmt: skip


def sized_by_share(info: DataInfo, *, num_train: int, num_test: int, test_share: float) -> DataInfo:
    """Give a data set default sizes that follow from how many images there are.

    A tenth is public, a quarter of which is validation; the test part is the data set's own, or `test_share`; the rest is private.

    Args:
        info: Its sizes are replaced.
        num_train: Images that parts are cut from, in all splits but the test split.
        num_test: Of the data set's own test split; 0: none.
        test_share: Of `num_train`, 0 .. 1, where there is no test split.
    """
    test = num_test or round(test_share * num_train)
    public = round(0.1 * num_train)
    return replace(info, num_test=test, num_public=public, num_validation=round(0.25 * public), num_private=num_train)
