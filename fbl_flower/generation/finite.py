"""Refuse networks whose numbers are not finite."""

from __future__ import annotations

from torch import nn

from fbl_flower.errors import GeneratorError


def check_finite(network: nn.Module, what: str) -> None:
    """Raise `GeneratorError` if a parameter or buffer of `network` is not finite.

    Args:
        network: In float.
        what: What they are called in the error, such as "weights" or "average of the weights".
    """
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise GeneratorError(f"generator: {what}: {name} is not finite. The training has diverged. Lower --learning-rate.")
