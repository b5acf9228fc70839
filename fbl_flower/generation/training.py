"""Train a generator on the public images: rectified flow, then 4-bit weights.

A generator that is going to stand on every client must never have seen a client's image, nor a test image: it learns from
`parts.public`. Validation images tell, in the progress lines, whether it memorises. (One that the clients train together: `federated`.)
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fbl_flower.data.datasets import DataParts
from fbl_flower.data.examples import Examples
from fbl_flower.device import autocast, keep_freed_memory
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.finite import check_finite
from fbl_flower.generation.flow import draw_batch, flow_loss
from fbl_flower.generation.folder import write_generator
from fbl_flower.generation.network import network_config, new_network
from fbl_flower.generation.new_folder import make_parent
from fbl_flower.generation.preview import write_preview
from fbl_flower.generation.recipe import GeneratorInfo, TrainingRecipe
from fbl_flower.generation.training_checkpoint import Spent, TrainingCheckpoint
from fbl_flower.seeding import torch_stream

_REPORTS = 40  # progress lines of a whole training
_RECENT = 50  # steps whose mean loss they show
_HELD_OUT = 256  # draws that show whether the average knows the training images better than others


def train_generator(
    parts: DataParts,
    *,
    recipe: TrainingRecipe,
    out: Path,
    weights: str = "4bit",
    device: str = "cpu",
    compiled: bool = False,
    checkpoint_every: int = 100,
    stop_after: float = math.inf,
    progress: Callable[[str], None] | None = None,
) -> GeneratorInfo | None:
    """Train on `parts.public` and write a generator's folder; a training that was stopped or killed goes on.

    While it lasts, the folder OUT.training beside `out` holds a checkpoint and a preview, a grid of images with a row for each class.
    A training in several pieces ends with the weights of one in a single piece.

    Args:
        parts: Its public images and labels train; validation images are in the progress lines only.
        recipe: The hyper-parameters; the same recipe gives the same weights with the same machine, libraries and
            number of threads.
        out: The folder to make. It appears whole or not at all.
        weights: What to store them in: 4bit, 8bit or none, which is 32-bit floats; `quantize_generator` takes those later.
        device: "cpu" or "cuda". Every draw is made on the CPU.
        compiled: Let torch compile the network first: minutes, and a C++ compiler, for shorter steps. Rounds differently.
        checkpoint_every: Steps between checkpoints; a kill or Ctrl-C loses fewer than these.
        stop_after: Seconds after which to stop with a checkpoint.
        progress: Is given a line of text now and then: step, loss, seconds left.

    Returns:
        What was written to `recipe.json`; None if `stop_after` ended the training before its last step.

    Raises:
        GeneratorError: `out` is there already or cannot be written, a class has no public image, the recipe does not fit the images, the
            training diverges, another process works on it, or the checkpoint is damaged or another training's.
    """
    if out.exists():
        raise GeneratorError(f"generator: {out} is there already; remove it, or choose another folder")
    make_parent(out)  # now, and not after hours
    counts = parts.public.counts(parts.info.num_classes)
    if lacking := [name for name, count in zip(parts.info.class_names, counts.tolist(), strict=True) if not count]:
        raise GeneratorError(f"generator: no public image of {', '.join(lacking)}; use more public images (data.num-public)")
    training = Training(parts, recipe, device=device, compiled=compiled)
    checkpoint = TrainingCheckpoint(out.with_name(f"{out.name}.training"), recipe=recipe, public_sha256=parts.public_sha256)
    with checkpoint.claimed():
        if training.restore(checkpoint):
            _tell(progress, f"going on after step {training.steps_done} of {recipe.steps}")
            if training.spent.threads not in ((), (torch.get_num_threads(),)):
                before = ", ".join(map(str, training.spent.threads))
                _tell(
                    progress,
                    f"with {torch.get_num_threads()} threads, where there were {before} before: sums round otherwise, and the weights "
                    "will not be those of a training in one piece (--threads)",
                )
        started = time.perf_counter()
        # an interruption saves nothing: it comes in the middle of a step, whose draws and weights would not belong together
        while training.steps_done < recipe.steps and time.perf_counter() - started < stop_after:
            training.step()
            if training.steps_done % checkpoint_every == 0:
                training.save(checkpoint)
            if training.steps_done % max(1, recipe.steps // _REPORTS) == 0 or training.steps_done == recipe.steps:
                _tell(progress, training.describe())
        if training.steps_done < recipe.steps:
            training.save(checkpoint)
            _tell(progress, f"stopped after step {training.steps_done} of {recipe.steps}; the same command goes on")
            return None
        training.check_result()
        described = _info_of(parts, recipe=recipe, spent=training.spent)
        info = write_generator(training.average.cpu(), described, out=out, weights=weights)
        checkpoint.remove()
        return info


def _tell(progress: Callable[[str], None] | None, line: str) -> None:
    if progress is not None:
        progress(line)


class Training:
    """A training under way: all that its next step depends on.

    Attributes:
        average: The moving average of the weights, which is what a training is for.
        steps_done: Optimiser steps so far.
        spent: What they took, over all pieces of the training.
    """

    def __init__(self, parts: DataParts, recipe: TrainingRecipe, *, device: str = "cpu", compiled: bool = False) -> None:
        keep_freed_memory()
        self._parts, self._recipe, self._device = parts, recipe, torch.device(device)
        config = network_config(
            image_size=parts.image_size, channels=parts.info.channels, num_classes=parts.info.num_classes, widths=recipe.widths
        )
        self._network = new_network(config, seed=recipe.seed).to(self._device)
        self._forward: Callable[..., Any] = torch.compile(self._network) if compiled else self._network
        self.average = copy.deepcopy(self._network).eval().requires_grad_(False)
        self._optimizer = torch.optim.AdamW(
            self._network.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
        )
        self._stream = torch_stream(recipe.seed, "generator", "draws")
        self._losses: list[float] = []
        self.steps_done, self.spent = 0, Spent()

    def step(self) -> None:
        """Take one optimiser step."""
        wall, cpu = time.perf_counter(), time.process_time()
        recipe, step = self._recipe, self.steps_done + 1
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        batch = draw_batch(self._parts, recipe=recipe, stream=self._stream).to(self._device)
        with autocast("auto" if self._device.type == "cuda" else "fp32", self._device):
            loss = flow_loss(self._forward, batch)
        self._optimizer.zero_grad(set_to_none=True)
        self._require_finite(loss, f"loss of step {step}")
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._network.parameters(), recipe.clip_norm)
        self._require_finite(norm, f"gradient of step {step}")
        self._optimizer.step()
        decay = min(recipe.ema, (1 + step) / (10 + step))  # a short memory while the weights still move fast
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self._network.parameters()), 1 - decay)
        self._losses = [*self._losses[1 - _RECENT :], loss.item()]
        self.steps_done = step
        self.spent += Spent(
            wall=time.perf_counter() - wall,
            cpu=time.process_time() - cpu,
            devices=(self._device.type,),
            compiled=self._forward is not self._network,
            threads=(torch.get_num_threads(),),
        )

    def check_result(self) -> None:
        """Raise `GeneratorError` if a weight, an average of weights, or the loss of the average is not finite."""
        self._check_weights()
        self._require_finite(torch.tensor(self.average_loss(self._parts.public)), "loss of the averaged weights")

    def _check_weights(self) -> None:
        check_finite(self._network, "weights")
        check_finite(self.average, "average of the weights")

    def _require_finite(self, value: torch.Tensor, what: str) -> None:
        if not bool(value.isfinite()):
            raise GeneratorError(
                f"generator: the {what} is not finite: the training has diverged; lower --learning-rate "
                f"(it is {self._recipe.learning_rate:g})"
            )

    def describe(self) -> str:
        """Return a line on how far the training is, and on whether it memorises: then only the loss of training images falls."""
        left = self.spent.wall / self.steps_done * (self._recipe.steps - self.steps_done)
        recent = sum(self._losses) / len(self._losses)
        averaged = ""
        if len(self._parts.validation):
            seen, unseen = self.average_loss(self._parts.public), self.average_loss(self._parts.validation)
            averaged = f", of the average {seen:.4f} on training and {unseen:.4f} on validation images"
        return f"step {self.steps_done} of {self._recipe.steps}: loss {recent:.4f}{averaged}, {left:.0f} s left"

    @torch.no_grad()
    def average_loss(self, images: Examples) -> float:
        """Return the loss of the averaged weights on 256 draws of some images, with the same noise and times at every call."""
        recipe = dataclasses.replace(self._recipe, batch_size=_HELD_OUT, augmentation=self._recipe.augmentation.scaled(0))
        stream = torch_stream(self._recipe.seed, "generator", "held out")
        batch = draw_batch(dataclasses.replace(self._parts, public=images), recipe=recipe, stream=stream)
        return flow_loss(self.average, batch.to(self._device)).item()

    def save(self, checkpoint: TrainingCheckpoint) -> None:
        """Write a checkpoint and a preview; raises `GeneratorError` if a weight is not finite."""
        self._check_weights()
        tensors = {f"network.{name}": tensor for name, tensor in self._network.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for place, values in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{place}.{name}": tensor for name, tensor in values.items()}
        tensors["stream"] = self._stream.get_state()
        checkpoint.write(tensors, steps_done=self.steps_done, losses=self._losses, spent=self.spent)
        info, recipe = self._parts.info, self._recipe
        write_preview(
            checkpoint.folder / "preview.png", self.average, image_size=self._parts.image_size, channels=info.channels,
            num_classes=info.num_classes, seed=recipe.seed, device=self._device,
        )  # fmt: skip

    def restore(self, checkpoint: TrainingCheckpoint) -> bool:
        """Go to where a checkpoint is; return False if there is none."""
        saved = checkpoint.read()
        if saved is None:
            return False
        try:
            self._network.load_state_dict(_below("network.", saved.tensors))
            self.average.load_state_dict(_below("average.", saved.tensors))
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in _below("optimizer.", saved.tensors).items():
                place, _, key = name.partition(".")
                state.setdefault(int(place), {})[key] = tensor
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": state, "param_groups": groups})
            self._stream.set_state(saved.tensors["stream"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise GeneratorError(f"generator: {checkpoint.file} is damaged ({error}); remove {checkpoint.folder}") from error
        self.steps_done, self._losses, self.spent = saved.steps_done, saved.losses, saved.spent
        return True


def _below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _info_of(parts: DataParts, *, recipe: TrainingRecipe, spent: Spent) -> GeneratorInfo:
    """Describe a generator whose files are not yet written."""
    return GeneratorInfo(
        data_name=parts.info.name,
        image_size=parts.image_size,
        channels=parts.info.channels,
        class_names=parts.info.class_names,
        public_sha256=parts.public_sha256,
        num_images=len(parts.public),
        training=recipe,
        wall_seconds=round(spent.wall, 1),
        cpu_seconds=round(spent.cpu, 1),
        num_threads=torch.get_num_threads(),
        device=", ".join(spent.devices),
        compiled=spent.compiled,
        versions={name: importlib.metadata.version(name) for name in ("torch", "diffusers", "optimum-quanto")},
    )


def _schedule(step: int, recipe: TrainingRecipe) -> float:
    """Return the factor of the learning rate: a linear warm-up times a cosine from 1 to 0.05."""
    warm = min(1.0, step / recipe.warmup) if recipe.warmup else 1.0
    return warm * (0.05 + 0.95 * (1 + math.cos(math.pi * step / recipe.steps)) / 2)
