"""The local methods by hand: each penalty, each edited gradient, each update of the server."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fbl_flower.config import RunConfig, TrainConfig
from fbl_flower.config.methods import METHODS, FedGenConfig
from fbl_flower.data.batches import to_float
from fbl_flower.data.examples import Examples
from fbl_flower.errors import ConfigError
from fbl_flower.methods.base import LocalMethod, Step
from fbl_flower.methods.choice import local_method
from fbl_flower.methods.feature_generator import (
    diversity_loss,
    generate_features,
    label_prior,
    new_generator,
    train_generator,
)
from fbl_flower.methods.fedavg import FEDAVG
from fbl_flower.methods.fedgen import LABEL_COUNTS, LABEL_PRIOR, FedGen
from fbl_flower.methods.fedprox import FedProx
from fbl_flower.methods.moon import Moon
from fbl_flower.methods.scaffold import Scaffold, first_variate, next_variate, scaled_update
from fbl_flower.methods.server import Update, arrays_to_send, next_state, with_clients
from fbl_flower.models import Classifier
from fbl_flower.params import Arrays, to_arrays, to_state, weighted_mean
from fbl_flower.seeding import torch_stream
from fbl_flower.training.loop import train

STEP = TrainConfig(
    epochs=1, batch_size=8, learning_rate=0.1, momentum=0.0, weight_decay=0.0, clip_norm=0.0, augment=False, precision="fp32"
)


def linear(num_pixels: int, num_classes: int, *, value: float = 0.0) -> Classifier:
    model = Classifier(nn.Flatten(), num_pixels, num_classes)
    for p in model.parameters():
        nn.init.constant_(p, value)
    return model


def with_batch_norm() -> Classifier:
    return Classifier(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2)), 2, 2)


def white(labels: list[int], *, num_pixels: int = 1) -> Examples:
    """Images whose pixels are all 1.0 for the model."""
    return Examples.real(
        torch.full((len(labels), 1, 1, num_pixels), 255, dtype=torch.uint8), torch.tensor(labels, dtype=torch.int64)
    )


def fit(model: Classifier, examples: Examples, method: LocalMethod, **changes: object) -> float:
    config = replace(STEP, **changes)  # type: ignore[arg-type]
    return train(model, examples, config=config, augmentation=None, rng=torch_stream(0, "train"), method=method).loss


def step_of(model: Classifier, inputs: torch.Tensor, labels: list[int]) -> Step:
    return Step(model=model, inputs=inputs, features=model.features(inputs), labels=torch.tensor(labels))


def test_every_method_has_an_object_and_others_an_error() -> None:
    made = [
        type(local_method(name, RunConfig(), client=0, server_round=1, received={}, state=None)).__name__ for name in METHODS
    ]
    assert made == ["FedAvg", "FedProx", "Moon", "Scaffold", "FedGen", "LogitOffsets", "LogitOffsets", "FedDyn"]
    with pytest.raises(
        ConfigError, match=r"method.name: got 'sgd'; allowed: fedavg \| .* \| logit-adjustment \| fedlc \| feddyn"
    ):
        local_method("sgd", RunConfig(), client=0, server_round=1, received={}, state=None)


# FedProx


def test_the_proximal_term_is_the_squared_distance_of_parameters() -> None:
    """Two weights moved by 3 and 4, biases by 0: (0.5 / 2) (9 + 16) = 6.25, with gradient 0.5 (w - w_received). Buffers do not count."""
    model = with_batch_norm()
    method = FedProx(mu=0.5)
    method.begin(model, white([0], num_pixels=2))
    with torch.no_grad():
        model.head.weight[0] += torch.tensor([3.0, 4.0])
    model.features[1].running_mean += 100  # type: ignore[operator]
    penalty = method.penalty(step_of(model, torch.zeros(2, 1, 1, 2), [0, 1]))
    penalty.backward()
    assert penalty.item() == pytest.approx(6.25)
    assert model.head.weight.grad is not None
    torch.testing.assert_close(model.head.weight.grad, torch.tensor([[1.5, 2.0], [0.0, 0.0]]))


def test_two_proximal_steps_by_hand() -> None:
    """One class: the cross-entropy has no gradient. w = 1, lr 0.1, weight decay 0.5, mu 2: w_1 = 1 - 0.1 * 0.5 = 0.95;
    w_2 = 0.95 - 0.1 (2 * (0.95 - 1) + 0.5 * 0.95) = 0.9125. The loss that is reported stays the cross-entropy, 0."""
    model = linear(1, 1, value=1.0)
    loss = fit(model, white([0]), FedProx(mu=2.0), weight_decay=0.5, epochs=2)
    assert model.head.weight.item() == pytest.approx(0.9125, abs=1e-6)
    assert loss == 0.0


def test_the_larger_mu_the_less_a_client_drifts() -> None:
    """A client sees one image, 90 % of the time as class 0. Where its steps end, gradient and pull cancel: mu (w - 0) = 0.9 - p."""
    drift = []
    for mu in (0.0, 0.1, 1.0, 5.0):
        model = linear(1, 2)
        fit(model, CROWDS[0], FedProx(mu=mu), batch_size=10, epochs=1000)
        bias, p = model.head.bias[0].item(), probability_of_class_0(model)
        assert mu * bias == pytest.approx(0.9 - p, abs=1e-4)
        drift.append(bias)
    assert drift == sorted(drift, reverse=True) and drift[0] > 2 * drift[-1] > 0


# MOON


def rotated(matrix: list[list[float]]) -> Classifier:
    """Features z = M x of two pixels."""
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)), 2, 2)
    with torch.no_grad():
        model.features[1].weight.copy_(torch.tensor(matrix))  # type: ignore[union-attr, operator]
    return model


def test_the_contrast_by_hand() -> None:
    """x = (1, 0): z = (1, 0), z_received = (3, 4), z_previous = (0, 2). Cosines 0.6 and 0; tau = 0.5:
    l = -log(e^1.2 / (e^1.2 + e^0)) = log(1 + e^-1.2), times mu = 2."""
    method = Moon(mu=2.0, temperature=0.5, previous=rotated([[0, 0], [2, 0]]).state_dict())
    method.begin(rotated([[3, 0], [4, 0]]), white([0], num_pixels=2))
    penalty = method.penalty(step_of(rotated([[1, 0], [0, 1]]), torch.tensor([[[[1.0, 0.0]]]]), [0]))
    assert penalty.item() == pytest.approx(2 * math.log1p(math.exp(-1.2)), abs=1e-6)


def test_in_its_first_round_the_contrast_pulls_nowhere() -> None:
    """Both similarities are to the received model: the loss is log 2 whatever z is."""
    method = Moon(mu=1.0, temperature=0.5, previous=None)
    method.begin(rotated([[3, 1], [4, 1]]), white([0], num_pixels=2))
    model = rotated([[1, 2], [0, 1]])
    penalty = method.penalty(step_of(model, torch.tensor([[[[1.0, -0.5]]]]), [0]))
    penalty.backward()
    assert penalty.item() == pytest.approx(math.log(2), abs=1e-6)
    assert model.features[1].weight.grad.abs().max() < 1e-7  # type: ignore[union-attr, operator]


def test_the_contrast_keeps_features_near_the_received_model() -> None:
    """From z = z_received = x, with z_previous = -x: the labels alone turn z, and l_con is least where it points as x does."""
    images = Examples.real(torch.tensor([[255, 100], [200, 150]], dtype=torch.uint8).view(2, 1, 1, 2), torch.tensor([0, 1]))
    x = to_float(images.images).flatten(1)
    cosines = []
    for mu in (0.0, 1.0):
        model = rotated([[1, 0], [0, 1]])
        with torch.no_grad():
            model.head.weight.copy_(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
            model.head.bias.zero_()
        method = Moon(mu=mu, temperature=0.5, previous=rotated([[-1, 0], [0, -1]]).state_dict())
        fit(model, images, method, epochs=100, learning_rate=0.2)
        with torch.no_grad():
            z = x @ model.features[1].weight.T  # type: ignore[union-attr, operator]
        cosines.append(nn.functional.cosine_similarity(z, x).mean().item())
    assert cosines[1] > cosines[0] + 0.3


def test_the_other_models_of_the_contrast_stay_as_they_are() -> None:
    """Only the model in training takes batch statistics, once a step; what is remembered is that model, with its buffers."""
    model = with_batch_norm()
    images = Examples.real(torch.randint(0, 256, (6, 1, 1, 2), generator=torch_stream(0, "x")).byte(), torch.arange(6) % 2)
    method = Moon(mu=1.0, temperature=0.5, previous=None)
    fit(model, images, method, batch_size=3)
    assert model.features[1].num_batches_tracked == 2
    state = method.finish(model).state
    assert state is not None and state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model.head.weight += 1
    assert not torch.equal(state["head.weight"], model.head.weight)


# SCAFFOLD


def variates(value: float) -> Arrays:
    return {"head.weight": np.full((1, 1), value, np.float32), "head.bias": np.full(1, value, np.float32)}


def test_a_round_of_scaffold_by_hand() -> None:
    """One class, so g = 0; c = 0.3 and c_i = 0.1. Three steps at 0.1: y = 1 - 3 * 0.1 * (0 + 0.3 - 0.1) = 0.94, whatever the momentum
    and the clipping of the settings; c_i+ = 0.1 - 0.3 + (1 - 0.94) / (3 * 0.1) = 0, which is g; sent is 0 - 0.1."""
    model = linear(1, 1, value=1.0)
    method = Scaffold(learning_rate=0.1, server_variate=variates(0.3), client_variate=to_state(variates(0.1)))
    fit(model, white([0]), method, epochs=3, momentum=0.9, clip_norm=0.01, learning_rate=7.0)
    finished = method.finish(model)
    assert model.head.weight.item() == pytest.approx(0.94, abs=1e-6)
    assert finished.state is not None and finished.state["head.weight"].item() == pytest.approx(0.0, abs=1e-6)
    assert finished.sent["head.bias"].item() == pytest.approx(-0.1, abs=1e-6)


def test_a_client_without_images_keeps_its_variate() -> None:
    model = linear(1, 1)
    method = Scaffold(learning_rate=0.0, server_variate=variates(0.3), client_variate=to_state(variates(0.1)))
    method.begin(model, white([]))
    finished = method.finish(model)
    assert finished.state is not None and finished.state["head.weight"].item() == pytest.approx(0.1)
    assert finished.sent.keys() == {"head.weight", "head.bias"} and finished.sent["head.weight"] == 0


def test_variates_are_of_parameters_and_gradients_of_buffers_there_are_none() -> None:
    model = with_batch_norm()
    zero = first_variate(model.named_parameters())
    assert zero.keys() == {"features.1.weight", "features.1.bias", "head.weight", "head.bias"}
    method = Scaffold(learning_rate=0.0, server_variate=zero, client_variate=None)
    images = Examples.real(torch.randint(0, 256, (6, 1, 1, 2), generator=torch_stream(0, "x")).byte(), torch.arange(6) % 2)
    fit(model, images, method)
    finished = method.finish(model)
    assert finished.sent.keys() == zero.keys()
    assert any(np.abs(array).max() > 0 for array in finished.sent.values())


def test_the_server_moves_its_variate_by_the_share_of_clients() -> None:
    """c = 0.3, changes -0.1 and 0.3 from two of four clients: 0.3 + (2 / 4) * mean(-0.1, 0.3) = 0.35."""
    after = next_variate(variates(0.3), [variates(-0.1), variates(0.3)], num_clients=4)
    assert after["head.weight"].item() == pytest.approx(0.35)
    assert after["head.weight"].dtype == np.float32


def test_the_servers_step_is_of_parameters() -> None:
    """x = 1, y = 3, eta_g = 0.5: 1 + 0.5 * 2 = 2; a buffer is averaged as it is. With eta_g = 1 nothing is changed."""
    x, y = ({"w": np.array([v], np.float32), "running": np.array([v], np.float32)} for v in (1.0, 3.0))
    half = scaled_update(x, y, learning_rate=0.5, parameters=["w"])
    assert (half["w"].item(), half["running"].item()) == (2.0, 3.0)
    assert scaled_update(x, y, learning_rate=1.0, parameters=["w"]) == y


CROWDS = [white([0] * 9 + [1]), white([0] * 5 + [1] * 5)]


def probability_of_class_0(model: Classifier) -> float:
    return model(torch.ones(1, 1, 1, 1)).softmax(1)[0, 0].item()


def federate(*, scaffold: bool, rounds: int = 15) -> tuple[float, Arrays, list[Arrays]]:
    """Train on `CROWDS`, 10 full-batch steps of size 0.3 a round; return p(class 0), c and the clients' variates."""
    x = to_arrays(linear(1, 2).state_dict())
    c = first_variate(linear(1, 2).named_parameters())
    c_i: list[Arrays | None] = [None, None]
    model = linear(1, 2)
    for _ in range(rounds):
        models, changes = [], []
        for i, crowd in enumerate(CROWDS):
            model.load_state_dict(to_state(x))
            mine = c_i[i]
            method: LocalMethod = FEDAVG
            if scaffold:
                state = None if mine is None else to_state(mine)
                method = Scaffold(learning_rate=0.3, server_variate=c, client_variate=state)
            fit(model, crowd, method, batch_size=10, epochs=10, learning_rate=0.3)
            finished = method.finish(model)
            models.append(to_arrays(model.state_dict()))
            if finished.state is not None:
                c_i[i] = to_arrays(finished.state)
                changes.append(finished.sent)
        x = weighted_mean(models, [10.0, 10.0])
        if changes:
            c = next_variate(c, changes, num_clients=2)
    model.load_state_dict(to_state(x))
    return probability_of_class_0(model), c, [v for v in c_i if v is not None]


