"""Settings of client-level differential privacy."""

from __future__ import annotations

from dataclasses import dataclass

from fbl_flower.config.options import option

NOT_PRIVATE = ("scaffold", "fedgen", "feddyn")  # the server of these also works with unclipped arrays of single clients
_LEAST_NOISE = 0.01  # below it, one round alone costs an epsilon of more than 5,000


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Client-level differential privacy of the models that the clients train together (docs/privacy.md)."""

    clip_norm: float = option(
        0.0, "largest L2 norm of a client's update; larger ones are scaled down to it; 0: privacy is off", low=0.0, high=1e6
    )
    noise_multiplier: float = option(
        0.0, "Gaussian noise on the sum of a round's updates, in units of clip-norm; 0: clip only", low=0.0, high=1e6
    )
    delta: float = option(1e-5, "probability for which epsilon need not hold; less than 1 / num-clients", above=0.0, high=0.5)


def privacy_problems(
    privacy: PrivacyConfig,
    *,
    num_clients: int,
    classifies: bool,
    weight_by: str,
    methods: set[str],
    average_embeddings: bool,
    batch_norm: bool,
) -> list[tuple[tuple[str, ...], str]]:
    """Name what does not work with these settings, each problem with the keys that it is about.

    Args:
        privacy: The settings.
        num_clients: Of the federation.
        classifies: Whether there are rounds of the classifier.
        weight_by: `aggregation.weight-by`.
        methods: Of all clients, as the configuration has them.
        average_embeddings: Whether clients send alignment vectors.
        batch_norm: Whether the classifier has running means and variances.
    """
    found: list[tuple[tuple[str, ...], str]] = []
    noise = privacy.noise_multiplier
    if noise and not privacy.clip_norm:
        text = f"privacy.noise-multiplier: got {noise:g}, but privacy.clip-norm is 0. Set privacy.clip-norm, which the noise scales with."
        found.append((("privacy.noise-multiplier", "privacy.clip-norm"), text))
    if 0 < noise < _LEAST_NOISE:
        text = f"privacy.noise-multiplier: expected 0 (clip only) or at least {_LEAST_NOISE:g}, got {noise:g}"
        found.append((("privacy.noise-multiplier",), text))
    if noise and privacy.delta >= 1 / num_clients:
        text = f"privacy.delta: expected less than 1 / num-clients ({1 / num_clients:g}), got {privacy.delta:g}"
        found.append((("privacy.delta", "num-clients", "privacy.noise-multiplier"), text))
    if not (privacy.clip_norm and classifies):
        return found
    if weight_by != "equal":
        text = f"aggregation.weight-by: expected 'equal' with privacy.clip-norm, got {weight_by!r}: every client counts alike"
        found.append((("aggregation.weight-by", "privacy.clip-norm"), text))
    for name in sorted(methods & set(NOT_PRIVATE)):
        text = (
            f"method.name: {name} does not work with privacy.clip-norm: its server needs more of a client than a clipped update"
        )
        found.append((("method.name", "clients.methods", "privacy.clip-norm"), text))
    if average_embeddings:
        text = "balancing.average-embeddings: true, but the vectors are not part of the update that privacy.clip-norm clips"
        found.append((("balancing.average-embeddings", "privacy.clip-norm"), text))
    if noise and batch_norm:
        text = "model.norm: expected 'group' with privacy.noise-multiplier, got 'batch': noise makes running variances negative"
        found.append((("model.norm", "model.name", "privacy.noise-multiplier"), text))
    return found
