"""The learning rate over rounds and epochs."""

import math
from dataclasses import replace

import pytest
import torch

from fbl_flower.config import RunConfig, TrainConfig, parse_config
from fbl_flower.data.examples import Examples
from fbl_flower.models import new_classifier
from fbl_flower.seeding import torch_stream
from fbl_flower.training.loop import train
from fbl_flower.training.schedule import epoch_factors, rate_factor, scheduled


@pytest.mark.parametrize(
    ("schedule", "progress", "factor"),
    [
        ("constant", 0.0, 1.0), ("constant", 1.0, 1.0),
        ("cosine", 0.0, 1.0), ("cosine", 0.5, 0.5), ("cosine", 1 / 3, 0.75), ("cosine", 1.0, 0.0),
        ("one-cycle", 0.0, 0.04), ("one-cycle", 0.15, 0.52), ("one-cycle", 0.3, 1.0), ("one-cycle", 0.65, 0.5), ("one-cycle", 1.0, 0.0),
    ],
)  # fmt: skip
def test_factors_by_hand(schedule: str, progress: float, factor: float) -> None:
    """cosine at 1/3: (1 + cos 60 degrees) / 2 = 3/4. one-cycle at 0.15: half-way from 0.04 to 1; at 0.65: half-way down."""
    assert rate_factor(schedule, progress) == pytest.approx(factor, abs=1e-12)


def test_a_round_has_the_factor_of_its_middle() -> None:
    """Round 1 of 2 is at 1/4: (1 + cos 45 degrees) / 2; every learning rate of a client is multiplied."""
    config = parse_config({"train.schedule": "cosine", "num-server-rounds": 2, "scaffold.learning-rate": 0.2})
    factor = (1 + math.sqrt(0.5)) / 2
    first = scheduled(config, 1)
    assert first.train.learning_rate == pytest.approx(config.train.learning_rate * factor)
    assert first.balancing.embedding_learning_rate == pytest.approx(config.balancing.embedding_learning_rate * factor)
    assert first.scaffold.learning_rate == pytest.approx(0.2 * factor)
    assert scheduled(config, 2).train.learning_rate == pytest.approx(config.train.learning_rate * (1 - factor))


def test_a_constant_schedule_changes_nothing() -> None:
    config = parse_config({"train.schedule": "constant"})
    assert scheduled(config, 3) is config


def test_every_rate_is_positive() -> None:
    for schedule in ("cosine", "one-cycle"):
        for rounds in (1, 2, 3, 40):
            config = parse_config({"train.schedule": schedule, "num-server-rounds": rounds})
            rates = [scheduled(config, r).train.learning_rate for r in range(1, rounds + 1)]
            assert min(rates) > 0 and max(rates) <= config.train.learning_rate


def test_epoch_factors_scale_the_steps() -> None:
    """With one step an epoch and plain SGD, a factor of zero leaves the model as it was, and one of two equals twice the rate."""
    torch.manual_seed(0)
    examples = Examples.real(torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8), torch.arange(6) % 3)
    config = TrainConfig(epochs=1, batch_size=6, learning_rate=0.1, momentum=0.0, augment=False, precision="fp32")

    def trained(rate: float, factors: list[float] | None) -> torch.Tensor:
        model = new_classifier(replace(RunConfig().model, name="tiny"), channels=1, num_classes=3, seed=0)
        settings = replace(config, learning_rate=rate)
        train(model, examples, config=settings, augmentation=None, rng=torch_stream(0, "t"), epoch_factors=factors)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(0.1, [2.0]), trained(0.2, None))
    assert torch.equal(trained(0.1, [1.0]), trained(0.1, None))
    assert torch.equal(trained(0.1, [0.0]), trained(1e-30, None))


def test_factors_of_a_training_without_a_federation() -> None:
    assert epoch_factors("cosine", 2) == pytest.approx([(1 + math.sqrt(0.5)) / 2, (1 - math.sqrt(0.5)) / 2])
    assert epoch_factors("constant", 3) == [1.0, 1.0, 1.0]
