"""From the results of a sweep to its table and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fbl_flower.commands.experiments import Row, bundled_of
from fbl_flower.config import AUTO, FEDERATED
from fbl_flower.generation.loading import kind_of
from fbl_flower.reporting.results_pictures import Curve, accuracy_over_rounds_picture, final_accuracy_picture
from fbl_flower.reporting.results_table import TableLine, as_csv, as_markdown

Results = Mapping[int, Mapping[str, Any]]
_SETTLED = 5  # rounds whose mean is shown beside the last one


def write_table(rows: Sequence[Row], seeds: Sequence[int], out: Path) -> None:
    """Write OUT/table.md and OUT/table.csv from the results that are there."""
    lines = [line for row in rows for line in table_lines(row, seeds, out)]
    out.mkdir(parents=True, exist_ok=True)
    notes = list(dict.fromkeys(note for row in rows for note in row.notes))
    scored_on = rows[0].config.data.evaluate_on if rows else "test"
    text = "".join(f"{note.strip()}\n\n" for note in notes)
    text += as_markdown(lines, seeds, scored_on="" if scored_on == "test" else scored_on)
    if any(line.to_target for line in lines):
        text += "\nThe target counts as reached in the first round with at least that accuracy; means are over the seeds that reached it.\n"
    places = sorted({result.get("ran_on", "not recorded") for row in rows for result in _results(row, seeds, out).values()})
    if len(places) > 1:
        text += f"\nNot all results were made alike: {'; '.join(places)}. Rounding differs, and so may accuracies by as much as seeds do.\n"
    if missing := [
        said for row in rows for seed, result in _results(row, seeds, out).items() if (said := _missing(row, seed, result))
    ]:
        text += f"\nNot all clients took part: {'; '.join(missing)}. ROW/SEED.json says who and why.\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "table.csv").write_text(as_csv(lines, seeds), encoding="utf-8")


def write_pictures(rows: Sequence[Row], seeds: Sequence[int], out: Path) -> None:
    """Write OUT/final.png and OUT/rounds.png from the results that are there; nothing where there are none."""
    scored_on = rows[0].config.data.evaluate_on if rows else "test"
    lines = [line for row in rows for line in table_lines(row, seeds, out)]
    final_accuracy_picture(lines, out / "final.png", ylabel=f"final {scored_on} accuracy (%)")
    curves = [
        Curve(
            title=row.title,
            group=row.name[:1],
            by_seed={seed: _by_round(result, "accuracy") for seed, result in _results(row, seeds, out).items()},
            federated=row.kind == "federation",
        )
        for row in rows
    ]
    targets = {row.target for row in rows}
    target = targets.pop() if len(targets) == 1 else None
    accuracy_over_rounds_picture(
        curves, out / "rounds.png", num_seeds=len(seeds), target=target, ylabel=f"{scored_on} accuracy (%)"
    )


def table_lines(row: Row, seeds: Sequence[int], out: Path) -> list[TableLine]:
    """Return the table's lines of a row: one for each round to report. What is about the whole run stands in the last."""
    results = _results(row, seeds, out)
    last = row.report_rounds[-1]
    federated = row.kind == "federation"
    lines = []
    for number in row.report_rounds:
        whole: dict[str, Any] = {}
        if number == last:
            whole = {
                "seconds": {seed: result["seconds"] for seed, result in results.items()},
                "bytes_sent": {seed: sent for seed, result in results.items() if (sent := _bytes_until(result, last))},
                "wrong_kept": {
                    seed: result["wrong_labels"]["kept"]
                    for seed, result in results.items()
                    if "kept" in result.get("wrong_labels", {})
                },
            }
            if row.target is not None and federated:
                reached = {seed: _first_round(result, row.target) for seed, result in results.items()}
                whole["to_target"] = reached
                whole["bytes_to_target"] = {
                    seed: sent
                    for seed, at in reached.items()
                    if at is not None and (sent := _bytes_until(results[seed], at)) is not None
                }
        line = {
            "rounds": "" if not federated else f"{number}" if number == last else f"{number} of {last}",
            "accuracies": {seed: result["accuracy"][str(number)] for seed, result in results.items()},
            "settled": {seed: _settled(result, number) for seed, result in results.items()}
            if federated and number >= _SETTLED
            else {},
            "untuned": _of_round("untuned_accuracy", results, number),
            "averaged": _of_round("averaged_accuracy", results, number),
            "epsilon": _of_round("epsilon", results, number),
            "seconds": {},
            **whole,
        }
        lines.append(
            TableLine(
                title=row.title, command=row.command(seeds), generator=source_of_synthetic(row), target=row.target, **line
            )
        )
    return lines


