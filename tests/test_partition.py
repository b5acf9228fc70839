"""Who owns which image."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbl_flower.config import DataConfig, RunConfig
from fbl_flower.data.partition import dirichlet_partition, partition
from fbl_flower.errors import ConfigError
from fbl_flower.seeding import numpy_stream


def config_of(*, num_clients: int, kind: str = "dirichlet", alpha: float = 0.1, seed: int = 0) -> RunConfig:
    return RunConfig(seed=seed, num_clients=num_clients, data=DataConfig(partition=kind, alpha=alpha))


LABELS = st.lists(st.integers(0, 9), min_size=1, max_size=80).map(lambda values: np.array(values, dtype=np.int64))
KINDS = st.sampled_from(["dirichlet", "iid"])


@given(LABELS, KINDS, st.floats(1e-6, 1e6), st.integers(0, 1000), st.data())
def test_every_image_belongs_to_exactly_one_client(
    labels: np.ndarray, kind: str, alpha: float, seed: int, data: st.DataObject
) -> None:
    num_clients = data.draw(st.integers(1, len(labels)))
    parts = partition(labels, config_of(num_clients=num_clients, kind=kind, alpha=alpha, seed=seed))
    assert len(parts) == num_clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert all(part.dtype == np.int64 for part in parts)


@given(LABELS, KINDS, st.integers(0, 1000))
def test_the_partition_follows_from_labels_and_seed_alone(labels: np.ndarray, kind: str, seed: int) -> None:
    config = config_of(num_clients=min(4, len(labels)), kind=kind, seed=seed)
    other = replace(
        config, num_threads=7, train=replace(config.train, epochs=9), balancing=replace(config.balancing, enabled=False)
    )
    np.random.seed(seed)
    first = partition(labels.copy(), config)
    np.random.seed(seed + 1)
    again = partition(labels.copy(), other)
    assert [part.tolist() for part in first] == [part.tolist() for part in again]


def test_another_seed_is_another_partition() -> None:
    labels = np.arange(200) % 10
    for kind in ("dirichlet", "iid"):
        one, two = (partition(labels, config_of(num_clients=5, kind=kind, seed=seed)) for seed in (0, 1))
        assert [part.tolist() for part in one] != [part.tolist() for part in two]


@given(st.integers(1, 60), st.data())
def test_iid_parts_are_of_equal_size(num_images: int, data: st.DataObject) -> None:
    num_clients = data.draw(st.integers(1, num_images))
    sizes = [len(part) for part in partition(np.zeros(num_images, int), config_of(num_clients=num_clients, kind="iid"))]
    small, extra = divmod(num_images, num_clients)
    assert sizes == [small + 1] * extra + [small] * (num_clients - extra)


def dominance(labels: np.ndarray, parts: list[np.ndarray]) -> float:
    """Mean share of a client's most frequent class, weighted by the client's size."""
    return sum(np.bincount(labels[part]).max() for part in parts if len(part)) / len(labels)


def test_a_smaller_alpha_is_more_skewed() -> None:
    """A large alpha gives each client every class alike (share 1/10); a tiny one gives each class to one client."""
    labels = np.repeat(np.arange(10), 200)
    shares = {
        alpha: float(
            np.mean(
                [dominance(labels, partition(labels, config_of(num_clients=10, alpha=alpha, seed=seed))) for seed in range(10)]
            )
        )
        for alpha in (1e6, 10.0, 1.0, 0.1)
    }
    assert shares[1e6] == pytest.approx(0.1, abs=0.002)
    assert shares[1e6] < shares[10.0] < shares[1.0] < shares[0.1]
    assert shares[0.1] > 0.5
    parts = dirichlet_partition(labels, num_clients=10, alpha=1e-6, rng=numpy_stream(0, "test"))
    for label in range(10):
        assert max(int((labels[part] == label).sum()) for part in parts) == 200


def test_classes_are_cut_by_the_drawn_proportions() -> None:
    """The same draws, one class after the other: a client's number of a class is its share of the class, to within one image."""
    labels = np.repeat([0, 1, 2], [300, 50, 7])
    parts = dirichlet_partition(labels, num_clients=4, alpha=0.5, rng=numpy_stream(3, "test"))
    rng = numpy_stream(3, "test")
    for label, size in enumerate([300, 50, 7]):
        rng.permutation(size)
        shares = rng.dirichlet([0.5] * 4)
        assert [int((labels[part] == label).sum()) for part in parts] == pytest.approx(shares * size, abs=1.0)


def test_clients_may_be_empty_or_hold_one_image() -> None:
    labels = np.arange(100) % 10
    sizes = [len(part) for seed in range(10) for part in partition(labels, config_of(num_clients=20, alpha=0.05, seed=seed))]
    assert 0 in sizes and 1 in sizes


def test_more_clients_than_images_is_an_error_that_names_the_key() -> None:
    for kind in ("dirichlet", "iid"):
        with pytest.raises(ConfigError, match="num-clients: got 4; the private part has only 3 images"):
            partition(np.zeros(3, int), config_of(num_clients=4, kind=kind))
        assert len(partition(np.zeros(3, int), config_of(num_clients=3, kind=kind))) == 3


def test_assignments_are_those_of_the_published_results() -> None:
    """Recorded once; another assignment is another experiment."""
    labels = np.arange(24) % 4
    assert [p.tolist() for p in partition(labels, config_of(num_clients=4, alpha=0.5, seed=3))] == [
        [2, 6, 10, 14, 16, 22], [0, 8], [1, 5, 9, 13, 15, 17, 21], [3, 4, 7, 11, 12, 18, 19, 20, 23],
    ]  # fmt: skip
    assert [p.tolist() for p in partition(labels, config_of(num_clients=4, kind="iid", seed=3))] == [
        [7, 9, 13, 14, 19, 21], [3, 11, 12, 16, 17, 18], [0, 2, 8, 10, 20, 23], [1, 4, 5, 6, 15, 22],
    ]  # fmt: skip
