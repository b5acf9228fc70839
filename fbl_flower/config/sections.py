"""Settings of the data, the model, training, balancing, generators and aggregation."""

from __future__ import annotations

from dataclasses import dataclass

from fbl_flower.config.class_names import read_class_names
from fbl_flower.config.options import option

PACKAGED = ("mnist5k", "digits")  # data sets that come with a package
OWN = ("folder", "parquet")  # the user's own images
NAMED = ("cifar10", "cifar100", "tiny-imagenet", "eurosat", "fashion-mnist")
OWN_IMAGES = "own-images"  # the generator that is none: repeats of a client's own images
AUTO, FEDERATED = "auto", "federated"  # generators: one is found for the data set; the clients train one together
DATA_NAMES = (*PACKAGED, *NAMED, *OWN)
RULES = ("mean", "clipped", "trimmed-mean", "median", "krum", "geometric-median")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and who owns them."""

    name: str = option("mnist5k", "data set", choices=DATA_NAMES)
    path: str = option(
        "", "file or folder of the data set, or hf://datasets/OWNER/NAME; empty: as installed, or downloaded (see docs/data.md)"
    )
    classes: str = option(
        "",
        "names in the order of the labels, for folder and parquet: between commas, as a JSON list, or @FILE with a name per line",
        longest=1_000_000,
    )
    image_size: int = option(0, "height and width in pixels; 0: as the data set has it", low=0, high=1024)
    channels: int = option(0, "1: grey, 3: colour; 0: as the data set has it, and 3 for folder", low=0, high=3)
    background: str = option("white", "ground that transparent images are laid over: white | black | #rrggbb")
    num_test: int = option(-1, "test images, for the server; -1: the data set's own number", low=-1, high=1_000_000_000)
    num_public: int = option(-1, "public images, owned by no client; -1: the data set's own number", low=-1, high=1_000_000_000)
    num_validation: int = option(
        -1, "of the public images, those kept for tuning; -1: the data set's own number", low=-1, high=1_000_000_000
    )
    num_private: int = option(
        -1, "images of all clients together; -1: the data set's own number, or all that are left", low=-1, high=1_000_000_000
    )
    partition: str = option(
        "dirichlet",
        "what differs between clients: the mixture of classes, nothing, which classes they have, or their size",
        choices=("dirichlet", "iid", "classes", "quantity"),
    )
    alpha: float = option(
        0.1, "concentration of the partitions dirichlet and quantity: smaller is more skewed", above=0.0, high=1e6
    )
    classes_per_client: int = option(2, "classes of each client, in the partition classes", low=1, high=100_000)
    noise: float = option(
        0.0, "standard deviation of Gaussian noise on private images, whose pixels are 0 .. 1", low=0.0, high=100.0
    )
    wrong_labels: float = option(0.0, "share of private images that get the label of another class", low=0.0, high=1.0)
    evaluate_on: str = option(
        "test", "images that the accuracy is measured on; settings are tuned on validation", choices=("test", "validation")
    )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names in `classes`, in Unicode's form NFC; none where it is empty."""
        return read_class_names(self.classes)

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """Red, green and blue of `background`, 0 .. 255."""
        code = {"white": "#ffffff", "black": "#000000"}.get(self.background, self.background)
        return int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The classifier: features F, then a linear head H."""

    name: str = option("resnet18", "network; tiny is a small convolutional one for tests", choices=("resnet18", "tiny"))
    stem: str = option(
        "auto",
        "first layers of ResNet-18: 7x7/2 and max-pool (imagenet), or 3x3/1 (32x32); auto: 32x32 up to 64 pixels",
        choices=("auto", "imagenet", "32x32"),
    )
    norm: str = option("batch", "normalisation of ResNet-18", choices=("group", "batch"))
    width: int = option(
        0,
        "channels of ResNet-18's first stage, a multiple of 8; 64 is ResNet-18; 0: 64 where the server has a GPU, else 16",
        low=0,
        high=256,
    )
    projection_width: int = option(
        0,
        "outputs of two more layers before the last one, for every method, as MOON's paper has 256; 0: none",
        low=0,
        high=8192,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Local training on a client: stochastic gradient descent."""

    epochs: int = option(2, "passes over the client's balanced data in a round", low=1, high=10_000)
    batch_size: int = option(32, "images per step", low=1, high=65_536)
    learning_rate: float = option(0.1, "step size of the model: the largest of the schedule", above=0.0, high=1e6)
    schedule: str = option(
        "one-cycle",
        "learning rate over the rounds: constant, a cosine to zero, or a rise in the first 30 % and then the cosine",
        choices=("constant", "cosine", "one-cycle"),
    )
    momentum: float = option(0.9, "momentum, from zero again in each round", low=0.0, high=0.999)
    nesterov: bool = option(True, "Nesterov's form of the momentum, where there is any")
    weight_decay: float = option(5e-4, "L2 penalty of the model's weights", low=0.0, high=1e6)
    clip_norm: float = option(5.0, "largest gradient norm of the model; 0: no clipping", low=0.0, high=1e6)
    augment: bool = option(True, "random shifts (and flips, for photographs), drawn anew for each batch")
    precision: str = option(
        "auto", "auto: bf16 where the machine has it in hardware, else fp32", choices=("auto", "fp32", "bf16")
    )


