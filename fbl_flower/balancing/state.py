"""What a client remembers of its balancing from round to round, and where it keeps it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from fbl_flower.roundstore import Record, RoundStore


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
        generator: Fingerprint of what made the client's synthetic images in its last round; empty where it had none.
    """

    kept: torch.Tensor
    chosen_in: int
    embeddings: torch.Tensor
    synthetic_accuracy: float = float("nan")
    aligned_accuracy: float = float("nan")
    kept_fill: torch.Tensor | None = None
    generator: str = ""

    def alignment_row(self) -> dict[str, list[float] | float | None]:
        """Say how large P is and how well synthetic images are classified without and with it, as JSON can hold it."""
        without, aligned = self.synthetic_accuracy, self.aligned_accuracy
        return {
            "norm_of_P": self.embeddings.double().norm(dim=1).tolist(),
            "synthetic_accuracy_without_P": None if math.isnan(without) else without,
            "synthetic_accuracy_with_P": None if math.isnan(aligned) else aligned,
        }


class StateStore(RoundStore[BalancingState]):
    """A client's memory of its balancing, on its disk.

    Args:
        folder: The client's own, for this run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, pack=_pack, unpack=_unpack)


def _pack(state: BalancingState) -> Record:
    passed = {} if state.kept_fill is None else {"kept_fill": state.kept_fill}
    return Record(
        tensors={"kept": state.kept, "embeddings": state.embeddings} | passed,
        texts={
            "chosen_in": str(state.chosen_in),
            "synthetic_accuracy": repr(state.synthetic_accuracy),
            "aligned_accuracy": repr(state.aligned_accuracy),
            "generator": state.generator,
        },
    )


def _unpack(record: Record) -> BalancingState:
    return BalancingState(
        kept=record.tensors["kept"],
        chosen_in=int(record.texts["chosen_in"]),
        embeddings=record.tensors["embeddings"],
        synthetic_accuracy=float(record.texts["synthetic_accuracy"]),
        aligned_accuracy=float(record.texts["aligned_accuracy"]),
        kept_fill=record.tensors.get("kept_fill"),
        generator=record.texts.get("generator", ""),
    )
