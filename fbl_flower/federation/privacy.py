"""Client-level differential privacy: clip each update, sum them, add Gaussian noise, and account for it.

DP-FedAvg with fixed clipping (McMahan et al., arXiv 1710.06963, Algorithm 1), on a server that is trusted with single updates. It holds for
the global models; what else a run leaves on the server is not covered (docs/privacy.md).

A client is compared with the same client without data, whose update is 0. So one client changes the sum of a round by at most C, the noise has
sigma C for that, and the client pays for each round in which it was chosen. Random choice does not lower epsilon further: it follows from
the seed and is in the metrics, so there is no amplification by sampling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from flwr.serverapp import GaussianPrivacyEvent, NeighboringRelation, RdpAccountant, SamplingMethod
from flwr.serverapp import PrivacyConfig as AccountantConfig

from fbl_flower.config import PrivacyConfig, RunConfig, rounded_up
from fbl_flower.errors import ConfigError
from fbl_flower.params import Arrays
from fbl_flower.reporting.rundir import RunDirectory

LEDGER = "privacy.json"


def clipped(update: Mapping[str, np.ndarray], norm: float) -> Arrays:
    """Return u min(1, C / |u|): an update, scaled down to an L2 norm of at most C over all its arrays together.

    Args:
        update: Finite float64 arrays.
        norm: C, > 0.
    """
    with np.errstate(over="ignore"):  # a norm beyond float64 is infinite, and its update scaled to 0
        length = np.sqrt(sum(np.square(array).sum() for array in update.values()))
    scale = min(1.0, norm / length) if length > 0 else 1.0
    return {name: array * scale for name, array in update.items()}


def private_model(
    received: Mapping[str, np.ndarray],
    replies: Iterable[Mapping[str, np.ndarray]],
    privacy: PrivacyConfig,
    *,
    cohort: int,
    fixed: Collection[str] = (),
    rng: np.random.Generator | None = None,
) -> Arrays:
    """Return the next global model, w + (sum_k clip(w_k - w) + N(0, (sigma C)^2 I)) / m.

    An update is one vector over all arrays of floating-point numbers. Whole-number arrays stay as they were.

    Args:
        received: w, the global model that the clients started from.
        replies: w_k, the models of the clients that answered: the same names and shapes, all finite.
        privacy: C (`clip_norm`, > 0) and sigma (`noise_multiplier`, >= 0).
        cohort: m, how many clients a round is expected to have. The actual number would tell who failed.
        fixed: Names of arrays that no client may change.
        rng: Source of the noise; None: the operating system's entropy, since a run's seed may be known.
    """
    start = {
        name: array.astype(np.float64)
        for name, array in received.items()
        if np.issubdtype(array.dtype, np.floating) and name not in fixed
    }
    total = {name: np.zeros_like(array) for name, array in start.items()}
    for reply in replies:
        for name, array in clipped({name: reply[name] - w for name, w in start.items()}, privacy.clip_norm).items():
            total[name] += array
    if privacy.noise_multiplier:
        rng = rng or np.random.default_rng()
        for array in total.values():
            array += rng.normal(0.0, privacy.noise_multiplier * privacy.clip_norm, array.shape)
    return {
        name: np.asarray(start[name] + total[name] / cohort, dtype=array.dtype) if name in start else array
        for name, array in received.items()
    }


def cohort_size(fraction: float, num_clients: int) -> int:
    """Return how many clients a round chooses when all are connected; `fraction` is of (0, 1]."""
    return max(1, rounded_up(fraction, num_clients))


def epsilon(privacy: PrivacyConfig, *, num_clients: int, rounds: int) -> float:
    """Return the epsilon, at the settings' delta, of a client that was chosen in so many rounds.

    Flower's accountant composes the rounds by Renyi differential privacy, with Google's dp-accounting.

    Args:
        privacy: sigma (`noise_multiplier`, > 0) and delta.
        num_clients: Of the federation; does not change the result.
        rounds: >= 0, of both phases together.

    Raises:
        ImportError: dp-accounting is not installed.
    """
    config = AccountantConfig(
        target_delta=privacy.delta,
        population_size=num_clients,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.NO_AMPLIFICATION,
    )
    accountant = RdpAccountant(config)
    if rounds:
        accountant.compose(GaussianPrivacyEvent(privacy.noise_multiplier, num_clients, num_clients), rounds)
    return accountant.get_privacy_spent().epsilon


def check_accounting(config: RunConfig) -> None:
    """Refuse noise that cannot be accounted for; raises `ConfigError`."""
    if not config.privacy.noise_multiplier:
        return
    try:
        epsilon(config.privacy, num_clients=config.num_clients, rounds=0)
    except ImportError as error:
        raise ConfigError([
            "privacy.noise-multiplier: dp-accounting is not installed. Install it on the server: pip install 'fbl-flower[dp]'"
        ]) from error  # fmt: skip


class PrivacyLedger:
    """The rounds that each client was chosen for, in both phases of a run, and the epsilon that follows.

    They are kept in the run directory and never taken back: a round that is repeated after a resume gets other noise, and counts twice.
    Without noise the ledger stays empty, and nothing is written.
    """

    def __init__(self, config: RunConfig, run: RunDirectory) -> None:
        self._config, self._run = config, run
        stored = run.read_json(LEDGER).get("rounds_of_client", {})
        self._rounds = Counter({int(client): rounds for client, rounds in stored.items()})

    def add(self, chosen: Iterable[int]) -> None:
        """Enter the clients chosen for a round, also those that then failed, before anybody sees its model."""
        if self._config.privacy.noise_multiplier:
            self._rounds.update(chosen)
            self._run.write_json(LEDGER, {"rounds_of_client": dict(sorted(self._rounds.items()))} | self.spent())

    def spent(self) -> dict[str, float]:
        """Return epsilon so far, that of the client chosen most often, for a line of metrics; without noise, nothing."""
        if not self._config.privacy.noise_multiplier:
            return {}
        most = max(self._rounds.values(), default=0)
        return {"epsilon": epsilon(self._config.privacy, num_clients=self._config.num_clients, rounds=most)}
