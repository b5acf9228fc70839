"""Write the folder of a trained generator, with weights of 4 or 8 bits or in float."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from fbl_flower.errors import GeneratorError
from fbl_flower.generation.finite import check_finite
from fbl_flower.generation.network import build_network, read_network_config
from fbl_flower.generation.new_folder import new_folder
from fbl_flower.generation.quantization import BITS, LAYERS, WEIGHTS, load_quantized, quantize_, save_quantized
from fbl_flower.generation.recipe import NETWORK, GeneratorInfo, check_files, file_sha256, read_info, write_info


def write_generator(network: nn.Module, info: GeneratorInfo, *, out: Path, weights: str) -> GeneratorInfo:
    """Write a network and its recipe as the folder `out`, whole or not at all.

    Args:
        network: In float; quantised in place.
        info: What is known of it; `weights` and `files` are filled in here.
        out: Must not exist; its parents are made.
        weights: 4bit, 8bit or none.

    Returns:
        What was written to `recipe.json`.

    Raises:
        GeneratorError: A weight is not finite, or the folder cannot be written.
    """
    check_finite(network, "weights")
    with new_folder(out) as folder:
        network.save_config(folder)  # type: ignore[operator]  # diffusers' own
        save_quantized(quantize_(network, weights=BITS[weights]) if weights in BITS else network, folder)
        info = replace(info, weights=weights, files={name: file_sha256(folder / name) for name in (NETWORK, WEIGHTS, LAYERS)})
        write_info(folder, info)
    return info


def quantize_generator(source: Path, out: Path, *, weights: str) -> GeneratorInfo:
    """Write the generator of `source`, whose weights are floats, with others into `out`.

    Args:
        source: A folder that was trained with weights "none".
        out: The folder to make. It appears whole or not at all.
        weights: 4bit, 8bit or none.

    Raises:
        GeneratorError: `out` is there already; `source` is missing, damaged, or quantised already.
    """
    if out.exists():
        raise GeneratorError(f"quantize: {out} is there already; remove it, or choose another folder")
    info = read_info(source)
    if info.weights != "none":
        raise GeneratorError(
            f"quantize: {source} has weights of {info.weights} already; wanted floats, as `fbl-flower generator train --weights none` writes"
        )
    if problems := check_files(source, info):
        raise GeneratorError("\n".join(problems))
    config = read_network_config(source)
    return write_generator(load_quantized(lambda: build_network(config), source), info, out=out, weights=weights)
