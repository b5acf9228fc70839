"""The filter of implausible synthetic images: what falls, what takes its place, and what is remembered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import quick, run_and_kill
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fbl_flower.balancing.plan import make_plan
from fbl_flower.balancing.plausibility import most_likely, near_real
from fbl_flower.balancing.state import BalancingState, StateStore
from fbl_flower.commands.experiments import read_rows
from fbl_flower.config import BalancingConfig, ModelConfig, RunConfig, TrainConfig, parse_config
from fbl_flower.data.examples import Examples, concatenate
from fbl_flower.errors import ConfigError
from fbl_flower.federation import client as client_app
from fbl_flower.federation.local import Outcome, run_local
from fbl_flower.models import new_classifier
from fbl_flower.params import Arrays, to_arrays
from fbl_flower.seeding import numpy_stream, torch_stream
from fbl_flower.training.evaluation import per_image_losses, predict
from fbl_flower.training.filtering import choose_fill, filter_row, filtered
from fbl_flower.training.loop import Augmentation
from fbl_flower.training.prepare import ClientData
from fbl_flower.training.round import LocalRoundResult, run_local_round

# The two checks


def test_the_least_likely_share_of_each_class_falls() -> None:
    """Share 0.4: of five images of class 0 the two with losses .9 and .8 fall; of two of class 1 floor(0.8) = 0."""
    labels = torch.tensor([0, 1, 0, 0, 1, 0, 0])
    losses = torch.tensor([0.9, 5.0, 0.1, 0.8, 6.0, 0.2, 0.3])
    assert most_likely(labels, losses, share=0.4).tolist() == [False, True, True, False, True, True, True]
    assert most_likely(labels, losses, share=0.0).all() and not most_likely(labels, losses, share=1.0).any()


def test_of_equally_likely_images_the_last_fall() -> None:
    assert most_likely(torch.zeros(10, dtype=torch.int64), torch.ones(10), share=0.3).tolist() == [True] * 7 + [False] * 3


def near(synthetic: list[float], labels: list[int], *, share: float) -> list[bool]:
    """Compare with three real images of class 0, at 0, 1 and 3, and with one of class 1, at 0; there is none of class 2."""
    return near_real(
        torch.tensor(synthetic)[:, None],
        torch.tensor(labels),
        real_features=torch.tensor([0.0, 1.0, 3.0, 0.0])[:, None],
        real_labels=torch.tensor([0, 0, 0, 1]),
        share=share,
    ).tolist()


@pytest.mark.parametrize(
    ("share", "passes"),
    [
        (0.24, [True, True, True]),  # 1 / (3 + 1) is the least there is: three images are too few to say so
        (0.25, [True, True, False]),
        (0.5, [True, False, False]),
        (1.0, [False, False, False]),
    ],
)
def test_what_is_further_from_real_images_than_those_from_one_another_falls(share: float, passes: list[bool]) -> None:
    """Class 0: the real ones at 0, 1, 3 are 1, 1, 2 from their nearest. Synthetic ones at 0.5, 4.5 and 6 are 0.5, 1.5 and 3
    from the nearest real one; 3, 1 and 0 of the real distances are at least that: (1 + 3) / 4, (1 + 1) / 4 and (1 + 0) / 4."""
    assert near([0.5, 4.5, 6.0], [0, 0, 0], share=share) == passes


def test_a_class_with_one_real_image_or_none_has_no_check() -> None:
    assert near([100.0, 100.0, 100.0], [1, 2, 0], share=0.9) == [True, True, False]


def test_images_that_come_from_where_the_real_ones_do_fall_at_the_rate_of_the_share() -> None:
    """400 real ones and 1000 of the same kind: standard deviation of the share about sqrt(.2 * .8 * (1 / 400 + 1 / 1000)) = 0.024."""
    rng = torch_stream(0, "features")
    real, same = torch.randn(400, 8, generator=rng), torch.randn(1000, 8, generator=rng)
    zeros = torch.zeros(1000, dtype=torch.int64)
    passed = near_real(same, zeros, real_features=real, real_labels=zeros[:400], share=0.2)
    assert 0.12 < 1 - passed.double().mean().item() < 0.28
    assert not near_real(same + 5, zeros, real_features=real, real_labels=zeros[:400], share=0.2).any()


# What takes their place


def images(labels: list[int], *, synthetic: bool, name: str) -> Examples:
    pixels = torch.randint(0, 256, (len(labels), 1, 8, 8), dtype=torch.uint8, generator=torch_stream(0, name))
    flags = torch.full((len(labels),), synthetic)
    return Examples(images=pixels, labels=torch.tensor(labels, dtype=torch.int64), synthetic=flags)


def client(counts: list[int]) -> ClientData:
    """A client with random images, real and synthetic."""
    plan = make_plan(np.array(counts), tie_break=numpy_stream(5, "plan", 3))
    return ClientData(
        client=3, num_classes=len(counts), plan=plan, augmentation=Augmentation(shift=1, flip=False),
        real=images([c for c, n in enumerate(counts) for _ in range(n)], synthetic=False, name="real"),
        fill=images([c for c, n in enumerate(plan.fill) for _ in range(n)], synthetic=True, name="fill"),
    )  # fmt: skip


def test_a_real_image_takes_the_place_of_each_that_falls() -> None:
    """N = 24, B = 6: keep 6, 5, 1, 0 and fill 0, 1, 5, 6. Without three images of class 2 and one of class 3, class 0 keeps 10."""
    data = client([18, 5, 1, 0])
    passes = torch.ones(12, dtype=torch.bool)
    passes[[1, 2, 5, 6]] = False
    less = filtered(data, passes, seed=5)
    assert less.plan is not None
    assert (less.plan.keep.tolist(), less.plan.fill.tolist()) == ([10, 5, 1, 0], [0, 1, 2, 5])
    assert torch.equal(less.fill.images, data.fill.images[passes])
    assert filter_row(data, passes) == {"made": [0, 1, 5, 6], "passed": [0, 1, 2, 5]}


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_the_plan_stays_exact_whatever_falls(counts: list[int], seed: int) -> None:
    data = client(counts)
    passes = torch.from_numpy(np.random.default_rng(seed).random(len(data.fill)) < 0.5)
    less = filtered(data, passes, seed=5)
    assert less.plan is not None and data.plan is not None
    assert less.plan.num_balanced == sum(counts)
    assert (less.plan.fill == less.fill.counts(len(counts)).numpy()).all()
    assert (less.plan.fill == data.fill.labels[passes].bincount(minlength=len(counts)).numpy()).all()
    assert (less.plan.keep >= data.plan.keep).all() and (less.plan.keep <= np.array(counts)).all()


def test_a_choice_among_other_images_is_no_choice() -> None:
    data = client([18, 5, 1, 0])
    assert filtered(data, None, seed=5) is data
    assert filtered(data, torch.zeros(11, dtype=torch.bool), seed=5) is data


# A client's rounds

CONFIG = RunConfig(
    seed=5, device="cpu", model=ModelConfig(name="tiny"), train=TrainConfig(batch_size=8, precision="fp32"),
    balancing=BalancingConfig(replay_period=2, filter="model", filter_share=0.5),
)  # fmt: skip


def with_balancing(**changes: Any) -> RunConfig:
    return replace(CONFIG, balancing=replace(CONFIG.balancing, **changes))


def received(seed: int = 0) -> Arrays:
    return to_arrays(new_classifier(CONFIG.model, channels=1, num_classes=4, seed=seed).state_dict())


def rounds(
    data: ClientData, config: RunConfig = CONFIG, *, last: int = 3, state: BalancingState | None = None, first: int = 1
) -> list[LocalRoundResult]:
    """Let a client train in each of the rounds, always from the same model."""
    results = []
    for server_round in range(first, last + 1):
        results.append(run_local_round(received(), data, state, config=config, server_round=server_round))
        state = results[-1].state
    return results


def same(one: Arrays, two: Arrays) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_round_1_takes_everything_and_the_first_replay_judges_by_the_received_model() -> None:
    """Period 2: round 3 replays. At share 0.5 of fill 0, 1, 5, 6 fall 0, 0, 2, 3, and class 0 keeps 6 + 5 real images."""
    data = client([18, 5, 1, 0])
    one, two, three = (result.state for result in rounds(data))
    assert one is not None and two is not None and three is not None
    assert one.kept_fill is None and two.kept_fill is None and three.kept_fill is not None
    losses = per_image_losses(new_classifier(CONFIG.model, channels=1, num_classes=4, seed=0), data.fill)
    fallen = [1 + int(i) for i in losses[1:6].topk(2).indices] + [6 + int(i) for i in losses[6:].topk(3).indices]
    assert (~three.kept_fill).nonzero().flatten().tolist() == sorted(fallen)
    assert data.real.labels[three.kept].bincount(minlength=4).tolist() == [11, 5, 1, 0]
    assert [result.num_examples for result in rounds(data)] == [24, 24, 24]


def test_a_client_trains_on_what_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Examples] = []
    from fbl_flower.training import round as module

    monkeypatch.setattr(module, "concatenate", lambda *parts: seen.append(concatenate(*parts)) or seen[-1])
    data = client([18, 5, 1, 0])
    state = rounds(data, last=4)[-1].state
    assert state is not None and state.kept_fill is not None and state.chosen_in == 3
    for examples in seen[2:]:
        assert torch.equal(examples.images[examples.synthetic], data.fill.images[state.kept_fill])
        assert torch.equal(examples.images[~examples.synthetic], data.real.images[state.kept])
    assert [int(examples.synthetic.sum()) for examples in seen] == [12, 12, 7, 7]


def test_what_passed_holds_until_the_next_replay_and_may_then_come_back() -> None:
    """A client that joins in round 2 is judged at once; another model at the replay in round 4 finds other images least likely."""
    data = client([18, 5, 1, 0])
    two, three = (result.state for result in rounds(data, first=2))
    four = run_local_round(received(seed=9), data, three, config=CONFIG, server_round=4).state
    assert two is not None and three is not None and four is not None
    assert two.kept_fill is not None and three.kept_fill is not None and four.kept_fill is not None
    assert torch.equal(three.kept_fill, two.kept_fill) and torch.equal(three.kept, two.kept) and three.chosen_in == 2
    assert bool((four.kept_fill & ~three.kept_fill).any()) and int(four.kept_fill.sum()) == 7 and four.chosen_in == 4


def test_neighbours_compares_with_all_real_images_of_the_received_model() -> None:
    """Class 1 is filled with copies of its own images, at distance 0, and with one white image."""
    data = client([40, 6, 0, 0])
    assert data.plan is not None and data.plan.fill.tolist()[:2] == [0, 6]
    pixels = data.fill.images.clone()
    pixels[:5] = data.real.images[40:45]
    pixels[5:] = 255
    data = replace(data, fill=replace(data.fill, images=pixels))
    config = with_balancing(filter="neighbours", filter_share=0.15)  # 1 / 7 = 0.143: six real images are enough
    state = rounds(data, config, first=2)[0].state
    assert state is not None and state.kept_fill is not None
    assert (~state.kept_fill).nonzero().flatten().tolist() == [5]  # classes 2 and 3 are missing, and have no check
    model = new_classifier(CONFIG.model, channels=1, num_classes=4, seed=0)
    features, real = (predict(model, e.images)[0] for e in (data.fill, data.real))
    own = torch.cdist(real[40:], real[40:]).fill_diagonal_(torch.inf).amin(1)
    assert torch.cdist(features[5:6], real[40:]).min() > own.max()  # what the choice rests on


@pytest.mark.parametrize("check", ["model", "neighbours"])
def test_a_share_of_nothing_is_no_filter_bit_for_bit(check: str) -> None:
    data = client([18, 5, 1, 0])
    filtering = rounds(data, with_balancing(filter=check, filter_share=0.0))
    plain = rounds(data, with_balancing(filter="none"))
    for one, two in zip(filtering, plain, strict=True):
        assert same(one.arrays, two.arrays)
        assert one.state is not None and two.state is not None and two.state.kept_fill is None
        assert torch.equal(one.state.kept, two.state.kept)
    changed = rounds(data)
    assert same(changed[1].arrays, plain[1].arrays) and not same(changed[2].arrays, plain[2].arrays)


@pytest.mark.parametrize("counts", [[6, 6, 6, 6], [0, 0, 0, 0]])
def test_a_client_without_synthetic_images_has_nothing_to_filter(counts: list[int]) -> None:
    data = client(counts)
    for one, two in zip(rounds(data), rounds(data, with_balancing(filter="none")), strict=True):
        assert same(one.arrays, two.arrays)
        assert one.state is not None and one.state.kept_fill is None


def test_images_made_since_the_last_choice_call_for_a_new_one() -> None:
    """In round 2 only half of the images were there; in round 3, before any replay is due, all are."""
    whole = client([18, 5, 1, 0])
    half = filtered(whole, torch.arange(12) % 2 == 0, seed=5)
    state = rounds(half, first=2, last=2)[0].state
    later = rounds(whole, first=3, state=state)[0]
    assert later.state is not None and later.state.kept_fill is not None
    assert later.state.chosen_in == 3 and len(later.state.kept_fill) == 12 and later.num_examples == 24


def test_images_of_another_generator_are_judged_anew() -> None:
    """In round 3, before any replay is due: what passed in round 2 were other images."""
    data = replace(client([18, 5, 1, 0]), generator="one")
    state = rounds(data, first=2, last=2)[0].state
    pixels = images(data.fill.labels.tolist(), synthetic=True, name="retrained").images
    other = replace(data, fill=replace(data.fill, images=pixels), generator="other")
    same_still, anew = (rounds(d, first=3, state=state)[0].state for d in (data, other))
    assert state is not None and same_still is not None and anew is not None
    assert same_still.chosen_in == 2 and torch.equal(same_still.kept_fill, state.kept_fill)
    expected = choose_fill(
        new_classifier(CONFIG.model, channels=1, num_classes=4, seed=0), other.real, other.fill, config=CONFIG, server_round=3
    )
    assert anew.chosen_in == 3 and torch.equal(anew.kept_fill, expected) and not torch.equal(expected, state.kept_fill)


def test_an_unknown_filter_is_an_error() -> None:
    model, data = new_classifier(CONFIG.model, channels=1, num_classes=4, seed=0), client([18, 5, 1, 0])
    with pytest.raises(ValueError, match="'magic'; allowed: none | model | neighbours"):
        choose_fill(model, data.real, data.fill, config=with_balancing(filter="magic"), server_round=2)


# What is remembered

STATE = BalancingState(kept=torch.tensor([True, False]), chosen_in=4, embeddings=torch.ones(2, 3))


@pytest.mark.parametrize("kept_fill", [None, torch.tensor([True, False, True]), torch.zeros(0, dtype=torch.bool)])
def test_the_choice_survives_a_restart(tmp_path: Path, kept_fill: torch.Tensor | None) -> None:
    StateStore(tmp_path).save(replace(STATE, kept_fill=kept_fill), server_round=4, checkpoint_round=0)
    state = StateStore(tmp_path).load(before_round=5)
    assert state is not None and (state.kept_fill is None) == (kept_fill is None)
    if kept_fill is not None and state.kept_fill is not None:
        assert torch.equal(state.kept_fill, kept_fill) and state.kept_fill.dtype == torch.bool
    assert torch.equal(state.kept, STATE.kept) and state.chosen_in == 4


def test_a_state_from_before_there_was_a_filter_is_read(tmp_path: Path) -> None:
    numbers = {"chosen_in": "4", "synthetic_accuracy": "nan", "aligned_accuracy": "0.5"}
    save_file({"kept": STATE.kept, "embeddings": STATE.embeddings}, tmp_path / "round-000004.safetensors", metadata=numbers)
    state = StateStore(tmp_path).newest()
    assert state is not None and state.kept_fill is None and state.aligned_accuracy == 0.5


@pytest.fixture(autouse=True)
def _forget_clients() -> None:
    client_app._prepared.cache_clear()


def metrics(outcome: Outcome) -> bytes:
    return (outcome.run_dir / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("check", ["model", "neighbours"])
def test_a_killed_run_goes_on_with_the_same_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    """Choices in rounds 1, 4 and 7, a checkpoint after 4, a kill in 6: what passed in round 4 has to be known in rounds 5 and 6."""
    settings = quick(
        tmp_path,
        num_server_rounds=7,
        checkpoint_every=4,
        fraction_train=1.0,
        balancing__replay_period=3,
        balancing__filter=check,
        balancing__filter_share=0.4,
    )
    unbroken = run_local(settings)
    killed = run_and_kill(settings, monkeypatch, in_round=6)
    client_app._prepared.cache_clear()
    resumed = run_local(settings | {"resume": str(killed)})
    assert metrics(resumed) == metrics(unbroken)
    plain = run_local(settings | {"balancing.filter": "none"})
    one, other = ([json.loads(line) for line in metrics(outcome).splitlines()] for outcome in (unbroken, plain))
    assert one[:4] == other[:4] and one[4] != other[4]  # rounds 0 to 3; from the first replay on they differ
    assert all(row["num_examples"] == row["num_real"] == 300 for row in one[1:])
    folder = tmp_path / "state" / "clients"
    assert not list((folder / plain.run_dir.name).rglob("filter.jsonl"))
    logs = sorted((folder / unbroken.run_dir.name).rglob("filter.jsonl"))
    rows = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    assert [[row["round"] for row in one] for one in rows] == [[4, 7]] * 4
    made, passed = (sum(sum(row[key]) for one in rows for row in one) for key in ("made", "passed"))
    assert 0 < passed < made


# Settings


@pytest.mark.parametrize("change", [{"balancing.replay-period": 0}, {"balancing.filling": False}])
def test_a_filter_that_could_never_work_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="balancing.filter: 'model' works at replays") as caught:
        parse_config({"balancing.filter": "model"} | change)
    assert len(caught.value.problems) == 1
    assert parse_config(change).balancing.filter == "none"


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("filter-mnist5k", {"generator.trained-on": "digits", "num-server-rounds": 20}),
        ("filter-cifar10", {"data.alpha": 0.1, "num-server-rounds": 40, "data.num-private": 10000}),
    ],
)
def test_the_experiments_differ_in_the_filter_alone(name: str, shared: dict[str, Any]) -> None:
    rows = read_rows([Path(__file__).parents[1] / "experiments" / name])
    differing = {"balancing.filter", "balancing.max-filled-share"}
    assert len({tuple(sorted(row.settings.items())) for row in rows}) == len(rows) == 4
    rest = [{key: value for key, value in row.settings.items() if key not in differing} for row in rows]
    assert all(one == rest[0] for one in rest) and rest[0].items() >= shared.items()
