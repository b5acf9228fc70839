"""What memory is free, and whether it ran out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

_SHORT = ("not enough memory", "can't allocate memory", "out of memory", "could not create a primitive", "bad allocation")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out: torch says so in several ways, and on a CPU by the text alone."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _SHORT)


def free_bytes(system: Path = Path("/")) -> int | None:
    """Return the memory that this process may still take, of the machine and of its control groups; None where it cannot be told.

    Args:
        system: Where /proc and /sys are.
    """
    found = []
    with contextlib.suppress(OSError, ValueError):  # another system
        lines = (system / "proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return max(0, min([*found, *_left_in_groups(system)])) if found else None


def _left_in_groups(system: Path) -> Iterator[int]:
    """Yield what is left in each control group around this process that has a limit: a limit holds for the groups below it, too."""
    with contextlib.suppress(OSError):
        for line in (system / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                mount, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):  # the first version of control groups
                mount, names = "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            inner = PurePosixPath(path.lstrip("/"))
            for group in (inner, *inner.parents):  # in a container, the outer ones may not be there to be seen
                with contextlib.suppress(OSError, ValueError):  # no limit
                    yield _left_in_group(system / mount / group, *names)


def _left_in_group(folder: Path, limit: str, usage: str, idle: str) -> int:
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    # files that were read and are not in use count as used, and are given up when memory is asked for
    return int((folder / limit).read_text()) - int((folder / usage).read_text()) + int(stat.get(idle, 0))
