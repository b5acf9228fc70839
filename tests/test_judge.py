"""The judge: its rule of epochs, that no setting reaches it, and that it is good at the real task."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_generation_support import digits

from fbl_flower.config import ModelConfig, RunConfig, TrainConfig, parse_config
from fbl_flower.errors import RunFailed
from fbl_flower.generation.measures import accuracy
from fbl_flower.training import judge


@pytest.mark.parametrize(
    ("num_images", "epochs"),
    # steps per epoch 1, 1, 2, 5, 19, 20, 21, 141: ceil(400 / those), and never fewer than 20
    [(1, 400), (64, 400), (65, 200), (300, 80), (1216, 22), (1280, 20), (1281, 20), (9000, 20)],
)
def test_small_sets_get_400_steps(num_images: int, epochs: int) -> None:
    assert judge.judge_epochs(num_images) == epochs


def test_the_recipe_is_the_documented_one() -> None:
    model, train = judge.JUDGE_MODEL, judge.JUDGE_TRAINING
    assert (model.name, model.stem, model.norm, model.width, model.projection_width) == ("resnet18", "32x32", "batch", 16, 0)
    assert (train.batch_size, train.learning_rate, train.schedule) == (64, 0.2, "one-cycle")
    assert (train.momentum, train.nesterov, train.weight_decay, train.clip_norm, train.augment) == (0.9, True, 5e-4, 0, True)
    assert json.loads(json.dumps(judge.describe_judge(), allow_nan=False))["model"]["width"] == 16


def test_no_setting_of_the_run_reaches_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "judge_epochs", lambda num_images: 1)
    parts = digits()
    some = parts.public.take(torch.arange(40))
    other = parse_config(
        {
            "model.name": "tiny", "train.learning-rate": 1e6, "train.schedule": "constant", "train.momentum": 0.0, "train.augment": False,
            "train.batch-size": 1, "train.epochs": 9, "seed": 5, "method.name": "fedprox", "train.precision": "fp32",
        }
    )  # fmt: skip
    one, same, reseeded = (judge.train_judge(c, parts, some, seed) for c, seed in ((RunConfig(), 3), (other, 3), (other, 4)))
    images = parts.validation.images
    assert one.features(images).shape == (100, 128)
    assert torch.equal(one.predict(images), same.predict(images))
    assert not torch.equal(one.predict(images), reseeded.predict(images))


def test_a_judge_that_diverges_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "JUDGE_MODEL", ModelConfig(name="tiny"))
    monkeypatch.setattr(judge, "JUDGE_TRAINING", replace(TrainConfig(), learning_rate=1e30, clip_norm=0.0))
    with pytest.raises(RunFailed, match="the judge's training on 300 real images diverged"):
        judge.train_judge(RunConfig(), digits(), digits().public, 0)


@pytest.mark.slow
def test_the_judge_is_good_at_300_digits() -> None:
    parts = digits()
    trained = judge.train_judge(RunConfig(), parts, parts.public, 0)
    assert accuracy(trained, parts.test.images, parts.test.labels) > 0.9  # 0.95 to 0.98 on validation images, by seed
