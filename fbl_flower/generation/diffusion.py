"""The class-conditional generator: noise, a few steps of a flow along the network's velocity, an image."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fbl_flower.device import keep_freed_memory
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.memory import Batches, activation_bytes, fitting_batch
from fbl_flower.generation.network import build_network, patch_of, read_network_config
from fbl_flower.generation.protocol import check_request
from fbl_flower.generation.quantization import dequantize_, load_quantized
from fbl_flower.generation.recipe import GeneratorInfo, check_files, read_info
from fbl_flower.seeding import NOISE, torch_generator

_LOADING = threading.Lock()  # accelerate patches nn.Module while a network is laid out: one at a time
# second order and multistep: four to eight evaluations of the network suffice (Lu et al., arXiv 2211.01095)
_SCHEDULER: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}


class DiffusionGenerator:
    """Made by `DiffusionGenerator.load`.

    The network itself is loaded when the first image is made: who finds all images on disk, as a client of a deployment does in a
    new process for every round, only needs the fingerprint, and diffusers alone takes seconds to import.

    The network always runs on whole batches, because the shape of a batch changes the rounding of its images: a short
    last batch is filled up, and what was filled in is thrown away.

    Attributes:
        info: The contents of the folder's `recipe.json`.
        fingerprint, batch_size: As `ImageGenerator` has them.
    """

    def __init__(
        self,
        load_network: Callable[[], nn.Module],
        info: GeneratorInfo,
        *,
        steps: int,
        guidance: float,
        batch_size: int,
        memory_limit: int = 0,
        device: str,
    ) -> None:
        self.info = info
        self._load_network = load_network
        self._loaded: nn.Module | None = None
        self._steps = steps
        self._guidance = guidance
        self._device = torch.device(device)
        self._batches = Batches(
            lambda: fitting_batch(batch_size, bytes_per_image=self._bytes_per_image, limit_mb=memory_limit, device=self._device)
        )
        decisive = {
            "files": dict(sorted(info.files.items())),
            "noise": NOISE,
            "scheduler": ["DPMSolverMultistep", _SCHEDULER],
            "steps": steps,
            "guidance": float(guidance),
            "batch_size": batch_size,
            "device": self._device.type,
            "threads": torch.get_num_threads(),  # rounding, and so pixels, may differ with these three
            "versions": [torch.__version__, importlib.metadata.version("diffusers")],
        }
        self.fingerprint = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(
        cls, folder: Path, *, steps: int, guidance: float, batch_size: int, memory_limit: int = 0, device: str = "cpu"
    ) -> DiffusionGenerator:
        """Load a generator's folder, with every file's sum verified.

        Args:
            folder: As `train_generator` writes it.
            steps: Evaluations of the network per image, >= 1.
            guidance: Of classifier-free guidance, >= 1; above 1 costs a second evaluation per step, makes images more
                typical of their class and less diverse.
            batch_size: Images made together, >= 1.
            memory_limit: MiB for the images that are made together; 0: half of the free memory. Where `batch_size` of them do not fit,
                fewer are made together, and some of their pixels differ by a grey level.
            device: Where the network runs.

        Raises:
            GeneratorError: A file is missing, damaged or foreign. (Whole files of a network that does not fit them: with the first image.)
        """
        if steps < 1 or guidance < 1 or batch_size < 1:
            raise GeneratorError(
                f"generator.steps, generator.guidance, generator.batch-size: got {steps}, {guidance}, {batch_size}; "
                "wanted 1 or more of each"
            )
        keep_freed_memory()
        info = read_info(folder)
        if problems := check_files(folder, info):
            raise GeneratorError("; ".join(problems))
        config = read_network_config(folder)
        return cls(
            # unpacked on the CPU: on a GPU, quanto would compile a kernel first
            lambda: dequantize_(load_quantized(lambda: build_network(config), folder)).to(device), info,
            steps=steps, guidance=guidance, batch_size=batch_size, memory_limit=memory_limit, device=device,
        )  # fmt: skip

    @property
    def _network(self) -> nn.Module:
        with _LOADING:
            if self._loaded is None:
                self._loaded = self._load_network()
            return self._loaded

    @property
    def batch_size(self) -> int:
        return self._batches.now()

    def _bytes_per_image(self) -> int:
        patch = patch_of(self.info.image_size)
        shape = (1, self.info.channels * patch**2, self.info.image_size // patch, self.info.image_size // patch)
        x, t, label = torch.zeros(shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        inputs = [value.to(self._device) for value in (x, t, label)]
        one = activation_bytes(self._network, lambda: self._network(inputs[0], inputs[1], class_labels=inputs[2]))
        return one if self._guidance == 1 else 2 * one

    def generate(self, labels: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """Return uint8 [M, C, H, W] on the CPU; see `ImageGenerator.generate`."""
        check_request(labels, seeds, num_classes=self.info.num_classes)
        size, num = self.info.image_size, len(labels)
        images = torch.empty(num, self.info.channels, size, size, dtype=torch.uint8)

        def make(start: int, stop: int) -> None:
            padding = [0] * (self._batches.size - (stop - start))
            batch = self._batch([*labels[start:stop], *padding], [*seeds[start:stop], *padding])
            images[start:stop] = batch[: stop - start]

        self._batches.run(num, make)
        return images

    def _batch(self, labels: list[int], seeds: list[int]) -> torch.Tensor:
        """Make one whole batch."""
        return sample(
            self._network, labels, seeds, image_size=self.info.image_size, channels=self.info.channels,
            num_classes=self.info.num_classes, steps=self._steps, guidance=self._guidance, device=self._device,
        )  # fmt: skip


@torch.no_grad()  # not inference_mode, which quanto's tensors refuse
def sample(
    network: nn.Module,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    image_size: int,
    channels: int,
    num_classes: int,
    steps: int,
    guidance: float,
    device: torch.device,
) -> torch.Tensor:
    """Return uint8 [M, channels, image_size, image_size] on the CPU, all made in one batch.

    Args:
        network: Predicts the velocity; the class `num_classes` means none.
        labels, seeds: One of each for every image; the noise of an image follows from its own seed.
        image_size, channels, num_classes: What the network was trained for.
        steps: Evaluations per image.
        guidance: v_none + guidance (v_class - v_none) (Ho and Salimans, arXiv 2207.12598); 1 is v_class, at half the cost.
        device: Where the network is.
    """
    from diffusers import DPMSolverMultistepScheduler

    patch = patch_of(image_size)
    shape = (channels * patch**2, image_size // patch, image_size // patch)
    x = torch.stack([torch.randn(shape, generator=torch_generator(seed)) for seed in seeds]).to(device)
    classes = torch.tensor(labels, device=device)
    none = torch.full_like(classes, num_classes)
    with np.errstate(divide="ignore"):  # its first noise level is infinite, on purpose
        scheduler: Any = DPMSolverMultistepScheduler(**_SCHEDULER)
        scheduler.set_timesteps(steps, device=device)
    for time in scheduler.timesteps:
        t = time.expand(len(x)).float()
        if guidance == 1:
            velocity = network(x, t, class_labels=classes).sample
        else:
            both = network(torch.cat([x, x]), torch.cat([t, t]), class_labels=torch.cat([classes, none])).sample
            v_class, v_none = both.chunk(2)
            velocity = v_none + guidance * (v_class - v_none)
        x = scheduler.step(velocity, time, x, return_dict=False)[0]
    pixels = F.pixel_shuffle(x, patch).clamp(-1, 1)
    return ((pixels + 1) * 127.5).round().to(torch.uint8).cpu()
