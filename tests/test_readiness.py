"""What a client checks before it generates or trains, and what of it the server may know."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quick

from fbl_flower.balancing.old_state import remove_old_runs
from fbl_flower.config import parse_config
from fbl_flower.data.datasets import load_parts
from fbl_flower.errors import DataError, GeneratorError, RunFailed
from fbl_flower.federation import client
from fbl_flower.federation.local import run_local
from fbl_flower.generation.cache import ImageCache
from fbl_flower.training import prepare
from fbl_flower.training.prepare import client_examples
from fbl_flower.training.readiness import Readiness, explained, fill_bytes


@pytest.fixture(autouse=True)
def _forget_clients() -> None:
    client._prepared.cache_clear()


def with_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - num_bytes, num_bytes))


def test_images_take_whole_blocks() -> None:
    """64 pixels and a header fit into one block of 4096; 28 x 28 x 3 = 2352 too; 4033 do not."""
    assert fill_bytes(10, 64) == 40960
    assert fill_bytes(1, 2352) == 4096
    assert fill_bytes(3, 4033) == 3 * 8192
    assert fill_bytes(0, 0) == 0


def test_too_little_space_is_told_by_the_number_of_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(quick(tmp_path))
    parts = load_parts(config.data)
    real = client_examples(config, parts, 0)
    one_class = real.take(torch.zeros(len(real), dtype=torch.int64))  # the same number, the most unequal classes
    needed = 4096 * len(real)
    for examples in (real, one_class):
        readiness = Readiness(config, 0, state_dir=tmp_path / "state", own_folder=None)
        with_free(monkeypatch, needed)
        readiness.check(parts, examples)
        with_free(monkeypatch, needed - 1)
        with pytest.raises(DataError, match=r"state-dir: too little space on the disk of .*; free some") as caught:
            readiness.check(parts, examples)
        size = f"{needed / 2**20:.1f} MiB"
        assert caught.value.public == f"its disk has too little space: {size} needed for {len(real)} images, {size} free"


def test_a_rich_client_may_fill_every_class_and_one_that_cannot_generate_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(quick(tmp_path))
    parts = load_parts(config.data)
    real = parts.private.take(torch.arange(12))
    rich, none = (Readiness(config, 0, state_dir=tmp_path, own_folder=None, capability=kind) for kind in ("rich", "none"))
    with_free(monkeypatch, 10 * 12 * 4096 - 1)
    with pytest.raises(DataError, match="needed for 120 images"):
        rich.check(parts, real)
    with_free(monkeypatch, 0)
    none.check(parts, real)


def test_who_is_prepared_needs_no_more_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quick(tmp_path)
    run_local(settings)
    client._prepared.cache_clear()
    with_free(monkeypatch, 0)
    assert run_local(settings).summary["not_prepared"] == {}
    client._prepared.cache_clear()
    with pytest.raises(
        RunFailed, match=r"client 0: its disk has too little space: 0\.\d MiB needed for \d+ images, 0\.0 MiB free"
    ):
        run_local(settings | {"seed": 1})  # other images to generate


def test_who_was_stopped_half_way_needs_no_room_for_all_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quick(tmp_path)
    put, made = ImageCache.put, list[object]()

    def killed(self: ImageCache, *args: Any) -> None:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(args)
        put(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ImageCache, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            run_local(settings)
    client._prepared.cache_clear()
    with_free(monkeypatch, 0)
    reasons = run_local(settings).summary["not_prepared"]
    assert "0" not in reasons and len(made) == 3


def test_a_client_that_does_not_fill_needs_neither_space_nor_a_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(quick(tmp_path, balancing__filling=False, generator__name="diffusion", generator__path=str(tmp_path)))
    parts = load_parts(config.data)
    with_free(monkeypatch, 0)
    Readiness(config, 0, state_dir=tmp_path, own_folder=None).check(parts, parts.private)
    filling = parse_config(quick(tmp_path, generator__name="diffusion", generator__path=str(tmp_path)))
    with pytest.raises(GeneratorError) as caught:
        Readiness(filling, 0, state_dir=tmp_path, own_folder=None).check(parts, parts.private)
    assert caught.value.public == "its generator cannot be used" and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("error", "public"),
    [
        (DataError("class 7 is damaged"), "its data cannot be used"),
        (GeneratorError("class 7 is unknown"), "its generator cannot be used"),
        (
            GeneratorError("cache of class 7", public="its image cache cannot be used: full"),
            "its image cache cannot be used: full",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/home/me/class7"), "its disk: No space left on device"),
    ],
)
def test_every_reason_has_a_sentence_for_the_server(error: Exception, public: str) -> None:
    with pytest.raises((DataError, GeneratorError)) as caught, explained():
        raise error
    assert caught.value.public == public and "7" in str(caught.value)


def test_a_disk_that_fills_up_while_it_trains_is_told_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fbl_flower.balancing.state import StateStore

    save = StateStore.save

    def full(self: StateStore, state: Any, **kwargs: Any) -> None:
        if self.folder.name == "client-0002" and kwargs["server_round"] == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.folder))
        save(self, state, **kwargs)

    monkeypatch.setattr(StateStore, "save", full)
    outcome = run_local(quick(tmp_path, fraction_train=1.0))
    rows = [json.loads(line) for line in (outcome.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["clients"] for row in rows[1:]] == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 3]]
    assert rows[2]["left_out"]["2"].startswith("OSError (No space left on device); the client's ")
    assert "client-0002" not in rows[2]["left_out"]["2"]


def an_old_run(folder: Path, name: str, days: float) -> Path:
    run = folder / name
    (run / "client-0000").mkdir(parents=True)
    (run / "client-0000" / "round-000001.safetensors").write_bytes(b"x")
    for path in (run / "client-0000", run):
        os.utime(path, (time.time() - days * 86400,) * 2)
    return run


def test_state_of_old_runs_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "clients"
    old = an_old_run(folder, "20260101-101010-abcdef", 31)
    young = an_old_run(folder, "20260102-101010-abcdef", 29)
    going_on = an_old_run(folder, "20260103-101010-abcdef", 31)
    others = an_old_run(folder, "my-own-notes", 400)
    half_removed = an_old_run(folder, ".removing-20250101-101010-abcdef", 1)
    elsewhere = an_old_run(tmp_path, "20260104-101010-abcdef", 400)
    (folder / elsewhere.name).symlink_to(elsewhere)
    touched = an_old_run(folder, "20260105-101010-abcdef", 31)
    (touched / "client-0000" / "round-000002.safetensors").write_bytes(b"x")
    deeper = an_old_run(folder, "20260106-101010-abcdef", 31)
    (deeper / "client-0000" / "scaffold").mkdir()
    (deeper / "client-0000" / "scaffold" / "round-000002.safetensors").write_bytes(b"x")
    long_ago = time.time() - 31 * 86400
    os.utime(deeper / "client-0000", (long_ago, long_ago))
    assert remove_old_runs(folder, days=0, keep="") == []
    assert remove_old_runs(folder, days=30, keep=going_on.name) == [old.name]
    assert not old.exists() and not half_removed.exists()
    for path in (young, going_on, others, touched, deeper, elsewhere):
        assert (path / "client-0000" / "round-000001.safetensors").exists()
    assert remove_old_runs(tmp_path / "nowhere", days=30, keep="") == []


def test_a_run_clears_the_state_of_old_ones(tmp_path: Path) -> None:
    old = an_old_run(tmp_path / "state" / "clients", "20260101-101010-abcdef", 31)
    assert run_local(quick(tmp_path, num_server_rounds=1)).summary["status"] == "completed"
    assert not old.exists()


def test_who_finds_all_images_on_disk_does_not_load_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quick(tmp_path, generator__name="diffusion", data__num_private=60, num_server_rounds=1, fraction_train=1.0)
    first = run_local(settings)
    client._prepared.cache_clear()
    prepare._load_once.cache_clear()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was loaded")

    monkeypatch.setattr("fbl_flower.generation.diffusion.load_quantized", never)
    second = run_local(settings)
    assert second.summary["left_out"] == second.summary["not_prepared"] == {}
    assert (first.run_dir / "metrics.jsonl").read_bytes() == (second.run_dir / "metrics.jsonl").read_bytes()
    client._prepared.cache_clear()
    prepare._load_once.cache_clear()
    with pytest.raises(RunFailed):  # others are not there yet
        run_local(settings | {"seed": 1})
