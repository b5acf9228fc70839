"""The training loop, the evaluation, and one client's round."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fbl_flower.balancing.plan import make_plan
from fbl_flower.config import BalancingConfig, ModelConfig, RunConfig, TrainConfig
from fbl_flower.data.examples import Examples
from fbl_flower.models import Classifier, new_classifier
from fbl_flower.params import Arrays, to_arrays
from fbl_flower.seeding import numpy_stream, torch_stream
from fbl_flower.training.evaluation import evaluate, per_image_losses, predict
from fbl_flower.training.loop import Augmentation, TrainResult, train
from fbl_flower.training.round import ClientData, LocalRoundResult, run_local_round

STEP = TrainConfig(
    epochs=1, batch_size=8, learning_rate=0.1, momentum=0.0, weight_decay=0.0, clip_norm=0.0, augment=False, precision="fp32"
)


def linear(num_pixels: int, num_classes: int) -> Classifier:
    """A linear model of the pixels, all zero."""
    model = Classifier(nn.Flatten(), num_pixels, num_classes)
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def pixels(rows: list[list[int]], labels: list[int]) -> Examples:
    """Images of 1 x n pixels; 255 is 1.0 and 0 is -1.0 for the model."""
    return Examples.real(torch.tensor(rows, dtype=torch.uint8)[:, None, None, :], torch.tensor(labels))


def fit(model: Classifier, examples: Examples, **changes: object) -> TrainResult:
    config = replace(STEP, **changes)  # type: ignore[arg-type]
    return train(model, examples, config=config, augmentation=None, rng=torch_stream(0, "train"))


# x_0 = (1, 1, -1, -1) of class 0 and x_1 = (1, -1, 1, -1) of class 1
TWO = pixels([[255, 255, 0, 0], [255, 0, 255, 0]], [0, 1])
# Zero weights: softmax 1/3. Gradient of row c: mean over i of (1/3 - [y_i = c]) x_i, so
# row 0: (-2/3 x_0 + 1/3 x_1) / 2, row 1: (1/3 x_0 - 2/3 x_1) / 2, row 2: (1/3 x_0 + 1/3 x_1) / 2.
GRADIENT = np.array([[-1, -3, 3, 1], [-1, 3, -3, 1], [2, 0, 0, -2]]) / 6
BIAS_GRADIENT = np.array([-1, -1, 2]) / 6


def test_one_step_by_hand() -> None:
    model = linear(4, 3)
    result = fit(model, TWO)
    assert model.head.weight.tolist() == pytest.approx(-0.1 * GRADIENT, abs=1e-7)
    assert model.head.bias.tolist() == pytest.approx(-0.1 * BIAS_GRADIENT, abs=1e-7)
    assert result.loss == pytest.approx(math.log(3), abs=1e-6)
    assert math.isnan(result.synthetic_accuracy) and math.isnan(result.aligned_accuracy)


def test_clipping_shortens_the_gradient_to_the_norm_asked_for() -> None:
    """Squared norm of the gradient: (20 + 20 + 8) / 36 of the weights, 6 / 36 of the bias; 1.5 altogether. Clipped to 0.3."""
    model = linear(4, 3)
    fit(model, TWO, clip_norm=0.3)
    assert model.head.weight.tolist() == pytest.approx(-0.1 * GRADIENT * 0.3 / math.sqrt(1.5), abs=1e-6)
    model = linear(4, 3)
    fit(model, TWO, clip_norm=1.3)  # longer than the gradient: no change
    assert model.head.weight.tolist() == pytest.approx(-0.1 * GRADIENT, abs=1e-7)


def test_weight_decay_and_momentum_by_hand() -> None:
    """One pixel of value 1, one class: the gradient is 0, and only the decay is left. w = 1, lr 0.1, wd 0.5, momentum 0.5:
    v_1 = 0.5 * 1 = 0.5, w_1 = 0.95; v_2 = 0.25 + 0.475 = 0.725, w_2 = 0.8775."""
    model = linear(1, 1)
    nn.init.ones_(model.head.weight)
    fit(model, pixels([[255]], [0]), weight_decay=0.5, momentum=0.5, nesterov=False, epochs=2)
    assert model.head.weight.item() == pytest.approx(0.8775, abs=1e-6)


def test_nesterov_momentum_by_hand() -> None:
    """As above, by w <- w - lr (g + 0.5 v): w_1 = 1 - 0.1 * 0.75 = 0.925; g = 0.4625, v_2 = 0.7125, w_2 = 0.925 - 0.1 * 0.81875."""
    model = linear(1, 1)
    nn.init.ones_(model.head.weight)
    fit(model, pixels([[255]], [0]), weight_decay=0.5, momentum=0.5, nesterov=True, epochs=2)
    assert model.head.weight.item() == pytest.approx(0.843125, abs=1e-6)


def test_a_last_smaller_batch_is_used() -> None:
    """Three images in batches of two, one of a class of its own: both steps are made, and each image is seen once."""
    model, seen = linear(4, 3), []
    model.features.register_forward_hook(lambda module, args, output: seen.append(args[0].clone()))
    images = pixels([[255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0]], [0, 1, 2])
    fit(model, images, batch_size=2)
    assert [len(batch) for batch in seen] == [2, 1]
    assert sorted(torch.cat(seen).argmax(3).flatten().tolist()) == [0, 1, 2]


@pytest.mark.parametrize("aligned", [False, True])
def test_the_loss_is_a_mean_over_images_not_over_batches(aligned: bool) -> None:
    """With a vanishing step the model stays: four images of loss ln(1 + e^-2) and one of ln(1 + e^2), in batches of four and one."""
    model = linear(1, 2)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    result = train(
        model,
        pixels([[255]] * 5, [0, 0, 0, 0, 1]),
        config=replace(STEP, batch_size=4, learning_rate=1e-12),
        augmentation=None,
        rng=torch_stream(0, "train"),
        embeddings=nn.Parameter(torch.zeros(2, 1)) if aligned else None,
    )
    assert result.loss == pytest.approx((4 * math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 5, abs=1e-6)


@pytest.mark.parametrize(("num_images", "num_tracked"), [(1, 0), (5, 1), (4, 1), (6, 2)])
def test_batch_norm_takes_no_statistics_from_a_batch_of_one_image(num_images: int, num_tracked: int) -> None:
    """Batches of four: with 5 images the last one holds one image, which has no variance."""
    features = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4))
    model = Classifier(features, 4, 3)
    images = torch.randint(0, 256, (num_images, 1, 2, 2), dtype=torch.uint8, generator=torch_stream(0, "images"))
    result = fit(model, Examples.real(images, torch.arange(num_images) % 3), batch_size=4)
    assert features[1].num_batches_tracked.item() == num_tracked
    assert math.isfinite(result.loss)
    assert all(torch.isfinite(p).all() for p in model.state_dict().values())


# Evaluation


def test_evaluation_is_a_mean_over_images() -> None:
    """251 images, the last of them (in a batch of its own) wrong: a mean of batch means would give one half."""
    model = linear(1, 2)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    examples = pixels([[255]] * 251, [0] * 250 + [1])
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    result = evaluate(model, examples)
    assert result.accuracy == 250 / 251
    assert result.loss == pytest.approx((250 * right + wrong) / 251, abs=1e-6)
    losses = per_image_losses(model, examples)
    assert losses.tolist() == pytest.approx([right] * 250 + [wrong], abs=1e-6)


def test_evaluation_changes_nothing_in_a_model_with_batch_statistics() -> None:
    features = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model = Classifier(features, 4, 3)
    before = to_arrays(model.state_dict())
    images = torch.randint(0, 256, (9, 1, 2, 2), dtype=torch.uint8, generator=torch_stream(0, "images"))
    whole, _ = predict(model, images)
    one_by_one = torch.cat([predict(model, image[None])[0] for image in images])
    assert torch.allclose(whole, one_by_one, atol=1e-6)
    assert equal(before, to_arrays(model.state_dict()))


def test_no_images_have_no_predictions() -> None:
    features, logits = predict(linear(4, 3), torch.zeros(0, 1, 2, 2, dtype=torch.uint8))
    assert features.shape == (0, 4) and logits.shape == (0, 3)


# A client's round

AUGMENTATION = Augmentation(shift=1, flip=False)
CONFIG = RunConfig(
    seed=5, device="cpu", model=ModelConfig(name="tiny"), train=TrainConfig(batch_size=8),
    balancing=BalancingConfig(replay_period=2),
)  # fmt: skip


def equal(one: Arrays, two: Arrays) -> bool:
    return one.keys() == two.keys() and all(
        np.array_equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one
    )


def model_arrays(*, seed: int = 0) -> Arrays:
    return to_arrays(new_classifier(CONFIG.model, channels=1, num_classes=4, seed=seed).state_dict())


def random_images(labels: list[int], *, synthetic: bool = False, name: str = "real") -> Examples:
    images = torch.randint(0, 256, (len(labels), 1, 8, 8), dtype=torch.uint8, generator=torch_stream(0, name))
    return Examples(
        images=images, labels=torch.tensor(labels, dtype=torch.int64), synthetic=torch.full((len(labels),), synthetic)
    )


def client(counts: list[int], *, balance: bool = True, sampling: bool = True, filling: bool = True) -> ClientData:
    """A client with random images, its plan, and random synthetic ones."""
    real = random_images([label for label, n in enumerate(counts) for _ in range(n)])
    plan = (
        make_plan(np.array(counts), tie_break=numpy_stream(0, "plan"), sampling=sampling, filling=filling) if balance else None
    )
    fill = [] if plan is None else [label for label, n in enumerate(plan.fill) for _ in range(n)]
    return ClientData(
        client=3, num_classes=len(counts), real=real, plan=plan, fill=random_images(fill, synthetic=True, name="fill"),
        augmentation=AUGMENTATION,
    )  # fmt: skip


def round_of(data: ClientData, *, config: RunConfig = CONFIG, state: object = None, server_round: int = 1) -> LocalRoundResult:
    return run_local_round(model_arrays(), data, state, config=config, server_round=server_round)  # type: ignore[arg-type]


def without_alignment(config: RunConfig = CONFIG) -> RunConfig:
    return replace(config, balancing=replace(config.balancing, alignment=False))


def test_a_round_trains_on_the_balanced_set() -> None:
    """N = 18 + 5 + 1 + 0 = 24, B = 6: 6 + 5 + 1 real images stay, 1 + 5 + 6 synthetic ones join them."""
    result = round_of(client([18, 5, 1, 0]))
    assert (result.num_examples, result.num_real) == (24, 24)
    assert result.state is not None
    kept = result.state.kept
    assert [int(part.sum()) for part in kept.split([18, 5, 1])] == [6, 5, 1]
    assert result.state.chosen_in == 1
    assert result.state.embeddings.shape == (4, 32)
    moved = result.state.embeddings.abs().sum(1) > 0
    assert moved.tolist() == [False, True, True, True]  # class 0 has no synthetic image
    assert not equal(result.arrays, model_arrays())


def test_sampling_keeps_the_highest_losses_under_the_received_model() -> None:
    data = client([18, 5, 1, 0])
    model = new_classifier(CONFIG.model, channels=1, num_classes=4, seed=0)
    losses = per_image_losses(model, data.real)[:18]
    state = round_of(data).state
    assert state is not None
    assert state.kept[:18].nonzero().flatten().tolist() == sorted(losses.topk(6).indices.tolist())


def test_what_is_kept_holds_until_a_replay_is_due() -> None:
    """Chosen in round 1, period 2: round 2 is too early; in round 3 round(0.5 * 6) = 3 discarded images of class 0 return."""
    config = replace(CONFIG, balancing=replace(CONFIG.balancing, replay_ratio=0.5))
    data = client([18, 5, 1, 0])
    first = round_of(data, config=config).state
    second = round_of(data, config=config, state=first, server_round=2).state
    third = round_of(data, config=config, state=second, server_round=3).state
    assert first is not None and second is not None and third is not None
    assert torch.equal(second.kept, first.kept) and second.chosen_in == 1
    assert not torch.equal(second.embeddings, first.embeddings)  # the vectors go on from where they were
    assert third.chosen_in == 3
    assert int((third.kept & ~first.kept).sum()) == 3 and int(third.kept.sum()) == 12


def test_everything_off_is_federated_averaging_bit_for_bit() -> None:
    off = replace(CONFIG, balancing=replace(CONFIG.balancing, sampling="none", filling=False, alignment=False, replay_period=0))
    fbl = round_of(client([18, 5, 1, 0], sampling=False, filling=False), config=off)
    fedavg = round_of(client([18, 5, 1, 0], balance=False))
    assert equal(fbl.arrays, fedavg.arrays)
    assert fbl.training is not None and fedavg.training is not None
    assert fbl.training.loss == fedavg.training.loss
    assert fbl.num_examples == fedavg.num_examples == 24
    assert fedavg.state is None


@pytest.mark.parametrize(
    "config",
    [
        without_alignment(),
        CONFIG,
    ],
    ids=["without-alignment", "all-of-fbl"],
)  # fmt: skip
def test_a_balanced_client_trains_as_in_federated_averaging_bit_for_bit(config: RunConfig) -> None:
    assert equal(round_of(client([5, 5, 5, 5]), config=config).arrays, round_of(client([5, 5, 5, 5], balance=False)).arrays)


@pytest.mark.parametrize("balance", [True, False])
def test_an_empty_client_gives_the_model_back(balance: bool) -> None:
    result = round_of(client([0, 0, 0, 0], balance=balance))
    assert (result.num_examples, result.num_real, result.training) == (0, 0, None)
    assert equal(result.arrays, model_arrays())


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_client_with_one_image_trains_a_resnet(norm: str) -> None:
    config = replace(
        CONFIG, model=ModelConfig(name="resnet18", norm=norm, stem="32x32", width=16), train=replace(CONFIG.train, epochs=1)
    )
    start = to_arrays(new_classifier(config.model, channels=1, num_classes=4, seed=0).state_dict())
    result = run_local_round(start, client([0, 1, 0, 0]), None, config=config, server_round=1)
    assert result.num_examples == 1
    assert all(np.isfinite(array).all() for array in result.arrays.values())
    assert not np.array_equal(result.arrays["head.weight"], start["head.weight"])
    assert {name: array.dtype for name, array in result.arrays.items()} == {name: array.dtype for name, array in start.items()}
    if norm == "batch":
        assert result.arrays["features.bn1.num_batches_tracked"] == 0


@pytest.mark.parametrize("sampling", ["loss", "random"])
def test_a_round_follows_from_its_arguments_alone(sampling: str) -> None:
    """Same arguments, same bits, whatever the global generators hold; and they hold the same afterwards."""
    config = replace(CONFIG, balancing=replace(CONFIG.balancing, sampling=sampling))
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
        results.append(round_of(client([18, 5, 1, 0]), config=config))
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]
    one, two = results
    assert equal(one.arrays, two.arrays)
    assert one.training == two.training
    assert one.state is not None and two.state is not None
    assert torch.equal(one.state.kept, two.state.kept) and torch.equal(one.state.embeddings, two.state.embeddings)


def test_a_round_does_not_change_what_it_is_given() -> None:
    data, arrays = client([18, 5, 1, 0]), model_arrays()
    first = run_local_round(arrays, data, None, config=CONFIG, server_round=1)
    assert first.state is not None
    assert equal(arrays, model_arrays())
    vectors, trained = first.state.embeddings.clone(), {name: array.copy() for name, array in first.arrays.items()}
    run_local_round(first.arrays, data, first.state, config=CONFIG, server_round=2)
    assert torch.equal(first.state.embeddings, vectors)
    assert equal(first.arrays, trained)


@pytest.mark.parametrize("change", ["seed", "client", "server_round"])
def test_seed_client_and_round_name_the_random_streams(change: str) -> None:
    base = round_of(client([5, 5, 5, 5], balance=False)).arrays
    data = client([5, 5, 5, 5], balance=False)
    config, server_round = CONFIG, 1
    match change:
        case "seed":
            config = replace(CONFIG, seed=6)
        case "client":
            data = replace(data, client=4)
        case "server_round":
            server_round = 2
    assert not equal(base, round_of(data, config=config, server_round=server_round).arrays)
