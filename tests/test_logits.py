"""Logit adjustment and FedLC: offsets by hand, masked classes, and reductions to FedAvg."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from test_method_runs import federate, results
from test_methods import STEP, fit, linear, white
from torch import nn

from fbl_flower.config import RunConfig, parse_config
from fbl_flower.data.examples import Examples
from fbl_flower.federation.local import run_local
from fbl_flower.federation.wire import Reply
from fbl_flower.methods.choice import local_method
from fbl_flower.methods.fedavg import FEDAVG
from fbl_flower.methods.logits import LogitOffsets, fedlc, logit_adjustment
from fbl_flower.models import Classifier, new_classifier
from fbl_flower.params import to_arrays
from fbl_flower.seeding import torch_stream
from fbl_flower.training.loop import train

INF = float("inf")
KINDS = {"logit-adjustment": logit_adjustment, "fedlc": fedlc}


def offsets_of(method: LogitOffsets, labels: list[int], num_classes: int) -> list[float]:
    method.begin(linear(1, num_classes), white(labels))
    return method.adjust_logits(torch.zeros(1, num_classes))[0].tolist()


def test_offsets_by_hand() -> None:
    """Counts 16, 1, 0. Logit adjustment: 2 log(1 / 16) = -8 log 2. FedLC: 16^(-1/4) = 1/2, 1^(-1/4) = 1: -3 * 1 + 3 * 1/2 = -1.5."""
    labels = [0] * 16 + [1]
    adjusted = offsets_of(LogitOffsets(logit_adjustment(tau=2.0)), labels, 3)
    assert adjusted == pytest.approx([0.0, -8 * math.log(2), -INF])
    assert offsets_of(LogitOffsets(fedlc(tau=3.0)), labels, 3) == pytest.approx([0.0, -1.5, -INF])


@pytest.mark.parametrize("name", KINDS)
def test_the_name_makes_the_method_with_its_own_tau(name: str) -> None:
    config = parse_config({f"{name}.tau": 2.0})
    made = local_method(name, config, client=0, server_round=1, received={}, state=None)
    assert isinstance(made, LogitOffsets)
    labels = [0] * 5 + [2]
    assert offsets_of(made, labels, 3) == offsets_of(LogitOffsets(KINDS[name](tau=2.0)), labels, 3)
    by_default = local_method(name, RunConfig(), client=0, server_round=1, received={}, state=None)
    assert isinstance(by_default, LogitOffsets)
    assert offsets_of(by_default, labels, 3) == offsets_of(LogitOffsets(KINDS[name](tau=1.0)), labels, 3)


def test_a_step_of_balanced_softmax_by_hand() -> None:
    """Labels 0, 0, 0, 1 of three classes, all logits 0: adjusted p = (3/4, 1/4, 0), the shares of the labels. So no bias moves.
    FedAvg moves them by lr (share - 1/3) = 0.1 (3/4 - 1/3), 0.1 (1/4 - 1/3), -0.1 / 3. Its loss is reported: log 3."""
    model = linear(1, 3)
    loss = fit(model, white([0, 0, 0, 1]), LogitOffsets(logit_adjustment(tau=1.0)))
    torch.testing.assert_close(model.head.bias.detach(), torch.zeros(3), atol=1e-7, rtol=0)
    assert loss == pytest.approx(math.log(3))
    plain = linear(1, 3)
    fit(plain, white([0, 0, 0, 1]), FEDAVG)
    torch.testing.assert_close(plain.head.bias.detach(), torch.tensor([0.1 * 5 / 12, -0.1 / 12, -0.1 / 3]))


def test_a_step_of_fedlc_by_hand() -> None:
    """Counts 16 and 1, tau 2: offsets -1 and -2, so p(0) = 1 / (1 + e^-1) = 0.7311; bias 0 moves by 0.1 (16/17 - p(0))."""
    model = linear(1, 2)
    fit(model, white([0] * 16 + [1]), LogitOffsets(fedlc(tau=2.0)), batch_size=17)
    p = 1 / (1 + math.exp(-1))
    assert model.head.bias[0].item() == pytest.approx(0.1 * (16 / 17 - p), abs=1e-7)


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_class_is_left_alone(name: str) -> None:
    """Its weights and bias have no gradient; those of FedAvg are pushed down."""
    labels = [0] * 6 + [2] * 2
    for method, untouched in ((LogitOffsets(KINDS[name](tau=1.0)), True), (FEDAVG, False)):
        model = linear(1, 4)
        fit(model, white(labels), method, epochs=5)
        moved = torch.cat([model.head.weight.detach()[[1, 3]].flatten(), model.head.bias.detach()[[1, 3]]]).abs()
        assert bool((moved == 0).all()) is untouched


def trained(
    method: object, labels: list[int], *, precision: str = "fp32", aligned: bool = True
) -> tuple[list[torch.Tensor], float]:
    """Train the tiny network, with alignment vectors and drop, on images half of which count as synthetic."""
    model: Classifier = new_classifier(parse_config({"model.name": "tiny"}).model, channels=1, num_classes=5, seed=1)
    images = torch.randint(0, 256, (len(labels), 1, 8, 8), generator=torch_stream(0, "x")).byte()
    examples = Examples(images=images, labels=torch.tensor(labels), synthetic=torch.arange(len(labels)) % 2 == 0)
    vectors = nn.Parameter(torch.zeros(5, model.width)) if aligned else None
    result = train(
        model, examples, config=replace(STEP, precision=precision, epochs=2), augmentation=None, rng=torch_stream(0, "t"),
        embeddings=vectors, embedding_learning_rate=0.1, drop=0.5, method=method,  # type: ignore[arg-type]
    )  # fmt: skip
    tensors = [*model.state_dict().values(), *([vectors.detach()] if vectors is not None else [])]
    return tensors, result.loss


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("each", [1, 3])
def test_equal_counts_of_all_classes_are_fedavg(name: str, each: int) -> None:
    labels = list(range(5)) * each
    (tensors, loss), (plain, plain_loss) = (trained(m, labels) for m in (LogitOffsets(KINDS[name](tau=1.7)), FEDAVG))
    assert loss == plain_loss
    assert all(torch.equal(a, b) for a, b in zip(tensors, plain, strict=True))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.sampled_from(sorted(KINDS)), st.sampled_from(["fp32", "bf16"]))
def test_whatever_a_client_has_nothing_is_nan(labels: list[int], name: str, precision: str) -> None:
    tensors, loss = trained(LogitOffsets(KINDS[name](tau=3.0)), labels, precision=precision)
    assert math.isfinite(loss) and all(bool(t.isfinite().all()) for t in tensors)


@pytest.mark.parametrize("name", KINDS)
def test_a_client_without_images_can_begin(name: str) -> None:
    method = LogitOffsets(KINDS[name](tau=1.0))
    model = linear(1, 3)
    before = to_arrays(model.state_dict())
    method.begin(model, white([]))
    finished = method.finish(model)
    assert finished.state is None and finished.sent == {}
    assert all(np.array_equal(before[name], array) for name, array in to_arrays(model.state_dict()).items())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("balancing", [True, False], ids=["balanced", "own-data"])
def test_a_federation_of_it(tmp_path: Path, name: str, balancing: bool) -> None:
    """tau 0 is FedAvg, bit for bit; tau 1 is not; and nothing beside the model travels."""
    settings = quick(tmp_path, data__num_private=120, balancing__enabled=balancing, balancing__max_filled_share=0.3)
    own = settings | {"method.name": name}
    fedavg = run_local(settings)
    assert results(run_local(own | {f"{name}.tau": 0.0}).run_dir) == results(fedavg.run_dir)
    run_dir, messages = federate(own)
    assert results(run_dir) != results(fedavg.run_dir)
    assert all(not Reply.from_record(m.content).extras for m in messages if "metrics" in m.content)
    assert results(run_local(own).run_dir) == results(run_dir)
