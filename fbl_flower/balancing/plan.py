"""The balance point (Eq. 3): how many real images of each class stay, and how many are generated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class BalancePlan:
    """What one client does to its data.

    Attributes:
        keep: int64 [C], real images of each class that stay.
        fill: int64 [C], synthetic images of each class to add.
    """

    keep: np.ndarray
    fill: np.ndarray

    @property
    def num_balanced(self) -> int:
        """Size of the balanced set."""
        return int(self.keep.sum() + self.fill.sum())


def make_plan(
    counts: np.ndarray, *, tie_break: np.random.Generator, sampling: bool = True, filling: bool = True
) -> BalancePlan:
    """Plan a client's balanced set.

    With B the target of a class (see `balance_targets`) and n its count: an excessive class (n > B) keeps B, a
    scarce one (0 < n < B) gets B - n synthetic images, a missing one (n = 0) gets B. With both parts on, the total
    never changes: `keep.sum() + fill.sum() == counts.sum()`.

    Args:
        counts: int [C], the client's real images of each class, n_k^c.
        tie_break: The client's own stream, for classes that are equal (see `balance_targets`).
        sampling: Whether excessive classes are cut down; if not, they stay whole and the total grows.
        filling: Whether scarce and missing classes are filled; if not, the total shrinks.
    """
    targets = balance_targets(counts, tie_break=tie_break)
    return BalancePlan(
        keep=np.minimum(counts, targets) if sampling else counts.copy(),
        fill=np.maximum(targets - counts, 0) if filling else np.zeros_like(counts),
    )


def make_rich_plan(counts: np.ndarray, *, filling: bool = True) -> BalancePlan:
    """Plan for a compute-rich client, B_k = max_c n_k^c: nothing is discarded, and every class is filled up to the largest.

    The set grows to C * max_c n_k^c images, so its size tells how large the client's largest class is.

    Args:
        counts: int [C], the client's real images of each class.
        filling: Whether to fill; if not, the client's data stays as it is.
    """
    fill = counts.max() - counts if filling else np.zeros_like(counts)
    return BalancePlan(keep=counts.copy(), fill=fill)


def balance_targets(counts: np.ndarray, *, tie_break: np.random.Generator) -> np.ndarray:
    """Return int64 [C], the whole-numbered balance point of each class.

    Eq. 3: B_k = (1/C) sum_c n_k^c. It is rarely whole. Reading: every class gets floor(B_k), and the classes with the
    most real images get one more until the targets sum to N_k. Equal classes are ordered by a permutation that
    is the client's own: a fixed order would favour the same classes in the whole federation.
    """
    if counts.ndim != 1 or (counts < 0).any():
        raise ValueError("counts: wanted one number >= 0 for each class")
    floor, extra = divmod(int(counts.sum()), len(counts))
    targets = np.full(len(counts), floor, dtype=np.int64)
    most_first = np.lexsort((tie_break.permutation(len(counts)), -counts))
    targets[most_first[:extra]] += 1
    return targets


def cap_filling(plan: BalancePlan, counts: np.ndarray, *, share: float, tie_break: np.random.Generator) -> np.ndarray:
    """Return int64 [C], the synthetic images that are allowed where at most `share` (0 .. 1) of the set may be synthetic.

    Every class gives up the same part of its filling, up to rounding, in which equal classes are ordered by the client's own stream.

    Args:
        plan: As `make_plan` or `make_rich_plan` made it.
        counts: int [C], the client's real images: no more than these can stand in place of synthetic ones, so that the set may shrink.
        share: Of the set that remains.
        tie_break: The client's own stream.
    """
    wanted, real = int(plan.fill.sum()), int(counts.sum())
    allowed = min(wanted, math.floor(share * plan.num_balanced + 1e-9))
    if share < 1:  # f <= share (real + f)
        allowed = min(allowed, math.floor(share / (1 - share) * real + 1e-9))
    if wanted == 0:
        return plan.fill.copy()
    exact = plan.fill * allowed / wanted
    capped = np.floor(exact + 1e-9).astype(np.int64)
    most_cut = np.lexsort((tie_break.permutation(len(exact)), np.round(capped - exact, 9)))
    capped[most_cut[: allowed - int(capped.sum())]] += 1
    return capped


def limit_filling(
    plan: BalancePlan, counts: np.ndarray, available: np.ndarray, *, tie_break: np.random.Generator
) -> BalancePlan:
    """Return the plan that is left when only `available` synthetic images of each class are to be had.

    What cannot be filled is kept in real images instead, one at a time in the class that has the fewest images in the plan and
    still sets real ones aside. So the total stays N_k for as long as there are real images.

    Args:
        plan: As `make_plan` made it.
        counts: int [C], the client's real images of each class.
        available: int [C], >= 0.
        tie_break: The client's own stream, for classes that are equal.
    """
    fill, keep = np.minimum(plan.fill, available), plan.keep.copy()
    order = tie_break.permutation(len(counts))
    for _ in range(int((plan.fill - fill).sum())):
        spare = [c for c in order if keep[c] < counts[c]]
        if not spare:
            break
        keep[min(spare, key=lambda c: keep[c] + fill[c])] += 1
    return BalancePlan(keep=keep, fill=fill)
