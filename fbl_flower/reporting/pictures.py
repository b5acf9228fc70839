"""The pictures of a run: accuracy curve, gallery, class counts; and of a partition. (The alignment picture has a module of its own.)

Figures are made without pyplot, which keeps every figure in a global list. Matplotlib is imported when a picture is drawn: it
costs a second, and a client never draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fbl_flower.data.examples import Examples
from fbl_flower.whole_file import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REAL, SYNTHETIC, ALIGNED = "#1f4e79", "#d9822b", "#2e8b57"
_GRID = {"color": "0.88", "linewidth": 0.8}


def accuracy_curve(metrics: Sequence[Mapping[str, Any]], path: Path, *, part: str = "test") -> None:
    """Draw accuracy and loss against the round; the title states the final accuracy.

    Args:
        metrics: One row for each evaluated round, in order, with `round`, `accuracy` (0 .. 1) and `loss`; round 0 is the
            initial model. Other keys are not read.
        path: The PNG to write.
        part: What the global model was evaluated on: "test" or "validation".
    """
    if not metrics:
        raise ValueError("metrics: got no rows; wanted at least one evaluated round")
    rounds = [int(row["round"]) for row in metrics]
    percent = [100 * float(row["accuracy"]) for row in metrics]
    figure = new_figure(7.0, 5.0)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
    top.plot(
        rounds,
        percent,
        color=REAL,
        marker="o",
        markersize=4 if len(rounds) <= 60 else 0,
        label=f"global model, whole {part} set",
    )
    top.set(
        ylabel=f"{part} accuracy (%)",
        ylim=(0, 102),
        title=f"Final {part} accuracy {percent[-1]:.1f} % after round {rounds[-1]}",
    )
    top.axhline(percent[-1], color=REAL, linewidth=0.8, linestyle=":", label=f"final: {percent[-1]:.1f} %")
    top.legend(loc="lower right", frameon=False)
    bottom.plot(rounds, [float(row["loss"]) for row in metrics], color=SYNTHETIC, label="cross-entropy")
    bottom.set(ylabel=f"{part} loss (nats)", xlabel="round (0: initial model)")
    bottom.legend(loc="upper right", frameon=False)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, bottom):
        axes.grid(**_GRID)
        axes.set_axisbelow(True)
    save(figure, path)


def gallery(
    real: Examples, synthetic: Examples, class_names: Sequence[str], path: Path, *, per_class: int = 8, max_classes: int = 20
) -> None:
    """Draw one row per class: its first real images on the left, its first synthetic ones on the right.

    Args:
        real: uint8 images [N, C, H, W] with C = 1 (grey) or 3 (RGB); a class may have few or none.
        synthetic: The same, of any size.
        class_names: In the order of the labels.
        path: The PNG to write.
        per_class: Images of each class and kind.
        max_classes: Of more classes, this many are drawn, evenly spaced.
    """
    shown = np.unique(np.linspace(0, len(class_names) - 1, min(len(class_names), max_classes)).round().astype(int))
    figure = new_figure(2 * per_class * 0.52 + 2.2, len(shown) * 0.58 + 1.1)
    figure.set_layout_engine("constrained", rect=(0, 0.01, 0.99, 0.98))  # a margin: pictures would end at the edge
    rows = figure.subplots(len(shown), 2, squeeze=False)
    for row, label in zip(rows, shown, strict=True):
        for axes, examples in zip(row, (real, synthetic), strict=True):
            tiles = examples.take((examples.labels == int(label)).nonzero().flatten()[:per_class]).images.numpy()
            axes.imshow(_strip(tiles, per_class), interpolation="nearest", aspect="equal")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if len(tiles) == 0:
                axes.text(
                    0.5, 0.5, "no images", transform=axes.transAxes, ha="center", va="center", color="0.5", style="italic"
                )
        row[0].set_ylabel(class_names[label], rotation=0, ha="right", va="center", fontsize=11)
    for axes, kind, examples in zip(rows[0], ("real", "synthetic"), (real, synthetic), strict=True):
        axes.set_title(f"{kind} (from {len(examples):,} images)", fontsize=12)
    some = f" ({len(shown)} of {len(class_names)} classes)" if len(shown) < len(class_names) else ""
    figure.suptitle(f"Real beside synthetic images, by class{some}", fontsize=13)
    save(figure, path)


def class_counts(
    before: np.ndarray,
    kept: np.ndarray,
    filled: np.ndarray,
    class_names: Sequence[str],
    path: Path,
    *,
    kind: str = "synthetic",
) -> None:
    """Draw every client's images by class, as a stack, before and after balancing.

    Args:
        before: int [K, C], real images of each client and class.
        kept: int [K, C], real images that stay.
        filled: int [K, C], images added; drawn hatched.
        class_names: In the order of the labels.
        path: The PNG to write.
        kind: What the added images are.
    """
    from matplotlib.patches import Patch

    if not before.shape == kept.shape == filled.shape or before.shape[1:] != (len(class_names),):
        shapes = f"{before.shape}, {kept.shape}, {filled.shape}"
        raise ValueError(f"before, kept, filled: got {shapes}; wanted the same [clients, {len(class_names)}] for all")
    num_clients = len(before)
    figure = new_figure(min(7.5 + 0.12 * num_clients, 16.0), 6.0)
    top, bottom = figure.subplots(2, 1, sharex=True, sharey=True)
    _stack(top, [(before, "")])
    _stack(bottom, [(kept, ""), (filled, "////")])
    top.set(title=f"As the clients hold them: {before.sum():,} real images", ylabel="images")
    bottom.set(
        title=f"Balanced: {kept.sum():,} real images kept, {filled.sum():,} {kind} ones added",
        ylabel="images",
        xlabel="client",
    )
    bottom.set(xlim=(-0.6, num_clients - 0.4), ylim=(0, 1.05 * max(before.sum(1).max(), (kept + filled).sum(1).max(), 1)))
    bottom.set_xticks(range(0, num_clients, math.ceil(num_clients / 25)))
    handles = [Patch(facecolor=class_colour(c, len(class_names)), label=name) for c, name in enumerate(class_names)]
    if len(handles) > 20:
        handles = []  # a legend of hundreds hides the picture
    handles += [
        Patch(facecolor="white", edgecolor="0.4", label="real"),
        Patch(facecolor="white", edgecolor="0.4", hatch="////", label="synthetic"),
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False, title="class")
    figure.suptitle("Class counts of each client before and after balancing", fontsize=13)
    save(figure, path)


def partition_picture(counts: np.ndarray, class_names: Sequence[str], title: str, path: Path) -> None:
    """Draw every client's images by class, as a stack, in the order of the clients' numbers.

    Args:
        counts: int [K, C], images of each client and class.
        class_names: In the order of the labels; of more than 20, a colour bar stands for the legend.
        title: What the partition is.
        path: The PNG to write.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    num_clients, num_classes = counts.shape
    if num_classes != len(class_names):
        raise ValueError(f"counts: got {counts.shape}; wanted [clients, {len(class_names)}]")
    figure = new_figure(min(7.5 + 0.12 * num_clients, 16.0), 4.2)
    axes = figure.subplots()
    _stack(axes, [(counts, "")])
    axes.set(ylabel="images", xlabel="client", xlim=(-0.6, num_clients - 0.4), ylim=(0, 1.05 * max(counts.sum(1).max(), 1)))
    axes.set_xticks(range(0, num_clients, math.ceil(num_clients / 25)))
    empty = int((counts.sum(1) == 0).sum())
    nobody = f", {empty} of them without any" if empty else ""
    axes.set_title(f"{counts.sum():,} images of {num_clients} clients{nobody}", fontsize=11)
    colours = [class_colour(label, num_classes) for label in range(num_classes)]
    if num_classes <= 20:
        handles = [Patch(facecolor=colour, label=name) for colour, name in zip(colours, class_names, strict=True)]
        figure.legend(handles=handles[::-1], loc="outside right center", frameon=False, title="class")  # as they are stacked
    else:
        bar = figure.colorbar(ScalarMappable(cmap=ListedColormap(colours)), ax=axes, ticks=[0, 1], pad=0.02)
        bar.ax.set_yticklabels([class_names[0], class_names[-1]])
        bar.set_label(f"{num_classes} classes", labelpad=-20)
    figure.suptitle(title, fontsize=13)
    save(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of `width` x `height` inches that lays itself out."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write the PNG at 130 dots per inch, by the Agg renderer, which needs no screen; whole, or not at all with an `OSError`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        FigureCanvasAgg(figure).print_figure(part, dpi=130, format="png")


def class_colour(label: int, num_classes: int) -> Any:
    """Return the colour of a class, the same in every picture."""
    from matplotlib import colormaps

    return colormaps["tab10"](label) if num_classes <= 10 else colormaps["turbo"](label / (num_classes - 1))


def _stack(axes: Any, parts: Sequence[tuple[np.ndarray, str]]) -> None:
    """Stack the classes of every client; a class's parts lie on each other, so that its whole share is one block."""
    num_clients, num_classes = parts[0][0].shape
    floor = np.zeros(num_clients)
    for label in range(num_classes):
        colour = class_colour(label, num_classes)
        for counts, hatch in parts:
            faded = (*colour[:3], 0.35) if hatch else colour
            axes.bar(
                range(num_clients),
                counts[:, label],
                bottom=floor,
                color=faded,
                hatch=hatch,
                edgecolor=colour,
                linewidth=0,
                width=0.8,
            )
            floor = floor + counts[:, label]
    axes.grid(axis="y", **_GRID)
    axes.set_axisbelow(True)


def _strip(tiles: np.ndarray, places: int, gap: int = 1) -> np.ndarray:
    """Lay uint8 [n, C, H, W] side by side on white, with room for `places`; return uint8 [H, width, 3]."""
    height, width = tiles.shape[2:]
    strip = np.full((height, places * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for place, tile in enumerate(tiles):
        left = place * (width + gap)
        strip[:, left : left + width] = tile.transpose(1, 2, 0)  # a single channel spreads over red, green and blue
    return strip
