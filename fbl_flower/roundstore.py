"""What a client remembers, on its disk, one file for each round in which it trained."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fbl_flower.errors import StateError
from fbl_flower.whole_file import replacing

_NAME = re.compile(r"round-(\d{6})\.safetensors(\..+)?")  # with an ending as long as it is not whole
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one file holds: tensors by name, and short texts by name."""

    tensors: dict[str, torch.Tensor]
    texts: dict[str, str] = field(default_factory=dict)


class RoundStore(Generic[T]):
    """A client's memory of one kind.

    A killed run goes on from the server's last checkpoint, which may be older than what clients remember. So a
    client keeps what it knew at that checkpoint and since, and goes back when it is asked to train an earlier round again.

    Args:
        folder: The client's own, for this run and this kind.
        pack: From a state to what is stored.
        unpack: Back again; a KeyError, TypeError or ValueError says that the file is damaged.
    """

    def __init__(self, folder: Path, *, pack: Callable[[T], Record], unpack: Callable[[Record], T]) -> None:
        self.folder = folder
        self._pack, self._unpack = pack, unpack

    def load(self, *, before_round: int) -> T | None:
        """Return the newest state of a round before `before_round` and forget later ones; None if there is none.

        Raises:
            StateError: The file is damaged.
        """
        rounds, _ = self._files()
        for later in [r for r in rounds if r >= before_round]:
            os.unlink(self._path(later))
        earlier = [r for r in rounds if r < before_round]
        return self._read(self._path(earlier[-1])) if earlier else None

    def newest(self) -> T | None:
        """Return the state of the last round in which the client trained."""
        rounds, _ = self._files()
        return self._read(self._path(rounds[-1])) if rounds else None

    def save(self, state: T, *, server_round: int, checkpoint_round: int) -> None:
        """Store the state after `server_round`, whole or not at all, and remove what a killed process left of this round or earlier ones.

        Args:
            state: What to remember.
            server_round: The round that it is the result of.
            checkpoint_round: The server's last checkpoint: states that no resumed run can ask for again are deleted.
        """
        record = self._pack(state)
        data = save({name: tensor.contiguous() for name, tensor in record.tensors.items()}, metadata=record.texts)
        path = self._path(server_round)
        rounds, unfinished = self._files()
        if not rounds:
            self.folder.mkdir(parents=True, exist_ok=True)
        for name in [name for r, name in unfinished if r <= server_round]:  # later ones may be another process's, at work
            _remove(f"{self.folder}/{name}")
        with replacing(Path(path), part=Path(f"{path}.{os.getpid()}-{threading.get_ident()}")) as part:
            part.write_bytes(data)
        for old in [r for r in sorted({*rounds, server_round}) if r <= checkpoint_round][:-1]:  # but for the newest of them
            os.unlink(self._path(old))

    def _files(self) -> tuple[list[int], list[tuple[int, str]]]:
        """Return the rounds that are stored, in order, and round and name of files that are not whole."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return [], []
        found = [(int(m[1]), m[2], name) for name in names if (m := _NAME.fullmatch(name))]
        return sorted(r for r, ending, _ in found if not ending), [(r, name) for r, ending, name in found if ending]

    def _path(self, server_round: int) -> str:
        return f"{self.folder}/round-{server_round:06d}.safetensors"

    def _read(self, path: str) -> T:
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
                return self._unpack(Record(tensors=tensors, texts=file.metadata() or {}))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"{path} is damaged ({error}); delete the folder to let this client start afresh",
                public="the client's state on disk is damaged",
            ) from error


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
