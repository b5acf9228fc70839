"""The network: diffusers' UNet2DModel on pixels folded into channels, conditioned on a class and a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fbl_flower.errors import GeneratorError
from fbl_flower.generation.recipe import NETWORK
from fbl_flower.seeding import torch_stream

_GROUPS = 16  # of every group normalisation
_HEAD = 32  # channels per attention head


def patch_of(image_size: int) -> int:
    """Return the side of the squares of pixels that become channels: 2, or 1 where the size is odd.

    Folding 2 x 2 pixels quarters the cost of an image and hardly changes its quality.
    """
    return 2 if image_size % 2 == 0 else 1


def network_config(*, image_size: int, channels: int, num_classes: int, widths: tuple[int, ...]) -> dict[str, Any]:
    """Return the arguments of UNet2DModel; the last resolution has attention, the class after the last means none.

    Raises:
        GeneratorError: The image cannot be halved once for each resolution.
    """
    patch = patch_of(image_size)
    side, depth = image_size // patch, len(widths)
    if side % 2 ** (depth - 1):
        raise GeneratorError(
            f"recipe of a generator: {depth} widths halve {side} x {side} positions {depth - 1} times, which does not come "
            f"out even for images of {image_size} pixels; use fewer widths"
        )
    plain = depth - 1
    return {
        "sample_size": side,
        "in_channels": channels * patch**2,
        "out_channels": channels * patch**2,
        "layers_per_block": 1,
        "block_out_channels": list(widths),
        "norm_num_groups": _GROUPS,
        "attention_head_dim": _HEAD,
        "down_block_types": ["DownBlock2D"] * plain + ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * plain,
        "num_class_embeds": num_classes + 1,
    }


def build_network(config: dict[str, Any]) -> nn.Module:
    """Build the network with weights from torch's global generator; fork it around this call."""
    from diffusers import UNet2DModel

    network: nn.Module = UNet2DModel.from_config(config)
    return network


def new_network(config: dict[str, Any], *, seed: int) -> nn.Module:
    """Build the network with the first weights that follow from the seed; its first guess is no velocity at all."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch_stream(seed, "generator", "weights").get_state())
        network = build_network(config)
    for parameter in network.get_submodule("conv_out").parameters():
        nn.init.zeros_(parameter)
    return network


def read_network_config(folder: Path) -> dict[str, Any]:
    """Read the network's arguments from a generator's folder.

    Raises:
        GeneratorError: The file is missing or is no JSON object.
    """
    file = folder / NETWORK
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("no JSON object")
    except (OSError, ValueError, TypeError) as error:
        raise GeneratorError(f"generator: {file} cannot be read ({error}); copy or train the generator again") from error
    return config
