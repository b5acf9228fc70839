"""What a client remembers, when its disk is full or its process is killed in the middle of writing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fbl_flower.roundstore import Record, RoundStore


def store(folder: Path) -> RoundStore[float]:
    return RoundStore(
        folder, pack=lambda value: Record(tensors={"x": torch.tensor(value)}), unpack=lambda record: record.tensors["x"].item()
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_state_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path).save(1.0, server_round=1, checkpoint_round=0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        store(tmp_path).save(2.0, server_round=2, checkpoint_round=1)
    assert names(tmp_path) == ["round-000001.safetensors"]
    assert store(tmp_path).newest() == 1.0


def test_saving_removes_what_killed_processes_left_and_no_later_rounds_file(tmp_path: Path) -> None:
    for number in (2, 3, 4):
        (tmp_path / f"round-{number:06d}.safetensors.77-88").write_bytes(b"half")
    store(tmp_path).save(3.0, server_round=3, checkpoint_round=0)
    assert names(tmp_path) == ["round-000003.safetensors", "round-000004.safetensors.77-88"]
    assert store(tmp_path).load(before_round=9) == 3.0


def test_each_call_lists_the_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path).save(1.0, server_round=1, checkpoint_round=0)
    listdir, calls = os.listdir, []
    monkeypatch.setattr(os, "listdir", lambda path: calls.append(path) or listdir(path))
    store(tmp_path).load(before_round=2)
    store(tmp_path).save(2.0, server_round=2, checkpoint_round=1)
    assert len(calls) == 2
