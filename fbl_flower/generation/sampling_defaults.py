"""Denoising steps and guidance: from the settings, else from the generator's recipe, else a default."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fbl_flower.config import GeneratorConfig

_MOST_STEPS, _MOST_GUIDANCE = 1000, 20.0  # as generator.steps and generator.guidance allow


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a generator turns noise into an image.

    Attributes:
        steps: Denoising steps, 1 .. 1000.
        guidance: Of classifier-free guidance, 1 .. 20; 1: none.
        chosen_on: What was measured to choose the two, as JSON; empty where nothing was.

    Raises:
        ValueError: A value is out of range or of another type.
    """

    steps: int
    guidance: float
    chosen_on: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.steps) is not int or not 1 <= self.steps <= _MOST_STEPS:
            raise ValueError(f"steps: expected a whole number from 1 to {_MOST_STEPS}, got {self.steps!r}")
        if type(self.guidance) not in (int, float) or not 1 <= self.guidance <= _MOST_GUIDANCE:
            raise ValueError(f"guidance: expected a number from 1 to {_MOST_GUIDANCE:g}, got {self.guidance!r}")
        if not isinstance(self.chosen_on, Mapping) or not _is_json(self.chosen_on):
            raise ValueError(f"chosen_on: expected a JSON object, got {self.chosen_on!r}")

    @property
    def evaluations(self) -> int:
        """Evaluations of the network per image; guidance doubles them."""
        return self.steps if self.guidance == 1 else 2 * self.steps

    def __str__(self) -> str:
        return f"{self.steps} steps, guidance {self.guidance:g}"


# For a generator whose recipe has no entry of its own.
DIFFUSION = Sampling(steps=8, guidance=1.5)
# What docs/text-to-image.md gives for Stable Diffusion 1.5.
TEXT_TO_IMAGE = Sampling(steps=8, guidance=2.0)


def resolve_sampling(settings: GeneratorConfig, own: Sampling | None) -> Sampling:
    """Return the steps and the guidance to use; a setting of 0 is replaced, each on its own.

    Args:
        settings: Its `steps` and `guidance`.
        own: What the generator's recipe says; None where it says nothing.
    """
    default = own or (TEXT_TO_IMAGE if settings.name == "text-to-image" else DIFFUSION)
    return Sampling(steps=settings.steps or default.steps, guidance=float(settings.guidance or default.guidance))


def parse_sampling(raw: object) -> Sampling | None:
    """Read the entry `sampling` of a recipe; None: there is none.

    Raises:
        ValueError: It is no object, has other keys, or a value is wrong.
    """
    if raw is None:
        return None
    if not isinstance(raw, dict) or not {"steps", "guidance"} <= raw.keys() <= {"steps", "guidance", "chosen_on"}:
        raise ValueError(f"expected an object with steps, guidance and chosen_on, got {raw!r}")
    return Sampling(**raw)
