"""A results table: rows of experiments, seeds, the mean and spread of the final accuracy, and the way to a target."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class TableLine:
    """One line of the table. Everything by seed lacks the seeds that have not finished, or did not record it.

    Attributes:
        title: What the reader sees.
        rounds: Rounds after which the accuracy was taken, such as "20" or "20 of 60"; empty without a federation.
        accuracies: By seed, 0 .. 1.
        settled: By seed, the mean of the last five rounds up to then, 0 .. 1, which jumps less; empty where there are not as many.
        seconds: By seed, wall time of the whole run.
        command: Gives the line again.
        generator: Where synthetic images came from; empty where there are none.
        target: Accuracy, 0 .. 1, that `to_target` is about; None: no target.
        to_target: By seed, the first round with at least that accuracy; None: not reached.
        bytes_to_target: By seed, what was sent in both directions up to that round.
        bytes_sent: By seed, what was sent in both directions in the whole run.
        untuned: By seed, the accuracy before the server trained the model (`server-tuning`).
        averaged: By seed, the accuracy of the average of the global model over rounds (`server.average`).
        epsilon: By seed, what the models up to then have cost in differential privacy (`privacy.noise-multiplier`).
        wrong_kept: By seed, the share of wrong labels, 0 .. 1, among the real images that sampling kept at the end.
    """

    title: str
    rounds: str
    accuracies: Mapping[int, float]
    seconds: Mapping[int, float]
    command: str
    generator: str = ""
    settled: Mapping[int, float] = field(default_factory=dict)
    target: float | None = None
    to_target: Mapping[int, int | None] = field(default_factory=dict)
    bytes_to_target: Mapping[int, int] = field(default_factory=dict)
    bytes_sent: Mapping[int, int] = field(default_factory=dict)
    untuned: Mapping[int, float] = field(default_factory=dict)
    averaged: Mapping[int, float] = field(default_factory=dict)
    epsilon: Mapping[int, float] = field(default_factory=dict)
    wrong_kept: Mapping[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """Mean accuracy in percent; None without a finished seed."""
        return 100 * statistics.fmean(self.accuracies.values()) if self.accuracies else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n - 1) in percentage points; None for fewer than two seeds."""
        return 100 * statistics.stdev(self.accuracies.values()) if len(self.accuracies) > 1 else None

    @property
    def reached(self) -> dict[int, int]:
        """The seeds that came to the target, and the round in which they did."""
        return {seed: number for seed, number in self.to_target.items() if number is not None}


