"""The edge benchmark: real measurements of small tasks, each in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fbl_flower import cli
from fbl_flower.commands.bench import Measurement, as_markdown, measure
from fbl_flower.config import parse_config
from fbl_flower.data.datasets import load_parts

SMALL = parse_config({"data.name": "digits", "model.name": "tiny"})


def test_a_task_is_measured_in_a_process_of_its_own() -> None:
    one = measure(SMALL, load_parts(SMALL.data), task="generate", number=3, threads=1)
    assert one.problem == "" and one.seconds is not None and one.seconds > 0
    assert one.load_seconds is not None and one.load_seconds > 0
    assert one.peak_mb is not None and 100 < one.peak_mb < 16_000


def test_too_little_memory_is_a_result_and_not_a_crash() -> None:
    one = measure(SMALL, load_parts(SMALL.data), task="generate", number=3, threads=1, limit_mb=150)
    assert one.seconds is None and one.problem in ("out of memory", "the libraries cannot be loaded in so little memory")


def test_the_table_shows_tasks_and_failures() -> None:
    def one(task: str, limit: int, seconds: float | None, problem: str = "") -> Measurement:
        peak = None if seconds is None else 300.4
        return Measurement(
            task=task, threads=1, limit_mb=limit, seconds=seconds, load_seconds=1.0, peak_mb=peak, problem=problem
        )

    found = [
        one("generate", 0, 5.0),
        one("epoch", 0, 20.0),
        one("together", 0, 40.0),
        one("generate", 1024, None, "out of memory"),
        one("epoch", 1024, 20.0),
        one("together", 1024, None, "out of memory"),
    ]
    lines = as_markdown(found, num_images=100, epoch_images=2500).splitlines()
    assert lines[2] == "| 1 | none | 5.0 s | 300 MiB | 20.0 s | 300 MiB | 0.25 | 40.0 s | 300 MiB |"
    assert lines[3] == "| 1 | 1 GiB | failed: out of memory |  | 20.0 s | 300 MiB |  | failed: out of memory |  |"


def test_the_command_writes_json_and_refuses_bad_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fbl_flower.commands.bench._SMALL_BOARDS_MB", ())
    out = tmp_path / "bench.json"
    command = [
        "bench",
        "generator",
        "--data",
        "digits",
        "--images",
        "3",
        "--epoch-images",
        "20",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    assert cli.main([*command, "-c", 'model.name="tiny"']) == 0
    report = json.loads(out.read_text())
    assert [(m["task"], m["threads"], m["limit_mb"]) for m in report["measurements"]] == [
        ("generate", 1, 0), ("epoch", 1, 0), ("together", 1, 0),
    ]  # fmt: skip
    assert "| 1 | none |" in capsys.readouterr().out
    assert cli.main(["bench", "generator", "--images", "0", "--data", "nothing"]) == 2
    assert "--images: got 0" in (error := capsys.readouterr().err) and "data.name: got 'nothing'" in error
