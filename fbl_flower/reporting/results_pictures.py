"""The pictures of a results table: every seed's final accuracy, and the accuracy over rounds."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbl_flower.reporting.pictures import REAL, SYNTHETIC, new_figure, save
from fbl_flower.reporting.results_table import TableLine

_GRID: dict[str, Any] = {"color": "0.88", "linewidth": 0.8}
_ROWS_IN_A_PANEL = 10
_LABEL_WIDTH = 44  # characters of a title in a line


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A row's accuracy over rounds.

    Attributes:
        title: What the reader sees.
        group: Where there are many rows, those of a group share a panel.
        by_seed: For each finished seed, the accuracy, 0 .. 1, by round; a row without a federation has one entry.
        federated: False for a row without rounds, which is drawn as a level.
    """

    title: str
    group: str
    by_seed: Mapping[int, Mapping[int, float]]
    federated: bool


def final_accuracy_picture(lines: Sequence[TableLine], path: Path, *, ylabel: str = "final test accuracy (%)") -> None:
    """Draw one row for each line of the table: a dot for each seed, the mean, and one standard deviation to both sides.

    Args:
        lines: Lines without a finished seed are left out; there is nothing to draw if all are.
        path: The PNG to write.
        ylabel: Name of the axis of accuracy.
    """
    drawn = [line for line in lines if line.mean is not None]
    if not drawn:
        return
    figure = new_figure(9.0, 1.3 + 0.42 * len(drawn))
    axes = figure.subplots()
    for place, line in enumerate(drawn):
        percents = [100 * accuracy for accuracy in line.accuracies.values()]
        axes.plot(percents, [place] * len(percents), "o", color=SYNTHETIC, markersize=5, alpha=0.8, zorder=3)
        axes.errorbar(
            [line.mean or 0.0],
            [place],
            xerr=[line.deviation or 0.0],
            fmt="|",
            color=REAL,
            markersize=14,
            markeredgewidth=2,
            capsize=4,
            elinewidth=1.5,
        )
        axes.annotate(
            f"{(line.mean or 0.0) + 1e-9:.1f}",  # halves up, whatever the last bit of a mean
            (line.mean or 0.0, place),
            (0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    labels = [f"{line.title}{f', round {line.rounds}' if ' of ' in line.rounds else ''}" for line in drawn]
    axes.set_yticks(range(len(drawn)), [textwrap.fill(label, _LABEL_WIDTH) for label in labels], fontsize=8.5)
    axes.set(xlabel=ylabel, ylim=(len(drawn) - 0.3, -0.8))
    several = any(len(line.accuracies) > 1 for line in drawn)
    axes.set_title("dots: seeds; bar: mean ± one standard deviation" if several else "one seed", fontsize=9)
    axes.grid(axis="x", **_GRID)
    axes.set_axisbelow(True)
    save(figure, path)


def accuracy_over_rounds_picture(
    curves: Sequence[Curve],
    path: Path,
    *,
    num_seeds: int = 0,
    target: float | None = None,
    ylabel: str = "test accuracy (%)",
) -> None:
    """Draw the mean accuracy of each row over rounds, with a band of one standard deviation where there are several seeds.

    More than ten rows are drawn in a panel for each group, with the others in grey behind them.

    Args:
        curves: Rows without a finished seed are left out; there is nothing to draw if all are.
        path: The PNG to write.
        num_seeds: Rows with fewer seeds than that say how many they have.
        target: Accuracy, 0 .. 1, to mark; None: none.
        ylabel: Name of the axis of accuracy.
    """
    from matplotlib.ticker import MaxNLocator

    drawn = [curve for curve in curves if curve.by_seed]
    if not drawn:
        return
    groups = list(dict.fromkeys(curve.group for curve in drawn)) if len(drawn) > _ROWS_IN_A_PANEL else [None]
    figure = new_figure(11.0, max(4.5, 1.5 + 0.3 * len(drawn)) if groups == [None] else 0.6 + 2.7 * len(groups))
    panels = figure.subplots(len(groups), 1, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, group in zip(panels, groups, strict=True):
        shown = [curve for curve in drawn if group is None or curve.group == group]
        for curve in drawn:
            if curve not in shown and curve.federated:
                rounds, means, _ = band(curve.by_seed)
                axes.plot(rounds, means, color="0.88", linewidth=0.8, zorder=1)
        for place, curve in enumerate(shown):
            _draw(axes, curve, place, num_seeds)
        if target is not None:
            axes.axhline(100 * target, color="0.4", linewidth=0.8, linestyle=(0, (6, 4)), label=f"target: {100 * target:g} %")
        axes.set(ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(**_GRID)
        axes.set_axisbelow(True)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5)
    panels[-1].set(xlabel="round (0: initial model)")
    several = any(len(curve.by_seed) > 1 for curve in drawn)
    panels[0].set_title("mean over seeds; band: ± one standard deviation" if several else "one seed", fontsize=9)
    save(figure, path)


def _draw(axes: Any, curve: Curve, place: int, num_seeds: int) -> None:
    """Draw one row, a curve or a level, in the colour of its place."""
    from matplotlib import colormaps

    colour = colormaps["tab10"](place % 10)
    number = len(curve.by_seed)
    few = f" ({number} seed{'s' if number > 1 else ''})" if number < num_seeds else ""
    label = textwrap.fill(curve.title + few, _LABEL_WIDTH)
    if not curve.federated:
        level = 100 * statistics.fmean(next(iter(run.values())) for run in curve.by_seed.values())
        axes.axhline(level, color=colour, linestyle=(0, (1, 3)), label=label)
        return
    rounds, means, spreads = band(curve.by_seed)
    axes.plot(rounds, means, color=colour, linewidth=1.6, label=label)
    if number > 1:
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        axes.fill_between(rounds, low, high, color=colour, alpha=0.15, linewidth=0)


def band(by_seed: Mapping[int, Mapping[int, float]]) -> tuple[list[int], list[float], list[float]]:
    """Return the rounds that all seeds have, and the mean and sample standard deviation there, in percent."""
    runs = list(by_seed.values())
    rounds = sorted(set(runs[0]).intersection(*runs[1:]))
    columns = [[100 * run[number] for run in runs] for number in rounds]
    spreads = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    return rounds, [statistics.fmean(column) for column in columns], spreads