def test_scaffold_corrects_the_drift_of_federated_averaging() -> None:
    """Two clients see one and the same image, 90 % and 50 % of the time as class 0. The optimum of the mean loss is p = 0.7, where the
    clients' gradients cancel. Averaging models that went far towards their own optima averages logits instead: (log 9 + log 1) / 2,
    p = 0.75 in the limit of many steps; after ten it is in between. SCAFFOLD ends in the optimum, with c_i the clients' gradients
    there, 0.7 - 0.9 and 0.7 - 0.5 for the logit of class 0, and c their mean, 0."""
    averaged, _, _ = federate(scaffold=False)
    corrected, c, c_i = federate(scaffold=True)
    assert averaged > 0.72
    assert corrected == pytest.approx(0.7, abs=1e-3)
    assert [v["head.bias"][0] for v in c_i] == pytest.approx([-0.2, 0.2], abs=2e-3)
    assert np.abs(c["head.bias"]).max() < 1e-3


# FedGen


def test_diversity_by_hand() -> None:
    """Noise 0 and 2, 4 apart (squared); features (0, 0) and (1, 3), 2 apart (mean absolute). Of the four pairs two have 4 * 2:
    exp(-(8 + 8) / 4)."""
    loss = diversity_loss(torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([[0.0], [2.0]]))
    assert loss.item() == pytest.approx(math.exp(-4), rel=1e-5)


