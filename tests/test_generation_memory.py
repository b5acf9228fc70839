"""How many images are made together, and what happens when memory runs out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_generation_support import digits, tiny_generator
from torch import nn

from fbl_flower.config import parse_config
from fbl_flower.generation.diffusion import DiffusionGenerator
from fbl_flower.generation.loading import load_generator
from fbl_flower.generation.memory import Batches, activation_bytes, fitting_batch, free_bytes, is_out_of_memory

CPU = torch.device("cpu")


def test_a_batch_that_does_not_fit_is_made_again_in_halves() -> None:
    calls: list[tuple[int, int]] = []

    def make(start: int, stop: int) -> None:
        calls.append((start, stop))
        if stop - start > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:126] DefaultCPUAllocator: can't allocate memory: you tried ...")

    batches = Batches(lambda: 8)
    batches.run(10, make)
    assert calls == [(0, 8), (0, 4), (0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert batches.size == 2  # remembered: the next call does not try again


def test_other_errors_and_a_single_image_that_does_not_fit_are_raised() -> None:
    def broken(start: int, stop: int) -> None:
        raise RuntimeError("shapes differ")

    def hungry(start: int, stop: int) -> None:
        raise MemoryError

    batches = Batches(lambda: 4)
    with pytest.raises(RuntimeError, match="shapes differ"):
        batches.run(4, broken)
    assert batches.size == 4
    with pytest.raises(MemoryError):
        batches.run(4, hungry)
    assert batches.size == 1


def test_memory_that_ran_out_is_told_from_other_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert not is_out_of_memory(RuntimeError("size mismatch")) and not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_activations_are_counted_by_hand() -> None:
    """Two linear layers on 3 rows: 3 x 4 and 3 x 5 floats of four bytes."""
    network = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 5))
    assert activation_bytes(network, lambda: network(torch.zeros(3, 2))) == 4 * (12 + 15)
    assert not any(module._forward_hooks for module in network.modules())


def test_the_limit_decides_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    mebi = 2**20
    assert fitting_batch(32, bytes_per_image=lambda: mebi, limit_mb=10, device=CPU) == 10
    assert fitting_batch(32, bytes_per_image=lambda: mebi, limit_mb=100, device=CPU) == 32
    assert fitting_batch(32, bytes_per_image=lambda: 50 * mebi, limit_mb=10, device=CPU) == 1
    monkeypatch.setattr("fbl_flower.generation.memory.free_bytes", lambda: 12 * mebi)
    assert fitting_batch(32, bytes_per_image=lambda: mebi, limit_mb=0, device=CPU) == 6  # half of what is free
    monkeypatch.setattr("fbl_flower.generation.memory.free_bytes", lambda: None)
    assert fitting_batch(32, bytes_per_image=lambda: mebi, limit_mb=0, device=CPU) == 32


def test_the_limit_of_the_settings_reaches_the_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, mebi = tiny_generator(tmp_path), 2**20
    monkeypatch.setattr(DiffusionGenerator, "_bytes_per_image", lambda _: mebi)
    parts = digits()
    for limit, asked, size in ((3, 64, 3), (100, 64, 64), (3, 1, 1)):
        settings = {"data.name": "digits", "data.num-private": -1, "generator.path": str(folder)}
        limits = {"generator.batch-size": asked, "generator.memory-limit": limit}
        assert load_generator(parse_config(settings | limits), parts).batch_size == size


def test_free_memory_of_this_machine_is_less_than_it_has() -> None:
    free, meminfo = free_bytes(), Path("/proc/meminfo")
    if not meminfo.is_file():
        assert free is None
    else:
        total = next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemTotal:"))
        assert free is not None and 0 < free < total * 1024


def a_system(folder: Path, *, available_kib: int, groups: str, files: dict[str, str]) -> Path:
    """Lay out the files of /proc and /sys that are asked."""
    contents = {"proc/meminfo": f"MemTotal: 999 kB\nMemAvailable:  {available_kib} kB\n", "proc/self/cgroup": groups, **files}
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_free_memory_of_the_machine_alone(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) is None
    unlimited = {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n", "sys/fs/cgroup/memory.stat": ""}
    assert free_bytes(a_system(tmp_path, available_kib=7, groups="0::/\n", files=unlimited)) == 7 * 1024


def test_the_tightest_of_nested_control_groups_counts(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/a/memory.max": "4000\n", "sys/fs/cgroup/a/memory.current": "1500\n",
        "sys/fs/cgroup/a/memory.stat": "anon 1000\ninactive_file 300\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/memory.current": "1000\n", "sys/fs/cgroup/a/b/memory.stat": "",
    }  # fmt: skip
    assert free_bytes(a_system(tmp_path, available_kib=100, groups="0::/a/b\n", files=files)) == 4000 - 1500 + 300


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    groups = "4:memory:/gone/inside\n3:cpuset:/\n0::/\n"
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000\n", "sys/fs/cgroup/memory/memory.usage_in_bytes": "1900\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 50\n",
    }  # fmt: skip
    assert free_bytes(a_system(tmp_path, available_kib=100, groups=groups, files=files)) == 150


def test_a_gpus_memory_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch holds there and does not use is free, too. (Made up: no GPU is needed for this test.)"""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**20, 99 * 2**20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 8 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 2**20)
    assert fitting_batch(32, bytes_per_image=lambda: 2**20, limit_mb=0, device=torch.device("cuda")) == 8


def test_images_made_in_smaller_batches_differ_by_a_grey_level_at_most(tmp_path, monkeypatch) -> None:
    folder = tiny_generator(tmp_path)
    labels, seeds = [0, 1, 2, 3, 4, 5], [9, 8, 7, 6, 5, 4]
    whole = DiffusionGenerator.load(folder, steps=2, guidance=2.0, batch_size=4).generate(labels, seeds)
    short = DiffusionGenerator.load(folder, steps=2, guidance=2.0, batch_size=4)
    batch = short._batch

    def runs_out(labels: list[int], seeds: list[int]) -> torch.Tensor:
        if len(labels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch(labels, seeds)

    monkeypatch.setattr(short, "_batch", runs_out)
    assert (short.generate(labels, seeds).int() - whole.int()).abs().max() <= 1
    assert short.batch_size == 1
