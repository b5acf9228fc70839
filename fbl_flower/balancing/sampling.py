"""Knowledge sampling and replay (Sec. IV.C): which real images of an excessive class stay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which of a client's real images stay until the next choice.

    Attributes:
        kept: bool [N], the images that stay.
        replayed: bool [N], those of them that a replay brought back from the discarded ones.
    """

    kept: np.ndarray
    replayed: np.ndarray

    def row(self, labels: np.ndarray, kept_before: np.ndarray | None) -> dict[str, int | None]:
        """Count images of the classes that were cut down: kept, kept also by the last choice, and replayed.

        Args:
            labels: int [N].
            kept_before: bool [N], what the last choice kept; None: this is the first choice.
        """
        cut = np.isin(labels, labels[~self.kept])
        again = None if kept_before is None else int((self.kept & kept_before & cut).sum())
        return {"kept": int((self.kept & cut).sum()), "kept_again": again, "replayed": int(self.replayed.sum())}


def choose_kept(
    labels: np.ndarray,
    keep: np.ndarray,
    *,
    losses: np.ndarray | None,
    rng: np.random.Generator,
    kept_before: np.ndarray | None = None,
    replay_ratio: float = 0.0,
    replay: str = "rank",
) -> Choice:
    """Choose which of a client's real images stay until the next choice.

    Sampling keeps the `keep[c]` images of class c with the highest loss (or random ones). A replay is a later choice: a share gamma of
    the kept images is first drawn, uniformly, from those that were not kept since the last choice (all of them, if they are fewer), so
    that what sampling discarded is not forgotten. With `replay` = "rank" the rest are again those with the highest loss, whether they
    were kept before or not: also with gamma = 0 most of the kept set may change. With "swap" the rest are images that were kept before,
    and the replayed ones take the places of those with the lowest loss: with gamma = 0 nothing changes.

    Reading: gamma * keep[c] is rarely whole, and below 1/2 in small classes. The classes' numbers are rounded together by one random
    offset (systematic sampling), so that each is right in the mean, and their sum is gamma * sum_c keep[c], rounded down or up.

    Args:
        labels: int [N], the client's real labels.
        keep: int [C], images to keep of each class (`BalancePlan.keep`).
        losses: float [N] under the model that the client has just received; None: every image is equally good (random sampling).
        rng: The client's stream for this choice.
        kept_before: bool [N], what the last choice kept; None: this is the first choice.
        replay_ratio: gamma, 0 .. 1.
        replay: rank | swap.

    Returns:
        The images that stay; `keep[c]` of them in each class c.
    """
    score = rng.random(len(labels)) if losses is None else losses.astype(np.float64)
    kept, replayed = np.zeros(len(labels), dtype=bool), np.zeros(len(labels), dtype=bool)
    cut_down = np.bincount(labels, minlength=len(keep)) > keep
    quota = np.zeros(len(keep), dtype=np.int64)
    if kept_before is not None:
        quota = _rounded_together(replay_ratio * keep * cut_down, rng.random())
    for label, number in enumerate(keep):
        of_class = np.flatnonzero(labels == label)
        if not cut_down[label]:
            kept[of_class] = True
            continue
        stays_first = np.zeros(len(labels), dtype=bool)
        if kept_before is not None:
            discarded = of_class[~kept_before[of_class]]
            replayed[rng.choice(discarded, size=min(int(quota[label]), len(discarded)), replace=False)] = True
            stays_first = kept_before if replay == "swap" else stays_first
        others = of_class[~replayed[of_class]]
        best_first = others[np.lexsort((-score[others], ~stays_first[others]))]
        kept[best_first[: number - int(replayed[of_class].sum())]] = True
    return Choice(kept=kept | replayed, replayed=replayed)


def _rounded_together(numbers: np.ndarray, offset: float) -> np.ndarray:
    """Round float [C] to int64 [C]: with an offset uniform in 0 .. 1, each result is its number in the mean, and so is the sum."""
    ends = np.floor(np.round(np.cumsum(numbers), 9) + offset).astype(np.int64)
    return np.diff(ends, prepend=0)


def replay_due(*, server_round: int, chosen_in: int, period: int) -> bool:
    """Tell whether at least `period` server rounds have passed since the client's last choice; period 0: never."""
    return period > 0 and server_round - chosen_in >= period