def test_the_prior_is_the_share_of_labels() -> None:
    assert label_prior(np.array([[3, 0, 1], [1, 0, 3]])).tolist() == [0.5, 0.0, 0.5]


def fixed_generator(features: list[float]) -> Arrays:
    """Gives the same features for every label and noise."""
    generator = new_generator(FedGenConfig(), num_classes=2, width=len(features), rng=torch_stream(0, "g"))
    return {name: np.zeros_like(array) for name, array in generator.items()} | {"output.bias": np.array(features, np.float32)}


def test_the_latent_loss_by_hand() -> None:
    """Only label 1 is drawn, and z = (1, 2): logits 1 and 3, cross-entropy log(1 + e^-2), times the weight, 0.5. The features of the
    batch play no part."""
    model = linear(2, 2)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    received = fixed_generator([1.0, 2.0]) | {LABEL_PRIOR: np.array([0.0, 1.0], np.float32)}
    method = FedGen(weight=0.5, received=received, rng=torch_stream(0, "fedgen"))
    method.begin(model, white([0, 0, 1], num_pixels=2))
    penalty = method.penalty(step_of(model, torch.ones(3, 1, 1, 2), [0, 0, 1]))
    assert penalty is not None and penalty.item() == pytest.approx(0.5 * math.log1p(math.exp(-2)), abs=1e-6)
    assert method.finish(model).sent[LABEL_COUNTS].tolist() == [2, 1]


