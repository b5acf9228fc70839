"""Layers of torch that are computed faster where small images are classified on a CPU: the same functions, with other rounding.

Convolutions of maps of a few pixels, where small images end in a deep network: a padded 3x3 window multiplies mostly padding there. Of a
map of one pixel it needs one of its nine weights, of 2x2 pixels four. So the taps of the kernel are taken one by one, each only where it meets
the map, as products of matrices. On a GPU, where the libraries' own convolutions are better, those are used. In bf16 there is one more reason: torch's
own gradient of a padded convolution with a stride, of a map of one pixel, was seen to read memory that nobody wrote.

Pooling: torch's own is several times slower in the layout that GroupNorm wants.

Training steps of ResNet-18 with the ImageNet stem took 0.83 of the time with these in fp32, and 0.73 with the convolutions in bf16, for 64 images
of 32 px on one core (of a CPU without and one with bf16 instructions).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_LARGEST = 4  # pixels of an output for which this was faster


class SmallMapConv2d(nn.Conv2d):
    """A convolution that is computed tap by tap where its output has at most 2x2 pixels, on a CPU; under autocast in its precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = (
            (x.shape[2 + axis] + 2 * int(self.padding[axis]) - self.kernel_size[axis]) // self.stride[axis] + 1
            for axis in (0, 1)
        )
        if height * width > _LARGEST or x.device.type != "cpu":
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        y: torch.Tensor = _TapByTap.apply(x.to(dtype), self.weight, self.stride, self.padding, (height, width))
        return y


class FastMaxPool2d(nn.MaxPool2d):
    """A pooling that is computed in torch's fast layout for it on a CPU, channels last; the output has the layout of the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        y = super().forward(x.contiguous(memory_format=torch.channels_last))
        return y.contiguous() if x.is_contiguous() else y


def use_cpu_layers(module: nn.Module) -> None:
    """Turn the layers in `module` that can be into those of here, in place."""
    for child in module.modules():
        if type(child) is nn.MaxPool2d:
            child.__class__ = FastMaxPool2d
        if type(child) is nn.Conv2d and child.bias is None and child.dilation == (1, 1) and child.groups == 1:
            half_windows = [size // 2 for size in child.kernel_size]
            # With more padding, an output may meet no pixel at all.
            child.__class__ = SmallMapConv2d if _at_most(child.padding, half_windows) else nn.Conv2d


def _at_most(paddings: Any, limits: list[int]) -> bool:
    return all(int(padding) <= limit for padding, limit in zip(paddings, limits, strict=True))


def _meeting(size: int, out: int, kernel: int, stride: int, padding: int) -> list[tuple[int, slice, slice]]:
    """Return, along one axis, each tap that meets the map, with the outputs where it does and the inputs that it meets there."""
    found = []
    for tap in range(kernel):
        first = max(0, -((tap - padding) // stride))
        last = min(out - 1, (size - 1 + padding - tap) // stride)
        if first <= last:
            start = first * stride + tap - padding
            found.append((tap, slice(first, last + 1), slice(start, start + (last - first) * stride + 1, stride)))
    return found


class _TapByTap(torch.autograd.Function):
    """y[place of output] = sum over the taps of W[tap] x[place that the tap meets]; maps as [H, W, N, C], a pixel being a matrix.

    Products are in the precision of x, sums over taps in at least 32 bits.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, stride: Any, padding: Any, out: tuple[int, int]
    ) -> torch.Tensor:
        x = x.permute(2, 3, 0, 1).contiguous()
        rows, columns = (
            _meeting(x.shape[axis], out[axis], weight.shape[2 + axis], stride[axis], padding[axis]) for axis in (0, 1)
        )
        ctx.places = [((oy, ox), (iy, ix)) for _, oy, iy in rows for _, ox, ix in columns]
        ctx.window = tuple(slice(taps[0][0], taps[-1][0] + 1) for taps in (rows, columns))  # the taps that meet the map at all
        taps = weight.permute(2, 3, 0, 1)[ctx.window].to(x.dtype).contiguous().flatten(0, 1)
        ctx.save_for_backward(x, weight, taps)
        y = x.new_zeros(*out, x.shape[2], len(weight), dtype=_sums_in(x))
        for tap, (there, here) in zip(taps, ctx.places, strict=True):
            y[there] += x[here] @ tap.T
        return y.to(x.dtype).permute(2, 3, 0, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, taps = ctx.saved_tensors
        grad_y = grad_outputs[0].permute(2, 3, 0, 1).contiguous()
        grad_x, grad_weight, grad_taps = (
            torch.zeros_like(x, dtype=_sums_in(x)),
            torch.zeros_like(weight),
            torch.empty_like(taps),
        )
        for tap, grad_tap, (there, here) in zip(taps, grad_taps, ctx.places, strict=True):
            g = grad_y[there]
            grad_x[here] += g @ tap
            torch.mm(g.flatten(0, 2).T, x[here].flatten(0, 2), out=grad_tap)
        window = grad_weight.permute(2, 3, 0, 1)[ctx.window]
        window.copy_(grad_taps.view_as(window))
        return grad_x.to(x.dtype).permute(2, 3, 0, 1), grad_weight, None, None, None


def _sums_in(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
