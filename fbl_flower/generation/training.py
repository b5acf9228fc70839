"""Train a generator on the public images: rectified flow, then 4-bit weights.

A network learns the velocity that carries noise to images along straight lines (Liu et al., arXiv 2209.03003):
x_t = (1 - t) x + t e, with target e - x. A generator that is going to stand on every client must never have seen a
client's image, nor a test image: only `parts.public` is read.
"""

from __future__ import annotations

import copy
import importlib.metadata
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fbl_flower.data.datasets import DataParts
from fbl_flower.device import keep_freed_memory
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.augment import deform
from fbl_flower.generation.network import build_network, network_config, patch_of
from fbl_flower.generation.quantization import LAYERS, WEIGHTS, quantize_, save_quantized
from fbl_flower.generation.recipe import NETWORK, GeneratorInfo, TrainingRecipe, file_sha256, write_info
from fbl_flower.seeding import derive, torch_stream

_REPORTS = 40  # progress lines of a whole training


def train_generator(
    parts: DataParts, *, recipe: TrainingRecipe, out: Path, progress: Callable[[str], None] | None = None
) -> GeneratorInfo:
    """Train on `parts.public` and write a generator's folder.

    Args:
        parts: Only its public images and labels are read.
        recipe: The hyper-parameters; the same recipe gives the same weights with the same machine, libraries and
            number of threads.
        out: The folder to make. It appears whole or not at all.
        progress: Is given a line of text now and then: step, loss, seconds left.

    Returns:
        What was written to `recipe.json`.

    Raises:
        GeneratorError: `out` is there already, a class has no public image, or the recipe does not fit the images.
    """
    if out.exists():
        raise GeneratorError(f"generator: {out} is there already; remove it, or choose another folder")
    counts = parts.public.counts(parts.info.num_classes)
    if lacking := [name for name, count in zip(parts.info.class_names, counts.tolist(), strict=True) if not count]:
        raise GeneratorError(f"generator: no public image of {', '.join(lacking)}; use more public images (data.num-public)")
    wall, cpu = time.perf_counter(), time.process_time()
    network = quantize_(fit_network(parts, recipe=recipe, progress=progress))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu

    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        network.save_config(folder)  # type: ignore[operator]  # diffusers' own
        save_quantized(network, folder)
        info = GeneratorInfo(
            data_name=parts.info.name,
            image_size=parts.image_size,
            channels=parts.info.channels,
            class_names=parts.info.class_names,
            public_sha256=parts.public_sha256,
            num_images=len(parts.public),
            training=recipe,
            wall_seconds=round(wall, 1),
            cpu_seconds=round(cpu, 1),
            num_threads=torch.get_num_threads(),
            versions={name: importlib.metadata.version(name) for name in ("torch", "diffusers", "optimum-quanto")},
            files={name: file_sha256(folder / name) for name in (NETWORK, WEIGHTS, LAYERS)},
        )
        write_info(folder, info)
        folder.chmod(0o755)  # what temporary files are made with closes them to other users
        for file in folder.iterdir():
            file.chmod(0o644)
        os.rename(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return info


def fit_network(parts: DataParts, *, recipe: TrainingRecipe, progress: Callable[[str], None] | None = None) -> nn.Module:
    """Return the moving average of the trained float network: `train_generator` without the files."""
    keep_freed_memory()
    config = network_config(
        image_size=parts.image_size, channels=parts.info.channels, num_classes=parts.info.num_classes, widths=recipe.widths
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(recipe.seed, "generator", "weights"))
        network = build_network(config)
    for parameter in network.get_submodule("conv_out").parameters():
        nn.init.zeros_(parameter)  # the first guess is no velocity at all
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
    )
    stream = torch_stream(recipe.seed, "generator", "draws")
    start, losses = time.perf_counter(), []
    for step in range(1, recipe.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        loss = flow_loss(network, draw_batch(parts, recipe=recipe, stream=stream))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
        optimizer.step()
        decay = min(recipe.ema, (1 + step) / (10 + step))  # a short memory while the weights still move fast
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
        losses.append(loss.item())
        if progress and (step % max(1, recipe.steps // _REPORTS) == 0 or step == recipe.steps):
            left = (time.perf_counter() - start) / step * (recipe.steps - step)
            recent = sum(losses[-50:]) / len(losses[-50:])
            progress(f"step {step} of {recipe.steps}: loss {recent:.4f}, {left:.0f} s left")
    return average


@dataclass(frozen=True, kw_only=True)
class FlowBatch:
    """What a network sees in one step, and should answer.

    Attributes:
        x_t: float [N, C, H, W], images on their way to noise, with pixels folded into channels.
        t: float [N], how far they are, in 0 .. 1.
        labels: int64 [N]; the number of classes stands for no label.
        velocity: float [N, C, H, W], noise minus image.
    """

    x_t: torch.Tensor
    t: torch.Tensor
    labels: torch.Tensor
    velocity: torch.Tensor


def draw_batch(parts: DataParts, *, recipe: TrainingRecipe, stream: torch.Generator) -> FlowBatch:
    """Draw public images, deformations, noise, times and which labels to drop."""
    size = recipe.batch_size
    index = torch.randint(len(parts.public), (size,), generator=stream)
    batch = parts.public.take(index)
    pixels = deform(batch.images.float() / 127.5 - 1, recipe.augmentation, flip=parts.info.flip, stream=stream)
    x = F.pixel_unshuffle(pixels, patch_of(parts.image_size))
    e = torch.randn(x.shape, generator=stream)
    t = torch.sigmoid(torch.randn(size, generator=stream))  # most draws in the middle, where the task is hardest
    nothing = torch.full((size,), parts.info.num_classes)
    labels = torch.where(torch.rand(size, generator=stream) < recipe.label_dropout, nothing, batch.labels)
    return FlowBatch(x_t=torch.lerp(x, e, t[:, None, None, None]), t=t, labels=labels, velocity=e - x)


def flow_loss(network: nn.Module, batch: FlowBatch) -> torch.Tensor:
    """Return the mean squared error of the velocity (a scalar)."""
    velocity = network(batch.x_t, batch.t * 1000, class_labels=batch.labels).sample
    return F.mse_loss(velocity, batch.velocity)


def _schedule(step: int, recipe: TrainingRecipe) -> float:
    """Return the factor of the learning rate: a linear warm-up times a cosine from 1 to 0.05."""
    warm = min(1.0, step / recipe.warmup) if recipe.warmup else 1.0
    return warm * (0.05 + 0.95 * (1 + math.cos(math.pi * step / recipe.steps)) / 2)
