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
        config: Its `data.partition`, `data.alpha`, `num-clients` and `seed` decide the result.

    Returns:
        For each client, int64 indices into `labels`, ascending; possibly none.

    Raises:
        ConfigError: There are more clients than images.
    """
    if config.num_clients > len(labels):
        raise ConfigError([f"num-clients: got {config.num_clients}; the private part has only {len(labels)} images"])
    rng = numpy_stream(config.seed, "partition")
    if config.data.partition == "iid":
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), config.num_clients)]
    return dirichlet_partition(labels, num_clients=config.num_clients, alpha=config.data.alpha, rng=rng)


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
    return [np.flatnonzero(owner == client) for client in range(num_clients)]
