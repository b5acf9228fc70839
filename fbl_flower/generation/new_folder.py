"""A generator's folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fbl_flower.claim import Claim
from fbl_flower.errors import GeneratorError, StateError


def make_parent(out: Path) -> None:
    """Make the folder that `out` is going to lie in.

    Raises:
        GeneratorError: It cannot be made.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`, and rename it to `out` at the end, readable by everyone; after an error nothing is left.

    What a kill leaves behind is removed by the next attempt.

    Args:
        out: Must not exist; its parents are made.

    Raises:
        GeneratorError: The disk is full, or may not be written. (What is raised inside is passed on, but for errors of the system and of
            safetensors: what is read inside must have errors of its own.)
    """
    make_parent(out)
    _remove_leftovers(out)
    folder, claim = out, None
    try:
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
        claim = Claim(folder, patience=0.0)
        yield folder
        folder.chmod(0o755)  # what temporary files are made with closes them to other users
        for file in folder.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        os.rename(folder, out)
    except (OSError, SafetensorError) as error:
        raise unwritable(out, error) from error
    finally:
        if folder != out:
            shutil.rmtree(folder, ignore_errors=True)
        if claim is not None:
            claim.release()


def _remove_leftovers(out: Path) -> None:
    for folder in out.parent.glob(f".{glob.escape(out.name)}-????????"):
        with contextlib.suppress(OSError, StateError):  # another process is making it
            claim = Claim(folder, patience=0.0)
            shutil.rmtree(folder, ignore_errors=True)
            claim.release()


def unwritable(out: Path, error: Exception) -> GeneratorError:
    """Return the error of a folder that cannot be written."""
    return GeneratorError(
        f"generator: {out} cannot be written ({error}); free space, mend its permissions, or choose another folder; "
        "nothing was left behind"
    )