@dataclass(frozen=True, kw_only=True)
class BalancingConfig:
    """FBL. `enabled = false` is plain FedAvg; each part can be switched on its own."""

    enabled: bool = option(True, "balance each client's data before it trains")
    filling: bool = option(True, "knowledge filling: generate scarce and missing classes up to the balance point")
    max_filled_share: float = option(
        1.0,
        "largest share of a client's balanced set that may be synthetic; the rest is kept in real images",
        low=0.0,
        high=1.0,
    )
    filter: str = option(
        "none", "what leaves out implausible synthetic images, from round 2 on", choices=("none", "model", "neighbours")
    )
    filter_share: float = option(
        0.2,
        "share of a class's synthetic images that falls (model), or of real ones that would (neighbours)",
        low=0.0,
        high=1.0,
    )
    sampling: str = option(
        "loss", "knowledge sampling: which images of an excessive class stay", choices=("loss", "random", "none")
    )
    replay_period: int = option(
        5, "server rounds after which a client chooses its images anew; 0: never", low=0, high=1_000_000
    )
    replay: str = option(
        "rank",
        "what a replay does: rank: choose all kept images again by loss; swap: exchange only the share replay-ratio of them",
        choices=("rank", "swap"),
    )
    replay_ratio: float = option(0.1, "gamma, the share of replayed images among the kept of a class", low=0.0, high=1.0)
    alignment: bool = option(True, "knowledge alignment: learn a vector per class that moves synthetic onto real features")
    drop: float = option(0.5, "knowledge drop: probability that a synthetic image loses its vector", low=0.0, high=1.0)
    embedding_learning_rate: float = option(0.05, "step size of the alignment vectors", low=0.0, high=1e6)
    synthetic_weight: float = option(
        1.0, "weight of a synthetic image in the training loss, beside 1 for a real one", low=0.0, high=1.0
    )
    average_embeddings: bool = option(
        False, "let the server average the alignment vectors; which of them moved tells it what a client lacks"
    )


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Where a client's synthetic images come from."""

    name: str = option(
        AUTO,
        "auto: that of generator.path, else one that comes with the data set, else federated. diffusion: class-conditional, in 4 bits; "
        "federated: such a one, trained by the clients together before round 1; text-to-image: a quantised Stable Diffusion; or real public "
        "images in their place, or repeats of a client's own",
        choices=(AUTO, "diffusion", FEDERATED, "text-to-image", "public-images", OWN_IMAGES),
    )
    path: str = option(
        "", "directory of a generator; empty: the one that comes with the data set; text-to-image always needs a directory"
    )
    trained_on: str = option("", "data set that the generator was trained on; empty: the federation's own")
    steps: int = option(0, "denoising steps per image; 0: the generator's own", low=0, high=1000)
    guidance: float = option(
        0.0, "classifier-free guidance; 0: the generator's own, 1: none; nothing between the two", low=0.0, high=20.0
    )
    batch_size: int = option(32, "images generated together; fewer where memory is short", low=1, high=65_536)
    memory_limit: int = option(
        0, "MiB for the images that are made together; 0: half of the free memory", low=0, high=100_000_000
    )
    time_budget: float = option(
        0.0,
        "seconds that a client may generate at the start of a run; what is missing then is kept in real images; 0: no limit",
        low=0.0,
        high=1e8,
    )
    resolution: int = option(
        0, "text-to-image: height and width that the model makes, a multiple of 8; 0: what it was trained for", low=0, high=2048
    )
    scheduler: str = option(
        "auto",
        "text-to-image: how noise becomes an image; auto: the model's own way",
        choices=("auto", "dpm++", "unipc", "lcm", "euler", "euler-ancestral", "ddim"),
    )
    prompt: str = option(
        "", "text-to-image: prompt with {name} for the class, several separated by ' | '; empty: the data set's own"
    )
    class_words: str = option(
        "",
        "text-to-image: what single classes are called in prompts, 'crane: white crane, bird | nail: iron nail'; empty: as they are",
        longest=1_000_000,
    )
    image_to_image: bool = option(
        False, "text-to-image: start scarce classes from the client's own images; the results stay on the client"
    )
    strength: float = option(
        0.3, "text-to-image: how far such a start is turned to noise; small stays close to it", low=0.01, high=1.0
    )
    blur: float = option(
        0.0,
        "public-images: standard deviation, in pixels, of a Gaussian blur, for images of a worse domain",
        low=0.0,
        high=16.0,
    )
    noise: float = option(
        0.0, "public-images: standard deviation of Gaussian noise, after the blur; pixels are 0 .. 1", low=0.0, high=1.0
    )