def test_a_client_learns_a_class_that_it_lacks_from_the_generator() -> None:
    """It has class 0 only, with features (1, 1); the others' class 1 has the features (0, 2), says the generator."""
    others = torch.tensor([[0.0, 2.0]])
    received = fixed_generator([0.0, 2.0]) | {LABEL_PRIOR: np.array([0.0, 1.0], np.float32)}
    predicted = []
    for method in (FEDAVG, FedGen(weight=1.0, received=received, rng=torch_stream(0, "fedgen"))):
        model = linear(2, 2)
        fit(model, white([0] * 8, num_pixels=2), method, epochs=50)
        with torch.no_grad():
            predicted.append([model.head(features).argmax(1).item() for features in (torch.ones(1, 2), others)])
    assert predicted == [[0, 0], [0, 1]]


def test_without_a_generator_there_is_no_latent_loss() -> None:
    model = linear(2, 2)
    method = FedGen(weight=1.0, received={}, rng=torch_stream(0, "fedgen"))
    method.begin(model, white([0], num_pixels=2))
    assert method.penalty(step_of(model, torch.ones(1, 1, 1, 2), [0])) is None


def test_the_generator_learns_from_the_heads_of_those_who_have_the_label() -> None:
    """Client 0 has label 0 only and client 1 label 1 only; each head is upside down for the label that its client lacks. Weighted by
    label counts, the ensemble knows both; with the counts exchanged it teaches the opposite."""
    right = np.array([[2.0, 0.0], [0.0, 0.0]], np.float32), np.zeros(2, np.float32)  # z_0 speaks for label 0
    left = np.array([[0.0, 0.0], [2.0, 0.0]], np.float32), np.zeros(2, np.float32)  # z_0 speaks for label 1
    config = FedGenConfig(steps=60, batch_size=16, hidden_width=16, noise_width=4, learning_rate=0.05, diversity=0.1)
    start = new_generator(config, num_classes=2, width=2, rng=torch_stream(0, "g"))
    for heads, wanted in (([right, left], 1.0), ([left, right], -1.0)):
        trained = train_generator(start, heads, np.array([[10, 0], [0, 10]]), config=config, rng=torch_stream(0, "t"))
        labels, noise = torch.arange(16) % 2, torch.randn(16, 4, generator=torch_stream(0, "n"))
        z = generate_features(to_state(trained), labels, noise, num_classes=2)[:, 0] * wanted
        assert (z > 0.5).all()  # so that the head that counts for either label says that label
    assert start["hidden.bias"].tolist() != trained["hidden.bias"].tolist()


