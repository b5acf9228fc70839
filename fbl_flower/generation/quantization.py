"""Weights of 4 or 8 bits: quantise a network, store it, load it again bit for bit.

What 4 bits are for: the file, the download and the memory of a stored network shrink to about a sixth. They do not
make a CPU faster; quanto unpacks the weights in every forward pass. `dequantize_` therefore puts a float twin with
the same values in place of each quantised layer, once after loading.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fbl_flower.errors import GeneratorError

WEIGHTS = "quanto_model.safetensors"
LAYERS = "quanto_qmap.json"  # which layers are quantised, and how
BITS: Mapping[str, Literal["qint4", "qint8"]] = {"4bit": "qint4", "8bit": "qint8"}  # our names, and quanto's
_PART_OF_A_WEIGHT = re.compile(r"(?<=\.weight)\.(_data(\._data)?|_scale|_shift)$")  # quanto stores a weight in pieces
_WAY_OUT = "copy or make the generator again"


def quantize_(
    module: nn.Module,
    *,
    weights: Literal["qint4", "qint8"] = "qint4",
    exclude: Sequence[str] = ("conv_in", "conv_out"),
) -> nn.Module:
    """Quantise the weights of every linear and convolutional layer to 4 or 8 bits, in place.

    Args:
        module: In float; cast it before, never after.
        weights: quanto's name of the type.
        exclude: Layers that stay in float, as patterns over full names. The first and the last layer see pixels:
            quantising them costs more quality than all others together.
    """
    from optimum.quanto import freeze, quantize  # type: ignore[import-untyped]

    _work_without_compiler()
    quantize(module, weights=weights, exclude=list(exclude) or None)
    freeze(module)
    return module.eval().requires_grad_(False)


def save_quantized(module: nn.Module, folder: Path) -> None:
    """Write the weights and the list of quantised layers of `module` into `folder`, which exists."""
    from optimum.quanto import quantization_map
    from safetensors.torch import save_file

    # safetensors refuses tensors that share memory, and quanto's scales do
    state = {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / LAYERS).write_text(json.dumps(quantization_map(module)), encoding="utf-8")


def load_quantized(build: Callable[[], nn.Module], folder: Path, *, device: str = "cpu") -> nn.Module:
    """Load what `save_quantized` wrote.

    Args:
        build: Makes the float network; its weights are never allocated.
        folder: Holds both files.
        device: Where the weights go.

    Raises:
        GeneratorError: A file is missing or truncated, or belongs to another network.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from optimum.quanto import requantize
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _work_without_compiler()
    for name in (WEIGHTS, LAYERS):
        if not (folder / name).is_file():
            raise GeneratorError(f"generator: {folder / name} is missing; {_WAY_OUT}")
    try:
        state = load_file(folder / WEIGHTS, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise GeneratorError(f"generator: {folder / WEIGHTS} is damaged ({error}); {_WAY_OUT}") from error
    try:
        layers = json.loads((folder / LAYERS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise GeneratorError(f"generator: {folder / LAYERS} is damaged ({error}); {_WAY_OUT}") from error
    foreign = f"generator: {folder / WEIGHTS} does not fit the network beside it"
    try:
        with init_empty_weights(include_buffers=False):  # buffers that no file holds must be real
            module = build()
    except GeneratorError:
        raise
    except Exception as error:  # a library's own class, given a configuration that nobody has checked
        raise GeneratorError(
            f"{foreign}: that cannot be built ({type(error).__name__}: {_first_line(error)}); {_WAY_OUT}"
        ) from error
    floats = [tensor.dtype for name, tensor in state.items() if name.endswith("bias")]
    try:
        nn.Module.to(module, floats[0])  # what was not quantised keeps the type it was saved in; diffusers' own `to` warns
        requantize(module, state, layers, device=torch.device(device))
    except (RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise GeneratorError(f"{foreign} ({type(error).__name__}: {_first_line(error)}); {_WAY_OUT}") from error
    # quanto loads leniently: a file without some layers would leave random weights behind
    if difference := _names_that_differ(module, state):
        raise GeneratorError(f"{foreign} ({len(difference)} names differ, such as {min(difference)}); {_WAY_OUT}")
    return module.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _names_that_differ(module: nn.Module, state: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the tensors that a loaded network lacks in `state`, or has no place for.

    Its state_dict() would tell as well, but unpacks every weight: a minute for Stable Diffusion.
    """
    from optimum.quanto import QModuleMixin

    wanted, lacking = set(), set()
    for path, part in module.named_modules():
        buffers = part._buffers.keys() - part._non_persistent_buffers_set
        present = [name for name in [*part._parameters, *buffers] if getattr(part, name) is not None]
        wanted |= {f"{path}.{name}" if path else name for name in present}
        if isinstance(part, QModuleMixin) and part.weight_qtype is not None and not part.frozen:
            lacking.add(f"{path}.weight")  # a part of its weight was not there
    return lacking | (wanted ^ {_PART_OF_A_WEIGHT.sub("", name) for name in state})


def dequantize_(module: nn.Module) -> nn.Module:
    """Put a float layer with the same values in place of every quantised one: faster on a CPU, larger in memory."""
    from optimum.quanto import QConv2d, QLinear

    _work_without_compiler()
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            twin: nn.Module
            if isinstance(child, QConv2d):
                twin = nn.Conv2d(
                    child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding,
                    child.dilation, child.groups, child.bias is not None, child.padding_mode, device="meta",
                )  # fmt: skip
            elif isinstance(child, QLinear):
                twin = nn.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
            else:
                continue
            twin.weight = nn.Parameter(child.weight.dequantize(), requires_grad=False)
            if child.bias is not None:
                twin.bias = nn.Parameter(child.bias.detach(), requires_grad=False)
            setattr(parent, name, twin.train(child.training))
    return module


class _PythonKernels:
    """Stands in for quanto's C++ extension, which it would build with ninja and a compiler at first use."""

    @staticmethod
    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        """Undo quanto's packing: several rows of small numbers in one row of bytes."""
        if bits == 4:
            return torch.cat([packed & 0x0F, packed >> 4])
        return torch.cat([(packed >> shift) & 0x03 for shift in (0, 2, 4, 6)])


def _work_without_compiler() -> None:
    """Let quanto run on machines without a compiler; the numbers are the same.

    Reaches into a private name of quanto 0.2.7, its last release: elsewhere the compiler is simply needed.
    """
    try:
        from optimum.quanto.library.extensions.cpp import ext  # type: ignore[import-untyped]
    except ImportError:
        return
    if getattr(ext, "_lib", True) is None:
        ext._lib = _PythonKernels
