"""What a client makes sure of before it generates or trains, each problem with a sentence that may go to the server."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from fbl_flower.config import OWN_IMAGES, RunConfig, flatten
from fbl_flower.data.datasets import DataParts
from fbl_flower.data.examples import Examples
from fbl_flower.errors import DataError, GeneratorError, StateError
from fbl_flower.generation.loading import check_generator, generator_folder
from fbl_flower.whole_file import replacing

_BLOCK = 4096  # bytes that a small file takes on most disks
_HEADER = 64
_MIB = 2**20
# A fill follows from these: who had room for all of it once, and was stopped half-way, needs no more than the rest.
_DECISIVE = ("seed", "num-clients", "data.", "balancing.", "generator.")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Give errors of reading data and of the generator a public sentence, where they have none, that says no more than which of the two."""
    try:
        yield
    except (DataError, GeneratorError) as error:
        if error.public != type(error).__name__:
            raise
        what = "data" if isinstance(error, DataError) else "generator"
        raise type(error)(str(error), public=f"its {what} cannot be used") from error
    except OSError as error:
        raise DataError(
            f"data: cannot be read ({error})", public=f"its disk: {error.strerror or type(error).__name__}"
        ) from error


class Readiness:
    """The checks of one client.

    Args:
        config: The run's.
        client: Its number.
        state_dir: The node's folder: `cache` in it takes the synthetic images; an empty file in `had-room`: the disk had space for them.
        own_folder: The client's own images, or None.
        capability: full, rich or none; empty is full.
    """

    def __init__(
        self, config: RunConfig, client: int, *, state_dir: Path, own_folder: Path | None, capability: str = ""
    ) -> None:
        self._config, self._state_dir, self._capability = config, state_dir, capability
        decisive = {key: value for key, value in flatten(config).items() if key.startswith(_DECISIVE)}
        digest = hashlib.sha256(
            json.dumps([decisive, client, str(own_folder), capability], sort_keys=True).encode()
        ).hexdigest()
        self._mark = state_dir / "had-room" / digest

    def check(self, parts: DataParts, real: Examples) -> None:
        """Check the generator's files, and the disk's space for the fill.

        The space is that of N_k images, the most that a client can lack (rich ones: N_k of each class). Neither the answer nor
        the number tells what it does lack. It is asked for once: a disk that fills up later is an error of the image that it has no room for.

        Raises:
            GeneratorError: The generator is missing or does not fit.
            DataError: The disk has too little space.
        """
        b = self._config.balancing
        if not (b.enabled and b.filling) or self._capability == "none" or self._config.generator.name == OWN_IMAGES:
            return
        _check_generator_once(self._config, parts)
        cache = self._state_dir / "cache"
        if self._mark.exists() and cache.is_dir():
            return
        folder = next(path for path in (cache, *cache.parents) if path.exists())
        most = len(real) * (parts.info.num_classes if self._capability == "rich" else 1)
        needed, free = fill_bytes(most, real.images[0].numel() if most else 0), shutil.disk_usage(folder).free
        if free < needed:
            numbers = f"{needed / _MIB:.1f} MiB needed for {most} images, {free / _MIB:.1f} MiB free"
            raise DataError(
                f"state-dir: too little space on the disk of {folder}: {numbers}; free some, or set state-dir in the node config",
                public=f"its disk has too little space: {numbers}",
            )
        self._remember()

    def _remember(self) -> None:
        with contextlib.suppress(OSError):  # it only saves a check
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._mark, os.O_CREAT, 0o600))


def check_unchanged(note: Path, real: Examples, *, client: int, num_classes: int) -> None:
    """Compare a client's images with those that it had when it first took part in the run; note them if this is the first time.

    Args:
        note: A file in the client's folder of the run.
        real: The client's images.
        client: Its number.
        num_classes: Of the federation.

    Raises:
        StateError: The images are others. What is in the message stays on the client.
    """
    counts = real.counts(num_classes).tolist()
    now = {"images": len(real), "of each class": counts, "sha256": real.digest}
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
        note.parent.mkdir(parents=True, exist_ok=True)
        with replacing(note, part=note.with_name(f".{note.name}-{os.getpid()}-{threading.get_ident()}")) as part:
            part.write_text(json.dumps(now), encoding="utf-8")
        return
    except ValueError:
        before = {}
    if before != now:
        changes = [f"{name}: {before.get(name)} before, {now[name]} now" for name in now if before.get(name) != now[name]]
        raise StateError(
            f"client {client}: its images have changed since this run began ({'; '.join(changes)}). Restore them, or start a new run.",
            public="its images are not those with which it began this run",
        )


@functools.lru_cache(maxsize=1)  # an error is not kept; the clients of a simulation share one generator
def _check_generator_once(config: RunConfig, parts: DataParts) -> None:
    if problems := check_generator(config, parts):
        missing = config.generator.path and not generator_folder(config, parts).is_dir()
        public = "its generator cannot be used" + (": its folder is missing" if missing else "")
        raise GeneratorError("\n".join(problems), public=public)


def fill_bytes(num_images: int, pixels: int) -> int:
    """Return the bytes on disk of as many cached images of `pixels` values each, in whole blocks."""
    return num_images * -(-(pixels + _HEADER) // _BLOCK) * _BLOCK
