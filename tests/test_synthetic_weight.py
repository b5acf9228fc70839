"""The weight of synthetic images in the training loss: steps by hand, and the two ends of its range."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import quick
from test_method_runs import results
from test_methods import STEP, linear

from fbl_flower.data.examples import Examples
from fbl_flower.federation.local import run_local
from fbl_flower.methods.logits import LogitOffsets, logit_adjustment
from fbl_flower.models import Classifier
from fbl_flower.seeding import torch_stream
from fbl_flower.training.loop import train

IMAGES = Examples(
    images=torch.full((4, 1, 1, 1), 255, dtype=torch.uint8),
    labels=torch.tensor([0, 0, 1, 1]),
    synthetic=torch.tensor([False, False, False, True]),
)


def step(examples: Examples, *, weight: float, batch_size: int = 4, **options: object) -> tuple[Classifier, float]:
    model = linear(1, 2)
    result = train(
        model, examples, config=replace(STEP, batch_size=batch_size), augmentation=None, rng=torch_stream(0, "t"),
        synthetic_weight=weight, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return model, result.loss


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_a_step_by_hand(weight: float) -> None:
    """Both logits are 0, so each image pulls its own class up by 1/2: two real ones class 0, one and w of one class 1. The mean is over
    all four: bias 0 moves by 0.1 (2 - (1 + w)) / (2 * 4). The reported loss, log 2 for each image, has no weights."""
    model, loss = step(IMAGES, weight=weight)
    assert model.head.bias[0].item() == pytest.approx(0.1 * (1 - weight) / 8, abs=1e-8)
    assert model.head.bias[1].item() == pytest.approx(-0.1 * (1 - weight) / 8, abs=1e-8)
    assert loss == pytest.approx(0.693147, abs=1e-6)


def test_weight_zero_is_the_real_images_over_the_batch_size() -> None:
    """Three of four images are real: the step is 3/4 of that on the three alone."""
    whole, _ = step(IMAGES, weight=0.0)
    real, _ = step(IMAGES.take(torch.arange(3)), weight=1.0)
    torch.testing.assert_close(whole.head.bias.detach(), real.head.bias.detach() * 3 / 4)
    torch.testing.assert_close(whole.head.weight.detach(), real.head.weight.detach() * 3 / 4)


def test_real_images_alone_have_no_use_for_a_weight() -> None:
    real = Examples.real(IMAGES.images, IMAGES.labels)
    torch.testing.assert_close(step(real, weight=0.3)[0].head.weight, step(real, weight=1.0)[0].head.weight)


def test_the_weight_applies_to_adjusted_logits() -> None:
    """Labels 0, 0, 0 of which one is synthetic, 1 real. Offsets make p = (3/4, 1/4). With w = 0: class 0 is pulled by 2 (1/4), pushed by 3/4."""
    examples = replace(IMAGES, labels=torch.tensor([0, 0, 1, 0]))
    model, _ = step(examples, weight=0.0, method=LogitOffsets(logit_adjustment(tau=1.0)))
    assert model.head.bias[0].item() == pytest.approx(0.1 * (2 / 4 - 3 / 4) / 4, abs=1e-8)


def test_a_federation_with_it(tmp_path: Path) -> None:
    """1 is the default; without synthetic images a weight changes nothing but rounding; with them it does."""
    settings = quick(tmp_path, num_server_rounds=2)
    one, some = (run_local(settings | {"balancing.synthetic-weight": w}) for w in (1.0, 0.5))
    assert results(run_local(settings).run_dir) == results(one.run_dir) != results(some.run_dir)
    assert some.summary["left_out"] == {}
