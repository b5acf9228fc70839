"""That no two processes work on one folder."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

from fbl_flower.errors import StateError

if sys.platform != "win32":
    import fcntl


class Claim:
    """Keeps other processes that claim it too from a folder, until `release` or the end of this process, however it ends.

    Without effect where the system or the file system has no such locks.

    Args:
        folder: It must be there.
        patience: Seconds to wait for another process that has it.

    Raises:
        StateError: It still has it then.
    """

    def __init__(self, folder: Path, *, patience: float) -> None:
        self._handle: int | None = None
        if sys.platform == "win32":
            return
        handle, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    os.close(handle)
                    raise StateError(f"another process works on {folder}; wait for its end or stop it") from error
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        self._handle = handle

    @classmethod
    def is_free(cls, folder: Path) -> bool:
        """Whether no process has claimed a folder at this moment."""
        try:
            with contextlib.suppress(FileNotFoundError):  # whoever had it is done with it, and has removed it
                cls(folder, patience=0.0).release()
        except StateError:
            return False
        return True

    def release(self) -> None:
        """Let others have it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
