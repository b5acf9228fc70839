"""A results table: rows of experiments, seeds, and the mean and spread of the final accuracy."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TableLine:
    """One line of the table.

    Attributes:
        title: What the reader sees.
        rounds: Rounds after which the accuracy was taken, such as "20" or "20 of 60"; empty without a federation.
        accuracies: By seed, 0 .. 1; seeds that have not finished are left out.
        seconds: By seed, wall time of the whole run.
        command: Gives the line again.
    """

    title: str
    rounds: str
    accuracies: Mapping[int, float]
    seconds: Mapping[int, float]
    command: str

    @property
    def mean(self) -> float | None:
        """Mean accuracy in percent; None without a finished seed."""
        return 100 * statistics.fmean(self.accuracies.values()) if self.accuracies else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n - 1) in percentage points; None for fewer than two seeds."""
        return 100 * statistics.stdev(self.accuracies.values()) if len(self.accuracies) > 1 else None


def as_markdown(lines: Sequence[TableLine], seeds: Sequence[int]) -> str:
    """Return the table in Markdown; accuracies in percent, `mean ± sample standard deviation`."""
    head = ["row", "rounds", "final accuracy (%)", *(f"seed {seed}" for seed in seeds), "seconds", "command"]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        per_seed = [f"{100 * line.accuracies[seed]:.2f}" if seed in line.accuracies else "" for seed in seeds]
        seconds = f"{statistics.fmean(line.seconds.values()):.0f}" if line.seconds else ""
        rows.append([line.title, line.rounds or "–", _summary(line, len(seeds)), *per_seed, seconds, f"`{line.command}`"])
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def as_csv(lines: Sequence[TableLine], seeds: Sequence[int]) -> str:
    """Return the table as CSV; accuracies in percent, full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "row",
            "rounds",
            "num_seeds",
            "mean_percent",
            "sd_percent",
            *(f"seed_{seed}_percent" for seed in seeds),
            "mean_seconds",
            "command",
        ]
    )
    for line in lines:
        per_seed = [100 * line.accuracies[seed] if seed in line.accuracies else None for seed in seeds]
        seconds = statistics.fmean(line.seconds.values()) if line.seconds else None
        writer.writerow(
            [line.title, line.rounds, len(line.accuracies), line.mean, line.deviation, *per_seed, seconds, line.command]
        )
    return text.getvalue()


def _summary(line: TableLine, num_seeds: int) -> str:
    if line.mean is None:
        return "not finished"
    spread = f" ± {line.deviation:.2f}" if line.deviation is not None else ""
    lacking = f" ({len(line.accuracies)} of {num_seeds} seeds)" if len(line.accuracies) < num_seeds else ""
    return f"{line.mean:.2f}{spread}{lacking}"
