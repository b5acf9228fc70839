"""What several tests need: a small data set in a parquet file, quick settings, and a grid that records what passes through it."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flwr.app import Message
from flwr.serverapp import Grid
from PIL import Image

from fbl_flower.federation import classification, rounds, server
from fbl_flower.federation.local import run_local
from fbl_flower.reporting.rundir import RunDirectory


def write_parquet(path: Path, labels: np.ndarray, *, num_test: int = 40, seed: int = 0) -> Path:
    """Write 32x32 images: the class shows as brightness, so that a small network can learn it."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([labels, np.arange(num_test) % 10])
    blobs = []
    for label in labels:
        pixels = np.clip(rng.normal(20 + 22 * label, 12, (32, 32, 3)), 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        blobs.append(stream.getvalue())
    split = ["train"] * (len(labels) - num_test) + ["test"] * num_test
    pq.write_table(pa.table({"image": blobs, "label": labels.astype(np.int32), "split": split}), path)
    return path


def quick(tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    """Return run-config keys of a federation that takes seconds: digits, the tiny model, real public images as filling."""
    return {
        "data.name": "digits",
        "data.num-private": 300,
        "model.name": "tiny",
        "generator.name": "public-images",
        "num-clients": 4,
        "num-server-rounds": 3,
        "train.epochs": 1,
        "train.schedule": "constant",  # so that a longer run begins as a shorter one
        "pictures": False,
        "output-dir": str(tmp_path / "runs"),
        "state-dir": str(tmp_path / "state"),
    } | {key.replace("__", ".").replace("_", "-"): value for key, value in overrides.items()}


def run_and_kill(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *, in_round: int) -> Path:
    """Run in process until the metrics of `in_round` would be written, and die there; return the run's directory."""
    append, runs = RunDirectory.append, Path(settings["output-dir"])
    before = set(runs.iterdir()) if runs.is_dir() else set()

    def dies(self: RunDirectory, name: str, row: dict[str, Any]) -> None:
        if row["round"] == in_round:
            raise KeyboardInterrupt
        append(self, name, row)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", dies)
        with pytest.raises(KeyboardInterrupt):
            run_local(settings)
    (killed,) = set(runs.iterdir()) - before or {Path(settings["resume"])}
    return killed


def watch_log(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    """Add to `lines` what the server logs."""
    for module in (server, rounds, classification):
        monkeypatch.setattr(module, "log", lambda level, text, *values: lines.append(text % values))


def save_image(path: Path, value: int | tuple[int, ...], *, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    """Write an image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (value,) * len(Image.new(mode, (1, 1)).getbands()) if isinstance(value, int) else value
    Image.new(mode, size, colour if len(colour) > 1 else colour[0]).save(path)
    return path


def write_folder(root: Path, classes: dict[str, int], *, first: int = 0) -> Path:
    """Write `classes[name]` images of each class; no two have the same value of red, and green is the place of the class."""
    value = first
    for place, (name, number) in enumerate(classes.items()):
        for i in range(number):
            save_image(root / name / f"{i:03d}.png", (value, 10 * place, 0))
            value += 1
    return root


class RecordingGrid(Grid):
    """Passes everything on to another grid and remembers every message and reply."""

    is_simulated = True

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.messages: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.messages += messages
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(self.grid.pull_messages(message_ids))
        self.messages += replies
        return replies

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("the server uses push and pull")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("the server makes its messages itself")

    def set_run(self, run: Any) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        return self.grid.run