def test_the_diversity_loss_spreads_the_features_of_a_label() -> None:
    head = np.array([[2.0, 0.0], [-2.0, 0.0]], np.float32), np.zeros(2, np.float32)
    spread = []
    for diversity in (0.0, 10.0):
        config = FedGenConfig(steps=50, batch_size=16, hidden_width=16, noise_width=4, learning_rate=0.05, diversity=diversity)
        start = new_generator(config, num_classes=2, width=2, rng=torch_stream(0, "g"))
        trained = train_generator(start, [head], np.array([[5, 5]]), config=config, rng=torch_stream(0, "t"))
        noise = torch.randn(64, 4, generator=torch_stream(0, "n"))
        z = generate_features(to_state(trained), torch.zeros(64, dtype=torch.int64), noise, num_classes=2)
        spread.append(float(z.std(0).mean()))
    assert spread[1] > 2 * spread[0]


# What the server does with what is sent


def test_what_a_client_of_each_method_has_to_send() -> None:
    state, model = {"scaffold": variates(0.0)}, to_arrays(linear(1, 1).state_dict())
    assert arrays_to_send("scaffold", state, model) is state["scaffold"]
    (counts,) = arrays_to_send("fedgen", {}, model).values()
    assert counts.shape == (1,) and counts.dtype == np.int64
    assert arrays_to_send("moon", {}, model) == {}


