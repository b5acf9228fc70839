"""Noise and wrong labels on private images, and nowhere else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fbl_flower.config import RunConfig, parse_config
from fbl_flower.data.corruption import believed_labels, private_examples, wrong_label_mask
from fbl_flower.data.datasets import DataParts, load_parts
from fbl_flower.data.partition import partition
from fbl_flower.errors import ConfigError
from fbl_flower.training.prepare import client_examples


def config_of(**settings: float) -> RunConfig:
    keys = {"data." + key.replace("_", "-"): value for key, value in settings.items() if key != "seed"}
    return parse_config({"data.name": "digits", "num-clients": 5, "seed": int(settings.get("seed", 0)), **keys})


@pytest.fixture(scope="module")
def parts() -> DataParts:
    return load_parts(config_of().data)


def everyone(config: RunConfig, parts: DataParts) -> torch.Tensor:
    return private_examples(config, parts, torch.arange(len(parts.private))).images


def test_at_zero_nothing_changes(parts: DataParts) -> None:
    config = config_of()
    owned = partition(parts.private.labels.numpy(), config)
    for client in range(5):
        mine = client_examples(config, parts, client)
        assert torch.equal(mine.images, parts.private.images[owned[client]])
        assert torch.equal(mine.labels, parts.private.labels[owned[client]])
    assert not wrong_label_mask(config, 1000).any()


@pytest.mark.parametrize("share", [0.001, 0.25, 1.0])
def test_as_many_labels_are_wrong_as_asked_for(parts: DataParts, share: float) -> None:
    config = config_of(wrong_labels=share)
    mask, labels = wrong_label_mask(config, 1000), believed_labels(config, parts)
    assert mask.sum() == round(1000 * share)
    assert torch.equal(labels != parts.private.labels, torch.from_numpy(mask))
    assert labels.min() >= 0 and labels.max() <= 9


def test_a_wrong_label_is_any_other_class_alike(parts: DataParts) -> None:
    """1,000 labels moved by 1 .. 9 places: 111 of each move, give or take four standard deviations (4 sqrt(1000/9 * 8/9) = 40)."""
    moved = (believed_labels(config_of(wrong_labels=1.0), parts) - parts.private.labels) % 10
    counts = torch.bincount(moved, minlength=10).tolist()
    assert counts[0] == 0 and all(71 <= count <= 151 for count in counts[1:])


def test_clients_believe_their_wrong_labels(parts: DataParts) -> None:
    """The partition is that of the wrong labels, and clients together hold every image once, under its wrong label."""
    config = config_of(wrong_labels=0.5)
    labels = believed_labels(config, parts)
    owned = partition(labels.numpy(), config)
    assert [o.tolist() for o in owned] != [o.tolist() for o in partition(parts.private.labels.numpy(), config)]
    for client in range(5):
        mine = client_examples(config, parts, client)
        assert torch.equal(mine.labels, labels[owned[client]])
        assert torch.equal(mine.images, parts.private.images[owned[client]])


def test_noise_has_the_standard_deviation_asked_for(parts: DataParts) -> None:
    """On grey 128, 0.1 of the range is 25.5 grey values; three standard deviations stay inside 0 .. 255."""
    grey = replace(parts, private=replace(parts.private, images=torch.full_like(parts.private.images, 128)))
    noisy = everyone(config_of(noise=0.1), grey).float()
    assert noisy.std().item() == pytest.approx(25.5, rel=0.02) and noisy.mean().item() == pytest.approx(128, abs=0.5)
    assert noisy[0].ne(noisy[1]).any()
    strong = everyone(config_of(noise=10.0), grey)
    assert ((strong == 0) | (strong == 255)).float().mean() > 0.9


def test_noise_belongs_to_the_image_whoever_owns_it(parts: DataParts) -> None:
    config = config_of(noise=0.2)
    whole = everyone(config, parts)
    few = torch.tensor([700, 3, 41])
    assert torch.equal(private_examples(config, parts, few).images, whole[few])
    assert private_examples(config, parts, few[:0]).images.shape == (0, 1, 8, 8)


def test_all_follows_from_the_runs_seed(parts: DataParts) -> None:
    one, again, other = (config_of(noise=0.2, wrong_labels=0.3, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(5)
    np.random.seed(5)
    images, labels = everyone(one, parts), believed_labels(one, parts)
    torch.manual_seed(6)
    np.random.seed(6)
    assert torch.equal(images, everyone(again, parts)) and torch.equal(labels, believed_labels(again, parts))
    assert not torch.equal(images, everyone(other, parts)) and not torch.equal(labels, believed_labels(other, parts))


def test_test_and_public_parts_stay_as_they_are(parts: DataParts) -> None:
    bad = load_parts(config_of(noise=0.5, wrong_labels=0.5).data)
    assert bad.public_sha256 == parts.public_sha256
    assert torch.equal(bad.test.images, parts.test.images) and torch.equal(bad.test.labels, parts.test.labels)
    assert torch.equal(bad.validation.images, parts.validation.images)


def test_one_class_has_no_wrong_label(parts: DataParts) -> None:
    info = replace(parts.info, class_names=("zero",))
    only = replace(parts, info=info, private=replace(parts.private, labels=torch.zeros(1000, dtype=torch.int64)))
    with pytest.raises(ConfigError, match="data.wrong-labels: the data set has one class"):
        believed_labels(config_of(wrong_labels=0.5), only)
