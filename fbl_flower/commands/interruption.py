"""Signals that end a command: it cleans up first, and the cleaning up is not interrupted by the next one."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP clean up as Ctrl-C does: a run or a child process must not outlive its command.

    A closed terminal sends several signals, so after the first one only Ctrl-C interrupts the cleaning up. A signal that is
    ignored from the start, as `nohup` does with SIGHUP, stays ignored.
    """
    interrupted = False

    def interrupt(number: int, _: object) -> None:
        nonlocal interrupted
        if number == signal.SIGINT or not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _not_ignored("SIGINT", "SIGTERM", "SIGHUP")}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def only_ctrl_c_interrupts() -> Iterator[None]:
    """Clean up after another reason than a signal; one may follow, as when a closed terminal is first found by printing to it.

    The handlers do nothing, rather than to ignore the signals, which the programs that are started meanwhile would inherit.
    """
    before = {number: signal.signal(number, lambda *_: None) for number in _not_ignored("SIGTERM", "SIGHUP")}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _not_ignored(*names: str) -> list[signal.Signals]:
    """Return the signals that are not ignored; Windows has no SIGHUP."""
    known = [signal.Signals[name] for name in names if name in signal.Signals.__members__]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]
