"""What a client remembers of its balancing from round to round, and where it keeps it."""

from __future__ import annotations

import math
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fbl_flower.errors import StateError

_NAME = re.compile(r"round-(\d{6})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class BalancingState:
    """A client's memory. It never leaves the client.

    Attributes:
        kept: bool [N], the real images that sampling keeps until the next choice.
        chosen_in: Server round of that choice.
        embeddings: float [C, D], the alignment vectors P.
        synthetic_accuracy: Of the last round, the share of synthetic images classified rightly without P; NaN if not measured.
        aligned_accuracy: The same with P.
        kept_fill: bool [M], the synthetic images that the filter lets pass until the next choice; None: all of them.
    """

    kept: torch.Tensor
    chosen_in: int
    embeddings: torch.Tensor
    synthetic_accuracy: float = float("nan")
    aligned_accuracy: float = float("nan")
    kept_fill: torch.Tensor | None = None

    def alignment_row(self) -> dict[str, list[float] | float | None]:
        """Say how large P is and how well synthetic images are classified without and with it, as JSON can hold it."""
        without, aligned = self.synthetic_accuracy, self.aligned_accuracy
        return {
            "norm_of_P": self.embeddings.norm(dim=1).tolist(),
            "synthetic_accuracy_without_P": None if math.isnan(without) else without,
            "synthetic_accuracy_with_P": None if math.isnan(aligned) else aligned,
        }


class StateStore:
    """A client's memory on its disk, one file for each round in which it trained.

    A killed run goes on from the server's last checkpoint, which may be older than what clients remember. So a
    client keeps what it knew at that checkpoint and since, and goes back when it is asked to train an earlier round again.

    Args:
        folder: The client's own, for this run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, *, before_round: int) -> BalancingState | None:
        """Return the newest state of a round before `before_round` and forget later ones; None if there is none.

        Raises:
            StateError: The file is damaged.
        """
        rounds = self._rounds()
        for later in [r for r in rounds if r >= before_round]:
            self._path(later).unlink(missing_ok=True)
        earlier = [r for r in rounds if r < before_round]
        return self._read(self._path(earlier[-1])) if earlier else None

    def newest(self) -> BalancingState | None:
        """Return the state of the last round in which the client trained."""
        rounds = self._rounds()
        return self._read(self._path(rounds[-1])) if rounds else None

    def save(self, state: BalancingState, *, server_round: int, checkpoint_round: int) -> None:
        """Store the state after `server_round`, whole or not at all.

        Args:
            state: What to remember.
            server_round: The round that it is the result of.
            checkpoint_round: The server's last checkpoint: states that no resumed run can ask for again are deleted.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {"kept": state.kept, "embeddings": state.embeddings.contiguous()}
        if state.kept_fill is not None:
            tensors["kept_fill"] = state.kept_fill
        numbers = {
            "chosen_in": str(state.chosen_in),
            "synthetic_accuracy": repr(state.synthetic_accuracy),
            "aligned_accuracy": repr(state.aligned_accuracy),
        }
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".")
        with os.fdopen(handle, "wb") as stream:
            stream.write(save(tensors, metadata=numbers))
        os.replace(temporary, self._path(server_round))
        for old in [r for r in self._rounds() if r <= checkpoint_round][:-1]:  # but for the newest of them
            self._path(old).unlink(missing_ok=True)

    def _rounds(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for name in os.listdir(self.folder) if (m := _NAME.fullmatch(name)))

    def _path(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round:06d}.safetensors"

    def _read(self, path: Path) -> BalancingState:
        try:
            with safe_open(path, "pt") as file:
                numbers = file.metadata()
                return BalancingState(
                    kept=file.get_tensor("kept"),
                    chosen_in=int(numbers["chosen_in"]),
                    embeddings=file.get_tensor("embeddings"),
                    synthetic_accuracy=float(numbers["synthetic_accuracy"]),
                    aligned_accuracy=float(numbers["aligned_accuracy"]),
                    kept_fill=file.get_tensor("kept_fill") if "kept_fill" in file.keys() else None,  # noqa: SIM118
                )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"{path} is damaged ({error}); delete the folder to let this client start afresh",
                public="the client's state on disk is damaged",
            ) from error
