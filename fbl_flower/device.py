"""Where and in which precision to compute."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from fbl_flower.config import RunConfig
from fbl_flower.errors import ConfigError


def pick_device(config: RunConfig) -> torch.device:
    """Return the device of `device`: with auto, cuda where there is one."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["device: got 'cuda'; this machine has none; allowed here: auto | cpu"])
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return the context of the forward pass for `train.precision`.

    Without bf16 instructions a CPU emulates them: 1.5 to 1.7 times slower than fp32 where it was measured. So "auto" asks the hardware.
    """
    if precision == "fp32" or (precision == "auto" and not _has_bf16(device)):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Return the layout that is fastest for `model`: channels last, but not for GroupNorm on a CPU."""
    grouped = any(isinstance(m, nn.GroupNorm) for m in model.modules())
    return torch.contiguous_format if grouped and device.type == "cpu" else torch.channels_last


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
