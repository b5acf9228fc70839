"""Teach a trained network to bear 4-bit weights: it imitates itself while its weights are rounded.

Rounding alone costs a small network visible quality. Here the rounded network is the student, the float one the
teacher, and the gradient passes the rounding as if it were not there (straight-through; Bengio et al., arXiv 1308.3432).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fbl_flower.generation.quantization import dequantize_, quantize_

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def adapt_to_rounding(
    teacher: nn.Module,
    *,
    draw: Callable[[], Inputs],
    steps: int,
    learning_rate: float,
    progress: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Return a float network whose rounded twin does what `teacher` does; `teacher` is left as it is.

    Args:
        teacher: The trained float network.
        draw: Gives a batch of inputs: x_t float [N, C, H, W], time float [N] in 0 .. 1000, labels int64 [N].
        steps: Batches; 0 returns a plain copy.
        learning_rate: Of Adam, falling linearly to zero.
        progress: Is given the step and the mean squared difference of the outputs.
    """
    student = copy.deepcopy(teacher).requires_grad_(True)
    optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - (step - 1) / steps)
        x_t, t, labels = draw()
        with torch.no_grad():
            wanted = teacher(x_t, t, class_labels=labels).sample
        exact = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
        rounded = dict(dequantize_(quantize_(copy.deepcopy(student))).named_parameters())
        _overwrite(student, rounded)
        loss = F.mse_loss(student(x_t, t, class_labels=labels).sample, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        _overwrite(student, exact)  # the step starts from the exact weights, along the rounded ones' gradient
        optimizer.step()
        if progress:
            progress(step, loss.item())
    return student.eval().requires_grad_(False)


@torch.no_grad()
def _overwrite(module: nn.Module, values: dict[str, torch.Tensor] | dict[str, nn.Parameter]) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(values[name])