def as_markdown(lines: Sequence[TableLine], seeds: Sequence[int], *, scored_on: str = "") -> str:
    """Return the table in Markdown; accuracies in percent, `mean ± sample standard deviation`.

    A column that no line has anything for is left out. A target's columns hold the mean over the seeds that reached it.

    Args:
        lines: The lines, in order.
        seeds: Those that are to come; each has a column.
        scored_on: Named in the head of the accuracy, such as "validation".
    """
    columns: list[tuple[str, list[str], bool]] = [
        ("row", [line.title for line in lines], True),
        ("synthetic images", [line.generator or "–" for line in lines], any(line.generator for line in lines)),
        ("rounds", [line.rounds or "–" for line in lines], True),
        (
            " ".join(filter(None, ["final", scored_on, "accuracy (%)"])),
            [_summary(line.accuracies, len(seeds)) for line in lines],
            True,
        ),
    ]
    columns += [(f"seed {seed}", [_number(line.accuracies, [seed], 100, 2) for line in lines], True) for seed in seeds]
    settled = [_summary(line.settled, len(seeds)) if line.settled else "–" for line in lines]
    columns.append(("mean of the last 5 rounds (%)", settled, any(line.settled for line in lines)))
    for head, scores in (
        ("before tuning (%)", [line.untuned for line in lines]),
        ("average over rounds (%)", [line.averaged for line in lines]),
    ):
        columns.append((head, [_summary(one, len(seeds)) if one else "–" for one in scores], any(scores)))
    spent = [_number(line.epsilon, seeds, 1, 1, of=len(line.accuracies)) or "–" for line in lines]
    columns.append(("epsilon", spent, any(line.epsilon for line in lines)))
    has_target = any(line.target is not None for line in lines)
    columns += [
        ("target (%)", [f"{100 * line.target:g}" if line.to_target and line.target else "" for line in lines], has_target),
        ("rounds to target", [_to_target(line) for line in lines], has_target),
        (
            "MB to target",
            [_number(line.bytes_to_target, seeds, 1e-6, 1, of=len(line.accuracies)) for line in lines],
            any(line.bytes_to_target for line in lines),
        ),
        (
            "MB sent",
            [_number(line.bytes_sent, seeds, 1e-6, 1, of=len(line.accuracies)) for line in lines],
            any(line.bytes_sent for line in lines),
        ),
        (
            "wrong labels kept (%)",
            [_number(line.wrong_kept, seeds, 100, 1, of=len(line.accuracies)) for line in lines],
            any(line.wrong_kept for line in lines),
        ),
        ("seconds", [_number(line.seconds, seeds, 1, 0) for line in lines], True),
        ("command", [f"`{line.command}`" for line in lines], True),
    ]
    shown = [(head, cells) for head, cells, wanted in columns if wanted]
    rows = [[head for head, _ in shown], ["---"] * len(shown), *([cells[i] for _, cells in shown] for i in range(len(lines)))]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def as_csv(lines: Sequence[TableLine], seeds: Sequence[int]) -> str:
    """Return the table as CSV, every column in every table but epsilon, which only some have; accuracies in percent, full precision; "not reached" as a word."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["row", "rounds", "num_seeds", "mean_percent", "sd_percent", *(f"seed_{seed}_percent" for seed in seeds)]
    head += ["mean_seconds", "synthetic_images", "target_percent", "num_seeds_to_target", "mean_rounds_to_target"]
    head += ["mean_bytes_to_target", "mean_bytes_sent", "mean_wrong_kept_percent", "mean_last_5_rounds_percent"]
    private = any(line.epsilon for line in lines)
    head += ["mean_untuned_percent", "mean_averaged_percent", *(["mean_epsilon"] if private else []), "command"]
    writer.writerow(head)
    for line in lines:
        per_seed = [100 * line.accuracies[seed] if seed in line.accuracies else None for seed in seeds]
        reached: float | str | None = _mean(line.reached) if line.reached else "not reached" if line.to_target else None
        shares = [_mean(one) for one in (line.wrong_kept, line.settled, line.untuned, line.averaged)]
        writer.writerow(
            [
                *(line.title, line.rounds, len(line.accuracies), line.mean, line.deviation, *per_seed),
                *(_mean(line.seconds), line.generator, None if line.target is None else 100 * line.target),
                *(len(line.reached) if line.to_target else None, reached, _mean(line.bytes_to_target), _mean(line.bytes_sent)),
                *(None if share is None else 100 * share for share in shares),
                *([_mean(line.epsilon)] if private else []),
                line.command,
            ]
        )
    return text.getvalue()


def _summary(by_seed: Mapping[int, float], num_seeds: int) -> str:
    """Return mean ± sample standard deviation in percent, with the number of seeds if they are fewer than `num_seeds`."""
    if not by_seed:
        return "not finished"
    percents = [100 * accuracy for accuracy in by_seed.values()]
    spread = f" ± {statistics.stdev(percents):.2f}" if len(percents) > 1 else ""
    lacking = f" ({len(percents)} of {num_seeds} seeds)" if len(percents) < num_seeds else ""
    return f"{statistics.fmean(percents):.2f}{spread}{lacking}"


def _to_target(line: TableLine) -> str:
    if not line.to_target:
        return ""
    if not line.reached:
        return "not reached"
    lacking = f" ({len(line.reached)} of {len(line.to_target)} seeds)" if len(line.reached) < len(line.to_target) else ""
    return f"{_mean(line.reached):.1f}{lacking}"


def _mean(by_seed: Mapping[int, float]) -> float | None:
    return statistics.fmean(by_seed.values()) if by_seed else None


def _number(by_seed: Mapping[int, float], seeds: Sequence[int], factor: float, digits: int, *, of: int = 0) -> str:
    """Return the mean over those of `seeds` that are there, with their number if they are fewer than `of`; or nothing."""
    there = {seed: by_seed[seed] for seed in seeds if seed in by_seed}
    mean = _mean(there)
    lacking = f" ({len(there)} of {of} seeds)" if len(there) < of else ""
    return "" if mean is None else f"{factor * mean:.{digits}f}{lacking}"
