"""Who owns which private image: a pure function of the labels and a seed."""

from __future__ import annotations

import numpy as np

from fbl_flower.config import RunConfig
from fbl_flower.errors import ConfigError
from fbl_flower.seeding import numpy_stream


def partition(labels: np.ndarray, config: RunConfig) -> list[np.ndarray]:
    """Give every private image to exactly one client.

    Args:
        labels: int [N], the labels of the private part.
        config: Its `data.partition`, `data.alpha`, `data.classes-per-client`, `num-clients` and `seed` decide the result.

    Returns:
        For each client, int64 indices into `labels`, ascending; possibly none.

    Raises:
        ConfigError: There are more clients than images, or the clients' classes do not fit the data.
    """
    num_clients, data = config.num_clients, config.data
    if num_clients > len(labels):
        raise ConfigError([f"num-clients: got {num_clients}; the private part has only {len(labels)} images"])
    rng = numpy_stream(config.seed, "partition")
    match data.partition:
        case "iid":
            return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), num_clients)]
        case "dirichlet":
            return dirichlet_partition(labels, num_clients=num_clients, alpha=data.alpha, rng=rng)
        case "classes":
            return classes_partition(labels, num_clients=num_clients, per_client=data.classes_per_client, rng=rng)
        case "quantity":
            return quantity_partition(labels, num_clients=num_clients, alpha=data.alpha, rng=rng)
        case _:
            raise ConfigError([f"data.partition: got {data.partition!r}; allowed: dirichlet | iid | classes | quantity"])


def dirichlet_partition(labels: np.ndarray, *, num_clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Cut every class by proportions drawn from Dirichlet(alpha) (Hsu et al., arXiv 1909.06335).

    No client is drawn again for being small: a client may end up with one image, or none.
    """
    owner = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        index = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(index)).astype(np.int64)
        for client, part in enumerate(np.split(index, cuts)):
            owner[part] = client
    return _by_owner(owner, num_clients)


def classes_partition(labels: np.ndarray, *, num_clients: int, per_client: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Give every client images of `per_client` classes (as McMahan et al., arXiv 1602.05629, give two digits to each).

    One client after the other takes the classes that the fewest have, ties at random, so that the numbers of their owners
    differ by one at most. The owners of a class share it evenly; one with fewer images than owners leaves some without.

    Raises:
        ConfigError: A client would have more classes than there are, or a class no owner.
    """
    classes = np.unique(labels)
    problems = []
    if per_client > len(classes):
        problems.append(f"data.classes-per-client: got {per_client}; the private part has {len(classes)} classes")
    elif num_clients * per_client < len(classes):
        problems.append(
            f"data.classes-per-client: got {per_client}, and {num_clients} clients; the {len(classes)} classes of the private part need an "
            f"owner each: at least {-(-len(classes) // num_clients)}, or more clients (num-clients)"
        )
    if problems:
        raise ConfigError(problems)
    owners: list[list[int]] = [[] for _ in classes]
    for client in range(num_clients):
        num_owners = np.array([len(clients) for clients in owners])
        for taken in np.lexsort((rng.random(len(classes)), num_owners))[:per_client]:
            owners[taken].append(client)
    owner = np.empty(len(labels), dtype=np.int64)
    for label, clients in zip(classes, owners, strict=True):
        index = rng.permutation(np.flatnonzero(labels == label))
        for client, part in zip(rng.permutation(clients), np.array_split(index, len(clients)), strict=True):
            owner[part] = client
    return _by_owner(owner, num_clients)


def quantity_partition(labels: np.ndarray, *, num_clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw the clients' sizes from Dirichlet(alpha), and each client's images from all alike (Li et al., arXiv 2102.02079).

    No client is drawn again for being small: a client may end up with one image, or none.
    """
    index = rng.permutation(len(labels))
    cuts = np.rint(np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))[:-1] * len(labels)).astype(np.int64)
    return [np.sort(part) for part in np.split(index, cuts)]


def _by_owner(owner: np.ndarray, num_clients: int) -> list[np.ndarray]:
    return [np.flatnonzero(owner == client) for client in range(num_clients)]
