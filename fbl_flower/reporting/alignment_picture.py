"""The paper's Figure 2: how far synthetic features lie from real ones, without and with the alignment vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fbl_flower.reporting.pictures import ALIGNED, SYNTHETIC, class_colour, new_figure, save


@dataclass(frozen=True, kw_only=True)
class ClassAlignment:
    """What alignment did to one class, in the units of the features.

    Attributes:
        label: The class.
        name: Its name.
        num_real, num_synthetic: Images behind the two means.
        before: || mean F(real) - mean F(synthetic) ||.
        after: || mean F(real) - mean (F(synthetic) + P) ||.
    """

    label: int
    name: str
    num_real: int
    num_synthetic: int
    before: float
    after: float


def class_alignments(
    real: np.ndarray,
    real_labels: np.ndarray,
    synthetic: np.ndarray,
    synthetic_labels: np.ndarray,
    offsets: np.ndarray,
    class_names: Sequence[str],
) -> list[ClassAlignment]:
    """Measure, for every class that has real and synthetic images, the distance of their mean features.

    Args:
        real: float [N, D], features F of real images.
        real_labels: int [N].
        synthetic: float [M, D], features F of synthetic images.
        synthetic_labels: int [M].
        offsets: float [M, D], the vector P of each synthetic image: its own client's, for its class.
        class_names: In the order of the labels.
    """
    if synthetic.shape != offsets.shape or real.shape[1:] != synthetic.shape[1:]:
        raise ValueError(
            f"features: got {real.shape}, {synthetic.shape}, offsets {offsets.shape}; wanted [N, D], [M, D], [M, D]"
        )
    rows = []
    for label, name in enumerate(class_names):
        of_real, of_synthetic = real_labels == label, synthetic_labels == label
        if not of_real.any() or not of_synthetic.any():
            continue
        target = real[of_real].mean(axis=0, dtype=np.float64)
        plain = synthetic[of_synthetic].mean(axis=0, dtype=np.float64)
        offset = offsets[of_synthetic].mean(axis=0, dtype=np.float64)
        rows.append(
            ClassAlignment(
                label=label,
                name=name,
                num_real=int(of_real.sum()),
                num_synthetic=int(of_synthetic.sum()),
                before=float(np.linalg.norm(target - plain)),
                after=float(np.linalg.norm(target - plain - offset)),
            )
        )
    return rows


def alignment_picture(
    real: np.ndarray,
    real_labels: np.ndarray,
    synthetic: np.ndarray,
    synthetic_labels: np.ndarray,
    offsets: np.ndarray,
    class_names: Sequence[str],
    path: Path,
    *,
    num_scattered: int = 3,
    max_points: int = 60,
) -> list[ClassAlignment]:
    """Draw the distances of `class_alignments` as bars, and beside them the features of a few classes in two dimensions.

    The scatter shows the first two principal components of all features in it, of the classes that lay furthest apart before
    alignment; an arrow is a class's mean shift by P.

    Args:
        real, real_labels, synthetic, synthetic_labels, offsets, class_names: As for `class_alignments`.
        path: The PNG to write.
        num_scattered: Classes in the scatter.
        max_points: Images of each class and kind in the scatter.

    Returns:
        The distances, as drawn. Without any class that has both kinds the picture says so, and the list is empty.
    """
    rows = class_alignments(real, real_labels, synthetic, synthetic_labels, offsets, class_names)
    figure = new_figure(13.0, 5.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    figure.suptitle("Features of real and synthetic images, without and with the alignment vectors P", fontsize=13)
    if rows:
        _bars(left, rows)
        widest = sorted(rows, key=lambda row: -row.before)[:num_scattered]
        parts = [
            (
                row,
                real[real_labels == row.label][:max_points],
                *_first(synthetic, offsets, synthetic_labels == row.label, max_points),
            )
            for row in sorted(widest, key=lambda row: row.label)
        ]
        _scatter(right, parts, len(class_names))
    else:
        for axes in (left, right):
            axes.set_axis_off()
        left.text(0.5, 0.5, "no class has both real and synthetic images", ha="center", va="center", color="0.4")
    save(figure, path)
    return rows


def _bars(axes: Any, rows: Sequence[ClassAlignment]) -> None:
    place = np.arange(len(rows))
    axes.bar(place - 0.2, [row.before for row in rows], 0.4, color=SYNTHETIC, label="without P: F(synthetic)")
    axes.bar(place + 0.2, [row.after for row in rows], 0.4, color=ALIGNED, label="with P: F(synthetic) + P")
    before, after = np.mean([row.before for row in rows]), np.mean([row.after for row in rows])
    axes.set(
        title=f"Distance of the class means: {before:.2f} without P, {after:.2f} with P",
        ylabel="distance to the mean real feature (feature units)",
        xlabel="class",
    )
    axes.title.set_fontsize(11)
    crowded = max(len(row.name) for row in rows) * len(rows) > 70
    axes.set_xticks(place, [row.name for row in rows], rotation=45 if crowded else 0, ha="right" if crowded else "center")
    axes.set_ylim(0, 1.18 * max(max(row.before, row.after) for row in rows) or 1.0)  # the legend's room
    axes.legend(loc="upper right", frameon=False, ncols=2)
    axes.grid(axis="y", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)


def _scatter(axes: Any, parts: Sequence[tuple[ClassAlignment, np.ndarray, np.ndarray, np.ndarray]], num_classes: int) -> None:
    """Project every point by the principal components of all of them, and draw them: colour is the class, marker the kind."""
    from matplotlib.lines import Line2D

    everything = np.concatenate([np.concatenate([r, s, s + p]) for _, r, s, p in parts]).astype(np.float64)
    centre = everything.mean(axis=0)
    _, _, axes_of_variance = np.linalg.svd(everything - centre, full_matrices=False)
    plane = np.zeros((everything.shape[1], 2))
    plane[:, : min(2, len(axes_of_variance))] = axes_of_variance[:2].T
    for row, of_real, plain, offset in parts:
        colour = class_colour(row.label, num_classes)
        r, s, aligned = ((x - centre) @ plane for x in (of_real, plain, plain + offset))
        axes.scatter(*r.T, s=26, color=colour, alpha=0.45, linewidths=0)
        axes.scatter(*s.T, s=26, marker="x", color=colour, alpha=0.55, linewidths=1.2)
        axes.scatter(*aligned.T, s=28, marker="^", facecolors="none", edgecolors=colour, alpha=0.8, linewidths=0.9)
        arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", xy=aligned.mean(axis=0), xytext=s.mean(axis=0), arrowprops=arrow)
        axes.scatter(*r.mean(axis=0), s=130, color=colour, edgecolors="black", linewidths=1.4, zorder=5)
    kinds = [
        Line2D([], [], linestyle="", marker="o", color="0.4", label="real"),
        Line2D([], [], linestyle="", marker="o", color="0.7", markeredgecolor="black", markersize=10, label="mean of real"),
        Line2D([], [], linestyle="", marker="x", color="0.4", label="synthetic"),
        Line2D([], [], linestyle="", marker="^", markerfacecolor="none", color="0.4", label="synthetic + P"),
        Line2D([], [], color="black", marker=">", markevery=[1], label="mean shift by P"),
    ]
    classes = [Line2D([], [], color=class_colour(row.label, num_classes), linewidth=6, label=row.name) for row, *_ in parts]
    axes.legend(handles=kinds + classes, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set(xlabel="first principal component (feature units)", ylabel="second principal component (feature units)")
    axes.set_title("The classes that lay furthest apart", fontsize=11)


def _first(features: np.ndarray, offsets: np.ndarray, which: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    return features[which][:number], offsets[which][:number]