@dataclass(frozen=True, kw_only=True)
class FederatedGeneratorConfig:
    """How the clients train a generator together, on their own images, before they are balanced."""

    rounds: int = option(30, "rounds of training", low=1, high=1_000_000)
    fraction_train: float = option(0.5, "share of the clients that train in a round", above=0.0, high=1.0)
    epochs: int = option(4, "passes over a client's images in a round", low=1, high=10_000)
    batch_size: int = option(32, "images per step", low=1, high=65_536)
    learning_rate: float = option(
        1e-3, "step size of AdamW in the first round; a cosine over the rounds lowers it", above=0.0, high=1e6
    )
    average: float = option(
        0.8, "largest decay of the average over rounds, which becomes the generator; 0: the last round's", low=0.0, high=0.9999
    )
    optimizer_state: str = option(
        "reset", "AdamW's moments: zero again in each round, or kept by each client", choices=("reset", "kept")
    )
    proximal: float = option(
        0.0, "weight mu of FedProx's term, half the squared distance to the global weights", low=0.0, high=1e6
    )


@dataclass(frozen=True, kw_only=True)
class AggregationConfig:
    """How the clients' models become one: FedAvg's mean, or a rule that a few hostile clients cannot move far (docs/methods.md)."""

    weight_by: str = option(
        "balanced",
        "size of the balanced set, number of real images, or all clients alike",
        choices=("balanced", "real", "equal"),
    )
    largest_share: float = option(
        1.0,
        "largest share of a round's weight that one client may have, whatever size it states; the others get what is cut off; 1: any",
        above=0.0,
        high=1.0,
    )
    rule: str = option("mean", "what is made of the clients' models", choices=RULES)
    clip_norm: float = option(
        0.0, "clipped: largest L2 norm of an update; 0: the median of the round's norms", low=0.0, high=1e6
    )
    trim: float = option(0.2, "trimmed-mean: share of the clients that is left out at each end", low=0.0, high=0.49)
    attackers: int = option(1, "krum: hostile clients in a round, at most", low=1, high=100_000)


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Ours, for every method: the server first trains the initial model, on images that are nobody's."""

    enabled: bool = option(False, "start from a model that the server has trained")
    images: str = option(
        "synthetic",
        "what it is trained on: images of the server's generator, or all public ones",
        choices=("synthetic", "public"),
    )
    num_images: int = option(
        0, "synthetic images; 0: as many as the clients have real ones together", low=0, high=1_000_000_000
    )
    epochs: int = option(20, "passes over them", low=1, high=10_000)
    learning_rate: float = option(0.0, "step size of that training; 0: train.learning-rate", low=0.0, high=1e6)

    @property
    def generates(self) -> bool:
        """Whether the server needs a generator."""
        return self.enabled and self.images == "synthetic"
