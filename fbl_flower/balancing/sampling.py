"""Knowledge sampling and replay (Sec. IV.C): which real images of an excessive class stay."""

from __future__ import annotations

import numpy as np


def choose_kept(
    labels: np.ndarray,
    keep: np.ndarray,
    *,
    losses: np.ndarray | None,
    rng: np.random.Generator,
    kept_before: np.ndarray | None = None,
    replay_ratio: float = 0.0,
) -> np.ndarray:
    """Choose which of a client's real images stay until the next choice.

    Sampling keeps the `keep[c]` images of class c with the highest loss (or random ones). A replay is a later choice: it first
    draws round(replay_ratio * keep[c]) images, uniformly, from those that were not kept since the last choice (all of them, if
    they are fewer), so that what sampling discarded is not forgotten; the rest are again those with the highest loss.

    Args:
        labels: int [N], the client's real labels.
        keep: int [C], images to keep of each class (`BalancePlan.keep`).
        losses: float [N] under the model that the client has just received; None: every image is equally good (random sampling).
        rng: The client's stream for this choice.
        kept_before: bool [N], what the last choice kept; None: this is the first choice.
        replay_ratio: gamma, 0 .. 1.

    Returns:
        bool [N], True for the images that stay; `keep[c]` of them in each class c.
    """
    score = rng.random(len(labels)) if losses is None else losses.astype(np.float64)
    kept = np.zeros(len(labels), dtype=bool)
    for label, number in enumerate(keep):
        of_class = np.flatnonzero(labels == label)
        if len(of_class) <= number:
            kept[of_class] = True
            continue
        replayed = of_class[:0]
        if kept_before is not None:
            discarded = of_class[~kept_before[of_class]]
            replayed = rng.choice(discarded, size=min(round(replay_ratio * int(number)), len(discarded)), replace=False)
        others = np.setdiff1d(of_class, replayed)
        highest_first = others[np.argsort(-score[others], kind="stable")]
        kept[replayed] = True
        kept[highest_first[: number - len(replayed)]] = True
    return kept


def replay_due(*, server_round: int, chosen_in: int, period: int) -> bool:
    """Tell whether at least `period` server rounds have passed since the client's last choice; period 0: never."""
    return period > 0 and server_round - chosen_in >= period
