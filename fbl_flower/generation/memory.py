"""How many images fit into memory together."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch
from torch import nn

from fbl_flower.free_memory import free_bytes as free_bytes
from fbl_flower.free_memory import is_out_of_memory as is_out_of_memory

_SHARE = 0.5  # of the free memory that images under way may take
_log = logging.getLogger("fbl_flower.generation")  # not Flower's logger, whose lines may reach the server


def _free_on(device: torch.device) -> int | None:
    """Return the bytes that may still be taken where the images are made."""
    if device.type != "cuda":
        return free_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@torch.no_grad()
def activation_bytes(network: nn.Module, evaluate: Callable[[], object]) -> int:
    """Return the size of everything that the layers of `network` put out during `evaluate()`: more than is ever held at once."""
    total = 0

    def count(_: nn.Module, __: object, output: object) -> None:
        nonlocal total
        if isinstance(output, torch.Tensor):
            total += output.numel() * output.element_size()

    leaves = [module for module in network.modules() if next(module.children(), None) is None]
    hooks = [leaf.register_forward_hook(count) for leaf in leaves]
    try:
        evaluate()
    finally:
        for hook in hooks:
            hook.remove()
    return total


def fitting_batch(asked: int, *, bytes_per_image: Callable[[], int], limit_mb: int, device: torch.device) -> int:
    """Return how many images to make together: `asked`, or as many as fit.

    Args:
        asked: At most so many.
        bytes_per_image: Measures what one image under way takes at most; not asked where one image is all that is wanted.
        limit_mb: MiB for the images under way; 0: half of the free memory, where that can be told.
        device: Whose memory it is.
    """
    if asked == 1:
        return 1
    free = None if limit_mb else _free_on(device)
    budget = limit_mb * 2**20 if limit_mb else None if free is None else int(_SHARE * free)
    if budget is None:
        return asked
    fitting = max(1, min(asked, budget // max(1, bytes_per_image())))
    if fitting < asked:
        _log.warning("generator: %d images together instead of %d, for the memory at hand", fitting, asked)
    return fitting


class Batches:
    """Cuts work into batches, and into smaller ones from the moment that memory runs out.

    Args:
        size: Finds how many images are made together at first. Asked when there is work: it may take seconds, and a start that finds
            all its images on disk needs none.

    Attributes:
        size: Images made together; 0 until there was work.
    """

    def __init__(self, size: Callable[[], int]) -> None:
        self.size = 0
        self._find_size = size
        self._finding = threading.Lock()  # threads may share a generator, and would count each other's activations

    def now(self) -> int:
        """Return how many images are made together, now that there is work."""
        with self._finding:
            self.size = self.size or self._find_size()
        return self.size

    def run(self, num: int, make: Callable[[int, int], None]) -> None:
        """Call `make(start, stop)` for every batch of `num` images; one that runs out of memory is made again in halves.

        Raises:
            Exception: As `make` does, also if memory runs out with a single image.
        """
        if num:
            self.now()
        start = 0
        while start < num:
            stop = min(start + self.size, num)
            try:
                make(start, stop)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or stop - start == 1:
                    raise
                self.size = min(self.size, (stop - start + 1) // 2)  # another thread may have made it smaller meanwhile
                _log.warning("generator: out of memory; %d images together from now on", self.size)
                continue
            start = stop
