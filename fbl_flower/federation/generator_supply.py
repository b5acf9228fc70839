"""The generator of a run as server and clients share it: which one it is, and the files of a federated one on their way."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fbl_flower.claim import Claim
from fbl_flower.config import FEDERATED, RunConfig
from fbl_flower.errors import GeneratorError, StateError
from fbl_flower.generation.loading import kind_of
from fbl_flower.generation.new_folder import new_folder
from fbl_flower.generation.recipe import RECIPE, check_files, file_sha256, read_info

_MOST_FILES, _MOST_BYTES = 8, 256 * 2**20
_PATIENCE = 60.0  # seconds that another process may take to store the same files
LOST = "it does not have the federation's generator; it gets it with the next request"


class GeneratorSupply:
    """The server's side.

    Args:
        name: `generator.name`, settled.
        folder: Of a federated generator that is finished; None for others.
    """

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self._name = name
        self._files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())} if folder else {}
        self._identity = files_identity(self._files) if self._files else ""
        self._delivered: set[int] = set()

    def for_client(self, client: int) -> dict[str, Any]:
        """Return what a client's request says of the generator: the files only where the client may not have them."""
        files = self._files if client not in self._delivered else {}
        return {"generator": self._name, "generator_id": self._identity, "generator_files": files}

    def delivered(self, clients: Iterable[int]) -> None:
        """Note that these clients have the files: their requests succeeded."""
        self._delivered |= set(clients)

    def lost(self, clients: Iterable[int]) -> None:
        """Note that these clients may not have them: their requests failed, for whatever reason."""
        self._delivered -= set(clients)


def files_identity(files: Mapping[str, bytes]) -> str:
    """Return a hash of the recipe, which holds the sums of the other files."""
    return hashlib.sha256(files.get(RECIPE, b"")).hexdigest()


def with_generator(
    config: RunConfig, *, name: str, identity: str, files: Mapping[str, bytes], folder: Path, own_path: bool
) -> RunConfig:
    """Return a client's configuration with the generator that the server has settled on, whose files are stored if they came along.

    Args:
        config: The client's.
        name: As the server settled it; empty where nobody generates.
        identity: Of a federated one, `files_identity`.
        files: By name; empty where the client has them.
        folder: Where the client keeps them.
        own_path: The node names a generator of its own, which goes before.

    Raises:
        GeneratorError: The files are not those of a generator.
        StateError: They are not here, and did not come along.
    """
    chosen = config.generator
    if own_path:
        return replace(config, generator=replace(chosen, name=kind_of(Path(chosen.path).expanduser())))
    if name != FEDERATED:
        return replace(config, generator=replace(chosen, name=name)) if name else config
    if files:
        _store(files, identity, folder)
    if not (folder / RECIPE).is_file() or file_sha256(folder / RECIPE) != identity:
        raise StateError(f"generator: {folder} does not hold the federation's generator", public=LOST)
    return replace(config, generator=replace(chosen, name=FEDERATED, path=str(folder)))


def _store(files: Mapping[str, bytes], identity: str, folder: Path) -> None:
    names = all(name == Path(name).name and not name.startswith(".") for name in files)
    size = sum(map(len, files.values()))
    if not names or len(files) > _MOST_FILES or size > _MOST_BYTES or files_identity(files) != identity:
        text = f"the generator that the server sent cannot be used: {len(files)} files of {size} bytes"
        raise GeneratorError(text, public=text)
    folder.parent.mkdir(parents=True, exist_ok=True)
    claim = Claim(folder.parent, patience=_PATIENCE)  # in a simulation all clients share the folder
    try:
        if (folder / RECIPE).is_file() and (folder / RECIPE).read_bytes() == files[RECIPE]:
            return
        shutil.rmtree(folder, ignore_errors=True)
        with new_folder(folder) as part:
            for name, content in files.items():
                (part / name).write_bytes(content)
            if problems := check_files(part, read_info(part)):
                raise GeneratorError("; ".join(problems), public="the generator that the server sent is damaged")
    finally:
        claim.release()
