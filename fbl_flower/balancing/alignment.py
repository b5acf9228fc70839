"""Knowledge alignment and drop (Eq. 4): a learnable vector per class, between features and head, for synthetic images only."""

from __future__ import annotations

import torch


def alignment_offset(
    embeddings: torch.Tensor, labels: torch.Tensor, synthetic: torch.Tensor, *, drop: float, rng: torch.Generator
) -> torch.Tensor:
    """Return what is added to the features of a training batch: P_i for a synthetic image of class i, zero for a real one.

    Eq. 4: y = H(F(I) + P_i) for synthetic I; y = H(F(I)) for real I, and for every image at test time. With a linear head that is an
    offset of the logits chosen by the label, and P alone could fit the synthetic labels without teaching F anything. So knowledge drop
    takes P_i away from each synthetic image with probability `drop`, drawn for each image and step, without rescaling.

    Args:
        embeddings: float [C, D], the vectors P.
        labels: int64 [N].
        synthetic: bool [N].
        drop: p, 0 .. 1; 1 never uses P.
        rng: Generator of the drop, on the CPU.

    Returns:
        float [N, D].
    """
    stays = torch.rand(len(labels), generator=rng).to(labels.device) >= drop
    return embeddings[labels] * (synthetic & stays)[:, None]
