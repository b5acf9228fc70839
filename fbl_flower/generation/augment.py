"""Random deformations of a batch of images: every image its own, and no two alike."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fbl_flower.data.info import DataInfo
from fbl_flower.generation.recipe import Augmentation

_KNOTS = 5  # side of the coarse grid behind an elastic field


def deform(images: torch.Tensor, augmentation: Augmentation, *, flip: bool, stream: torch.Generator) -> torch.Tensor:
    """Rotate, scale, shear, shift and bend each image by amounts of its own.

    Args:
        images: float [N, C, H, W] in -1 .. 1. Beyond the edge an image repeats its edge.
        augmentation: The ranges.
        flip: Also mirror half of the images.
        stream: Source of every draw.

    Returns:
        float [N, C, H, W]; `images` up to rounding where every range is zero and `flip` is off.
    """
    num = len(images)

    def draw(limit: float, *shape: int) -> torch.Tensor:
        return (torch.rand(num, *shape, generator=stream) * 2 - 1) * limit

    angle = draw(augmentation.rotation * math.pi / 180)
    size, aspect = 1 + draw(augmentation.scale), 1 + draw(augmentation.scale / 2)
    shear, shift = draw(augmentation.shear), draw(augmentation.shift * 2, 2)  # coordinates run over -1 .. 1
    mirror = torch.where(torch.rand(num, generator=stream) < 0.5, -1.0, 1.0) if flip else torch.ones(num)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # maps a target position to its source: rotation, then shear and scale
    x_axis = torch.stack([cos * mirror, (shear * cos - sin)], dim=1) / (size * aspect)[:, None]
    y_axis = torch.stack([sin * mirror, (shear * sin + cos)], dim=1) * (aspect / size)[:, None]
    affine = torch.stack([x_axis, y_axis], dim=1)
    grid = F.affine_grid(torch.cat([affine, shift[:, :, None]], dim=2), list(images.shape), align_corners=False)
    if augmentation.elastic:
        knots = draw(augmentation.elastic * 2, 2, _KNOTS, _KNOTS)
        field = F.interpolate(knots, size=images.shape[-2:], mode="bicubic", align_corners=True)
        grid = grid + field.permute(0, 2, 3, 1)
    # bicubic, because bilinear would teach the generator blurred strokes
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(-1, 1)


def default_deformation(info: DataInfo) -> float:
    """Return by how much the ranges of the augmentation are multiplied: images that may be mirrored are photographs, which bend oddly."""
    return 0.0 if info.flip else 1.0