def _of_round(name: str, results: Results, number: int) -> dict[int, float]:
    """Return by seed what a result has under `name` for a round, where it has it."""
    return {seed: result[name][str(number)] for seed, result in results.items() if str(number) in result.get(name, {})}


def source_of_synthetic(row: Row) -> str:
    """Say where a row's synthetic images come from, and how they are degraded; empty where there are none."""
    config = row.config
    b, g = config.balancing, config.generator
    used = (b.enabled and b.filling) or config.server_generates if row.kind == "federation" else row.kind == "synthetic-only"
    if not used:
        return ""
    name = g.name
    if name == AUTO:
        folder = Path(g.path).expanduser() if g.path else bundled_of(config)
        name = kind_of(folder) if folder is not None and folder.is_dir() else FEDERATED
    parts = [name, f"of {g.trained_on}" if g.trained_on else "", f"blur {g.blur:g} px" if g.blur else ""]
    return ", ".join(filter(None, [*parts, f"noise {g.noise:g}" if g.noise else ""]))


def results_of(row: Row, out: Path) -> Results:
    """Return the results that are there, by seed; those that cannot stand for the row (`unusable`) are left out."""
    read = {int(file.stem): _read_for(row, file) for file in _files_of(row, out)}
    return {seed: result for seed, (result, problems) in read.items() if not problems}


def unusable_of(row: Row, out: Path) -> list[str]:
    """Say which results that are there, of any seed, cannot stand for a row, and why."""
    return [problem for file in sorted(_files_of(row, out)) for problem in unusable(row, file)]


def unusable(row: Row, file: Path) -> list[str]:
    """Say why a result that is there cannot stand for a row."""
    return _read_for(row, file)[1]


def _files_of(row: Row, out: Path) -> list[Path]:
    return [file for file in (out / row.name).glob("*.json") if file.stem.isdecimal()]


def _read_for(row: Row, file: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a result, and say why it cannot stand for a row."""
    try:
        result = read_result(file)
        differences = row.differences(result)
        if missing := [f"{number}" for number in row.report_rounds if str(number) not in result["accuracy"]]:
            differences.append(f"no accuracy of round {', '.join(missing)}")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        return {}, [f"{file}: damaged ({error}); delete it, and it is run again"]
    text = f"{file}: made with other settings ({'; '.join(differences)}); delete it, or use another --out"
    return result, [text] if differences else []


def read_result(file: Path) -> dict[str, Any]:
    """Read one result."""
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def _results(row: Row, seeds: Sequence[int], out: Path) -> Results:
    there = results_of(row, out)
    return {seed: there[seed] for seed in seeds if seed in there}


def _missing(row: Row, seed: int, result: Mapping[str, Any]) -> str:
    """Say how many answers of clients a result lacks, and of how many clients that were never prepared; empty where it is whole."""
    left_out: Mapping[str, Mapping[str, str]] = result.get("left_out", {})
    answers, unprepared = sum(map(len, left_out.values())), len(result.get("not_prepared", {}))
    parts = [f"answers missing: {answers}, in rounds: {len(left_out)}"] if answers else []
    parts += [f"clients not prepared: {unprepared}"] if unprepared else []
    return f"{row.title}, seed {seed} ({'; '.join(parts)})" if parts else ""


def _by_round(result: Mapping[str, Any], name: str) -> dict[int, float]:
    return {int(number): value for number, value in result.get(name, {}).items()}


def _settled(result: Mapping[str, Any], last: int) -> float:
    """Return the mean accuracy of five rounds, the last of which is given."""
    by_round = _by_round(result, "accuracy")
    return statistics.fmean(by_round[number] for number in range(last - _SETTLED + 1, last + 1))


def _first_round(result: Mapping[str, Any], target: float) -> int | None:
    """Return the first round with at least the target accuracy, not counting a warm start's model; None if there is none."""
    by_round = _by_round(result, "accuracy")
    return min((number for number, accuracy in by_round.items() if number > 0 and accuracy >= target), default=None)


def _bytes_until(result: Mapping[str, Any], last: int) -> int | None:
    """Return what was sent in both directions up to and with a round; None where the run did not count it."""
    there, back = _by_round(result, "bytes_to_clients"), _by_round(result, "bytes_from_clients")
    if not there or not back:
        return None
    return int(sum(value for sent in (there, back) for number, value in sent.items() if number <= last))
