"""Where and in which precision to compute, and in what memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
from collections.abc import Iterator

import torch
from torch import nn

from fbl_flower.config import RunConfig
from fbl_flower.errors import ConfigError

_FEW_THREADS = 16  # allowed on any machine
_MOST_PER_CORE = 4  # threads; they wait for each other after every layer, and 256 of them on two cores hardly move
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def pick_device(config: RunConfig) -> torch.device:
    """Return the device of `device`: with auto, cuda where there is one.

    Raises:
        ConfigError: There is no such device, or so few cores that training with `num-threads` would hardly move.
    """
    cores = os.cpu_count() or 1
    if config.num_threads > max(_FEW_THREADS, _MOST_PER_CORE * cores):
        raise ConfigError(
            [f"num-threads: got {config.num_threads}; this machine has {cores} cores. Set at most {_MOST_PER_CORE} per core"]
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["device: got 'cuda'; this machine has none; allowed here: auto | cpu"])
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return the context of the forward pass for `train.precision`.

    Without bf16 instructions a CPU emulates them: 1.5 to 1.7 times slower than fp32 where it was measured. So "auto" asks the hardware.
    """
    if precision_on(device, precision) == "fp32":
        return contextlib.nullcontext()
    # No cache of cast weights: it is the process's own, and another thread that leaves its context empties it. A layer that is used twice
    # would then sum its gradients in bf16 or in fp32, by chance.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Keep a GPU's convolutions from rounding fp32 inputs to 10 bits (TF32), which is torch's default."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def precision_on(device: torch.device, precision: str) -> str:
    """Return what `train.precision` comes to on a device: fp32 or bf16."""
    return "fp32" if precision == "fp32" or (precision == "auto" and not _has_bf16(device)) else "bf16"


def memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Return the layout that is fastest for `model`: channels last, but not for GroupNorm on a CPU."""
    grouped = any(isinstance(m, nn.GroupNorm) for m in model.modules())
    return torch.contiguous_format if grouped and device.type == "cpu" else torch.channels_last


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees, up to 1 GiB, instead of returning it to the system each time.

    A training step frees and asks again for as much memory as its gradients need (45 MB for ResNet-18), and fresh memory costs a page
    fault for every 4 KiB: steps were 1.08 to 1.15 times as fast with it where that was measured. It is a setting of glibc; with another
    C library this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest value that glibc takes
    mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def return_freed_memory() -> None:
    """Give the memory that this process has freed back to the system: after loading a large model, most of what is held is unused.

    It is a call of glibc; with another C library only Python's own garbage is collected.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
