"""Whether another job fits into memory beside those that run, from what the jobs so far have taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fbl_flower.generation.memory import free_bytes

_SETTLED_S = 20.0  # a job whose peak has not grown for so long is believed to have shown it
_STEADY = 1.02  # an allocator's peak creeps on for as long as a job runs
_MARGIN = 1.1


def memory_of(pid: int) -> tuple[int, int] | None:
    """Return the memory that a process has now, and the most that it had, in bytes; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended, or this is another system
        return None
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS:", "VmHWM:"))}
    return (found["VmRSS"], found["VmHWM"]) if len(found) == 2 else None


class MemoryGate:
    """Holds jobs back while memory is short. Where memory cannot be measured, nothing is held back.

    The first job starts alone, until its peak has settled or it has ended; from then on a job starts if the largest peak so far fits into
    what is free, less what the running jobs may still take.

    Args:
        known: Peaks of jobs that have finished before, in bytes.
        measure: As `memory_of`.
        free: As `free_bytes`.
        clock: Seconds.
        say: Told once that jobs are held back, and why.
    """

    def __init__(
        self,
        known: Sequence[int] = (),
        *,
        measure: Callable[[int], tuple[int, int] | None] = memory_of,
        free: Callable[[], int | None] = free_bytes,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = print,
    ) -> None:
        self._need = max(known, default=0)
        self._known = bool(known)
        self._settled = 0
        self._grown = clock()
        self._measure, self._free, self._clock, self._say = measure, free, clock, say
        self._said = False

    def learn(self, peak: int) -> None:
        """Take in the peak of a job that has ended, in bytes."""
        self._need, self._known = max(self._need, peak), True

    def may_start(self, pids: Sequence[int]) -> bool:
        """Say whether another job may start beside the processes `pids`; always, if there is none."""
        if not pids:
            self._settled, self._grown = 0, self._clock()
            return True
        measured = [found for pid in pids if (found := self._measure(pid)) is not None]
        peak = max((most for _, most in measured), default=0)
        self._need = max(self._need, peak)
        if peak > _STEADY * self._settled:
            self._settled, self._grown = peak, self._clock()
        free = self._free()
        if not self._need or free is None:
            return True
        if not self._known and self._clock() - self._grown < _SETTLED_S:
            return False
        reserved = sum(max(0, self._need - now) for now, _ in measured)
        fits = free - reserved >= _MARGIN * self._need
        if not fits and not self._said:
            self._said = True
            self._say(
                f"memory: a job takes up to {self._need / 2**20:.0f} MiB, and {max(0, free - reserved) / 2**20:.0f} MiB are left beside "
                f"the {len(pids)} that run: no more at a time until there is room"
            )
        return fits