def test_the_servers_variate_is_the_mean_over_all_clients_however_many_there_are() -> None:
    """Two clients with c_i = 0.6 and 0: c = 0.3. With a third, whose c_i is 0, it is 0.2, and stays it when two of the three are away.

    The third then sends 0.3: c = 0.2 + 0.3 / 3.
    """

    def sent(value: float) -> Update:
        return Update(method="scaffold", arrays={}, extra={"w": np.array([value], np.float32)})

    def c(state: dict[str, dict[str, np.ndarray]]) -> float:
        return float(state["scaffold"]["w"][0])

    nothing = with_clients({}, ["fedavg"], lambda: [("w", torch.ones(1))])
    assert nothing == {}
    state = with_clients(nothing, ["scaffold", "scaffold"], lambda: [("w", torch.ones(1))])
    state = next_state(state, [sent(0.6), sent(0.0)], config=RunConfig(), server_round=1)
    assert c(state) == pytest.approx(0.3)
    state = with_clients(state, ["scaffold", "fedavg", "scaffold", "scaffold"], list)
    assert c(state) == pytest.approx(0.2)
    state = with_clients(state, ["scaffold"], list)
    assert c(state) == pytest.approx(0.2)
    assert c(next_state(state, [sent(0.3)], config=RunConfig(), server_round=2)) == pytest.approx(0.3)


def test_the_servers_state_follows_each_methods_own_clients() -> None:
    """Of four clients of SCAFFOLD one replies, with 0.4: c = 0 + 0.4 / 4. The client of FedGen has labels 1 and 2 in equal parts."""
    model = to_arrays(linear(2, 3).state_dict())
    updates = [
        Update(method="scaffold", arrays=model, extra={"w": np.array([0.4], np.float32)}),
        Update(method="fedgen", arrays=model, extra={LABEL_COUNTS: np.array([0, 5, 5])}),
        Update(method="fedgen", arrays=model, extra={LABEL_COUNTS: np.array([0, 0, 0])}),  # no images: it teaches nothing
        Update(method="moon", arrays=model, extra={}),
    ]
    before = with_clients(
        {}, ["scaffold", "fedgen", "fedgen", "moon", "scaffold", "scaffold", "scaffold"], lambda: [("w", torch.ones(1))]
    )
    config = RunConfig(fedgen=FedGenConfig(steps=3))
    after = next_state(before, updates, config=config, server_round=1)
    assert after["scaffold"]["w"].item() == pytest.approx(0.1)
    assert after["fedgen"][LABEL_PRIOR].tolist() == [0.0, 0.5, 0.5]
    assert before["scaffold"]["w"].item() == 0.0
    again = next_state(before, updates, config=config, server_round=1)
    assert all(np.array_equal(array, again["fedgen"][name]) for name, array in after["fedgen"].items())
    none = next_state(after, updates[3:], config=config, server_round=2)
    assert none.keys() == after.keys() and none["fedgen"] is after["fedgen"]
