"""A generator's training on disk, so that it can be done in pieces."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fbl_flower.claim import Claim
from fbl_flower.errors import GeneratorError, StateError
from fbl_flower.generation.recipe import TrainingRecipe
from fbl_flower.whole_file import replacing


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a training took so far, over all its pieces.

    Attributes:
        wall, cpu: Seconds on the clock, and of the processor.
        devices: Where it ran, such as "cpu", in alphabetical order.
        compiled: Whether torch had compiled the network, in any piece.
        threads: Numbers of torch's threads, ascending.
    """

    wall: float = 0.0
    cpu: float = 0.0
    devices: tuple[str, ...] = ()
    compiled: bool = False
    threads: tuple[int, ...] = ()

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            wall=self.wall + other.wall,
            cpu=self.cpu + other.cpu,
            devices=tuple(sorted({*self.devices, *other.devices})),
            compiled=self.compiled or other.compiled,
            threads=tuple(sorted({*self.threads, *other.threads})),
        )


@dataclass(frozen=True, kw_only=True)
class SavedTraining:
    """What a checkpoint holds: tensors by name, steps, the losses of the last ones, and what they took."""

    tensors: dict[str, torch.Tensor]
    steps_done: int
    losses: list[float]
    spent: Spent


class TrainingCheckpoint:
    """The last checkpoint of one training.

    Args:
        folder: Where it lies, beside a preview; made when there is something to write.
        recipe, public_sha256: Of the training: a checkpoint of another one is refused.
    """

    def __init__(self, folder: Path, *, recipe: TrainingRecipe, public_sha256: str) -> None:
        self.folder = folder
        self.file = folder / "checkpoint.safetensors"
        self._identity = {"recipe": json.dumps(dataclasses.asdict(recipe)), "public_sha256": public_sha256}

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from this training meanwhile.

        Raises:
            GeneratorError: Another one works on it, or the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            claim = Claim(self.folder, patience=0.0)
        except StateError as error:
            raise GeneratorError(f"generator: {error}, or choose another folder for yours (--out)") from error
        except OSError as error:
            raise GeneratorError(f"generator: {self.folder} cannot be made ({error}); mend its permissions") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # there is a checkpoint in it, or it is gone
                self.folder.rmdir()
            claim.release()

    def write(self, tensors: Mapping[str, torch.Tensor], *, steps_done: int, losses: Sequence[float], spent: Spent) -> None:
        """Replace the checkpoint, whole or not at all.

        Raises:
            GeneratorError: The disk is full, or may not be written.
        """
        numbers = {
            "steps_done": str(steps_done),
            "losses": json.dumps(list(losses)),
            "spent": json.dumps(dataclasses.asdict(spent)),
        }
        # two names for the same memory are refused: the copies make each its own
        copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.file, sync=True) as part:  # it is the only one
                save_file(copies, part, {**self._identity, **numbers})
        except (OSError, SafetensorError) as error:
            raise GeneratorError(
                f"generator: {self.file} cannot be written ({error}); free space or mend its permissions, and give the same command again"
            ) from error

    def read(self) -> SavedTraining | None:
        """Return the checkpoint, or None where there is none.

        Raises:
            GeneratorError: It is damaged, or of a training with another recipe or other images.
        """
        if not self.file.exists():
            return None
        way_out = f"remove {self.folder} to start afresh"
        try:
            with safe_open(self.file, "pt") as file:
                numbers = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping, only like one
            saved = SavedTraining(
                tensors=tensors,
                steps_done=int(numbers["steps_done"]),
                losses=json.loads(numbers["losses"]),
                spent=Spent() + Spent(**json.loads(numbers["spent"])),
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise GeneratorError(f"generator: {self.file} is damaged ({error}); {way_out}") from error
        differing = [name for name, value in self._identity.items() if numbers.get(name) != value]
        if differing:
            what = "other public images" if "public_sha256" in differing else "another recipe"
            raise GeneratorError(
                f"generator: {self.file} belongs to a training with {what}; {way_out}, or choose another --out"
            )
        return saved

    def remove(self) -> None:
        """Delete the folder of the training."""
        shutil.rmtree(self.folder, ignore_errors=True)
