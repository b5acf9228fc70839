"""Who owns which image."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbl_flower.config import DataConfig, RunConfig
from fbl_flower.data.partition import dirichlet_partition, partition, quantity_partition
from fbl_flower.errors import ConfigError
from fbl_flower.seeding import numpy_stream


def config_of(
    *, num_clients: int, kind: str = "dirichlet", alpha: float = 0.1, seed: int = 0, per_client: int = 2
) -> RunConfig:
    data = DataConfig(partition=kind, alpha=alpha, classes_per_client=per_client)
    return RunConfig(seed=seed, num_clients=num_clients, data=data)


LABELS = st.lists(st.integers(0, 9), min_size=1, max_size=80).map(lambda values: np.array(values, dtype=np.int64))
KINDS = st.sampled_from(["dirichlet", "iid", "quantity"])


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
    for kind in ("dirichlet", "iid", "classes", "quantity"):
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
    for kind in ("dirichlet", "iid", "classes", "quantity"):
        with pytest.raises(ConfigError, match="num-clients: got 4; the private part has only 3 images"):
            partition(np.zeros(3, int), config_of(num_clients=4, kind=kind))
        assert len(partition(np.zeros(3, int), config_of(num_clients=3, kind=kind, per_client=1))) == 3


def test_assignments_are_those_of_the_published_results() -> None:
    """Recorded once; another assignment is another experiment."""
    labels = np.arange(24) % 4
    assert [p.tolist() for p in partition(labels, config_of(num_clients=4, alpha=0.5, seed=3))] == [
        [2, 6, 10, 14, 16, 22], [0, 8], [1, 5, 9, 13, 15, 17, 21], [3, 4, 7, 11, 12, 18, 19, 20, 23],
    ]  # fmt: skip
    assert [p.tolist() for p in partition(labels, config_of(num_clients=4, kind="iid", seed=3))] == [
        [7, 9, 13, 14, 19, 21], [3, 11, 12, 16, 17, 18], [0, 2, 8, 10, 20, 23], [1, 4, 5, 6, 15, 22],
    ]  # fmt: skip


@given(LABELS, st.integers(0, 1000), st.data())
def test_clients_with_some_classes_share_all_images(labels: np.ndarray, seed: int, data: st.DataObject) -> None:
    """Every image has one owner; no client has more classes than asked for; and owners share a class evenly."""
    num_classes = len(np.unique(labels))
    per_client = data.draw(st.integers(1, num_classes))
    enough = -(-num_classes // per_client)
    num_clients = data.draw(st.integers(enough, max(enough, len(labels))))
    if num_clients > len(labels):
        return
    parts = partition(labels, config_of(num_clients=num_clients, kind="classes", per_client=per_client, seed=seed))
    assert len(parts) == num_clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() and part.dtype == np.int64 for part in parts)
    assert all(len(np.unique(labels[part])) <= per_client for part in parts)
    for label in np.unique(labels):
        shares = [n for part in parts if (n := int((labels[part] == label).sum()))]
        assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(("num_clients", "per_client"), [(10, 2), (33, 3), (5, 2), (10, 10), (10, 1)])
def test_classes_have_about_equally_many_owners(num_clients: int, per_client: int) -> None:
    """K clients with k of 10 classes make Kk places: each class has Kk/10 owners, rounded down or up."""
    labels = np.repeat(np.arange(10), 200)
    parts = partition(labels, config_of(num_clients=num_clients, kind="classes", per_client=per_client))
    assert [len(np.unique(labels[part])) for part in parts] == [per_client] * num_clients
    owners = [sum(label in labels[part] for part in parts) for label in range(10)]
    assert set(owners) <= {num_clients * per_client // 10, -(-num_clients * per_client // 10)}


def test_classes_that_do_not_fit_are_refused() -> None:
    labels = np.arange(40) % 4
    with pytest.raises(ConfigError, match="data.classes-per-client: got 5; the private part has 4 classes"):
        partition(labels, config_of(num_clients=4, kind="classes", per_client=5))
    with pytest.raises(
        ConfigError, match="got 1, and 3 clients; the 4 classes of the private part need an owner each: at least 2"
    ):
        partition(labels, config_of(num_clients=3, kind="classes", per_client=1))


def test_sizes_are_the_drawn_shares_and_classes_are_mixed_alike() -> None:
    """With two clients and a large alpha each gets half of every class, give or take four standard deviations (4 sqrt(1000)/2 = 63)."""
    labels = np.repeat([0, 1], 1000)
    parts = quantity_partition(labels, num_clients=3, alpha=0.5, rng=numpy_stream(3, "test"))
    rng = numpy_stream(3, "test")
    rng.permutation(2000)
    assert [len(part) for part in parts] == pytest.approx(rng.dirichlet([0.5] * 3) * 2000, abs=1.0)
    for part in quantity_partition(labels, num_clients=2, alpha=1e9, rng=numpy_stream(0, "test")):
        assert len(part) == pytest.approx(1000, abs=1)
        assert np.bincount(labels[part]) == pytest.approx([500, 500], abs=63)


def test_a_very_skewed_partition_over_many_clients() -> None:
    """Each class lies with few of 33 clients; recorded once."""
    labels = np.arange(2000) % 10
    parts = partition(labels, config_of(num_clients=33, alpha=0.05))
    assert [len(part) for part in parts] == [
        51, 157, 62, 29, 0, 5, 78, 18, 23, 30, 140, 23, 76, 70, 35, 2, 2, 177, 75, 66, 172, 150, 6, 5, 63, 23, 70, 8, 84, 25, 190, 80, 5,
    ]  # fmt: skip
    assert dominance(labels, parts) > 0.5
