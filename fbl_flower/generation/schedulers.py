"""The ways to walk from noise to an image in a few steps, by name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fbl_flower.errors import GeneratorError
from fbl_flower.generation.components import class_of
from fbl_flower.generation.text_to_image_recipe import WAY_OUT

# `generator.scheduler`: diffusers' class, and what differs from the pipeline's own settings. Each draws its noise, if any, from the
# streams that it is given, so that an image depends on its own seed alone.
_SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
}
# What each scheduler's own configuration may not hand on to another.
_OF_THE_MODEL = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "timestep_spacing",
    "steps_offset", "set_alpha_to_one", "rescale_betas_zero_snr",
)  # fmt: skip


def make_scheduler(name: str, own_class: str, own_config: Mapping[str, Any]) -> Any:
    """Return a new scheduler; it counts steps, so one serves one batch at a time.

    Args:
        name: As `generator.scheduler` has it; auto: the pipeline's own.
        own_class, own_config: Of the pipeline's own scheduler; any other learns from it how the model was trained.
    """
    if name == "auto":
        return class_of(own_class).from_config(dict(own_config))
    cls = class_of(_SCHEDULERS[name][0])
    taken = inspect.signature(cls.__init__).parameters
    known = {key: own_config[key] for key in _OF_THE_MODEL if key in own_config and key in taken}
    return cls(**known, **_SCHEDULERS[name][1])


def check_steps(scheduler: Any, steps: int) -> None:
    """Refuse a number of steps that `scheduler` cannot make; raises `GeneratorError`."""
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise GeneratorError(
            f"generator.steps: got {steps}, which {type(scheduler).__name__} cannot make ({error}); "
            "change it, or generator.scheduler"
        ) from error


def read_scheduler(folder: Path, class_name: str) -> dict[str, Any]:
    """Return the settings of the scheduler that a generator's folder holds; raises `GeneratorError`."""
    file = folder / "scheduler_config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        make_scheduler("auto", class_name, config)
    except (OSError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise GeneratorError(f"generator: {file} describes no {class_name} ({error}); {WAY_OUT}") from error
    return config
