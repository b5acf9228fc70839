"""State of runs that nobody goes on with, removed from a client's disk."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from pathlib import Path

_RUN = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")  # a run's identity; nothing else is touched
_GOING = ".removing-"


def remove_old_runs(folder: Path, *, days: float, keep: str) -> list[str]:
    """Delete the state of runs that was last written more than `days` days ago; return their names.

    A run's folder is first renamed and then deleted: who looks meanwhile finds it whole or not at all. What cannot be deleted stays.

    Args:
        folder: Has a folder of each run, and in it one of each client.
        days: Age in days; 0 keeps everything.
        keep: Identity of the run that is going on.
    """
    if days <= 0 or not folder.is_dir():
        return []
    oldest, removed = time.time() - days * 86400, []
    for run in sorted(folder.iterdir()):
        if run.is_symlink() or not run.is_dir():
            continue
        if run.name.startswith(_GOING):  # a removal that was killed
            shutil.rmtree(run, ignore_errors=True)
            continue
        if not _RUN.fullmatch(run.name) or run.name == keep:
            continue
        with contextlib.suppress(OSError):  # another process was faster, or may do what this one may not
            # A state is a new file in its folder each time, so the folder's own time tells when the last was written.
            folders = [run, *(path for path in run.rglob("*") if path.is_dir())]
            if max(path.stat().st_mtime for path in folders) < oldest:
                going = run.with_name(_GOING + run.name)
                run.rename(going)
                shutil.rmtree(going, ignore_errors=True)
                removed.append(run.name)
    return removed
