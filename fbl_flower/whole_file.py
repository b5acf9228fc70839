"""Files that others see whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, *, part: Path | None = None, sync: bool = False) -> Iterator[Path]:
    """Yield the file to write: it takes the place of `path` when the block ends, and is removed if that fails, such as on a full disk.

    Args:
        path: The file that others read.
        part: In the same folder; None: PATH.part, for files that one process writes: what a kill leaves is written over.
        sync: Whether a power cut, too, must leave the old file or the new one.

    Raises:
        OSError: The file cannot be put into its place.
    """
    part = part or part_of(path)
    try:
        yield part
        if sync:
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def part_of(path: Path) -> Path:
    """Return the file that `replacing` writes first: PATH.part, in the same folder."""
    return path.with_name(path.name + ".part")
