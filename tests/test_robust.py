"""Robust aggregation: each rule by hand, what it guarantees, which settings go together, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import quick, watch_log
from hypothesis import given
from hypothesis import strategies as st
from test_attendance import federate
from test_federated_generator import few

from fbl_flower.config import AggregationConfig, parse_config
from fbl_flower.config.sections import RULES
from fbl_flower.errors import ConfigError, RunFailed
from fbl_flower.federation.local import run_local
from fbl_flower.generation.federated import CLASS_CODES
from fbl_flower.methods.robust import aggregate, clipped_shares, distances, geometric_median, krum_choice, trimmed_mean
from fbl_flower.params import Arrays, weighted_mean
from fbl_flower.reporting.rundir import RunDirectory

ROBUST = [rule for rule in RULES if rule != "mean"]
UNWEIGHTED = ["trimmed-mean", "median", "krum"]


def f32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def combine(rule: str, models: list[Arrays], *, weights: list[float] | None = None, **settings: Any) -> Arrays:
    received = {name: np.zeros_like(array) for name, array in models[0].items()}
    return aggregate(received, models, weights or [1.0] * len(models), AggregationConfig(rule=rule, **settings))


# -- by hand -------------------------------------------------------------------------------------------------------------------


def test_mean_is_the_weighted_mean() -> None:
    models = [{"w": f32(1, 2), "n": np.array(3)}, {"w": f32(2, 9), "n": np.array(8)}]
    found, expected = combine("mean", models, weights=[1, 2]), weighted_mean(models, [1, 2])
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def test_updates_are_clipped_to_a_norm() -> None:
    """From (1, 0): updates (3, 4) and (0, 1), weights 3 and 1, norm 2: (1.2, 1.6) 3/4 + (0, 1) 1/4 = (0.9, 1.45)."""
    received, models = {"w": f32(1, 0)}, [{"w": f32(4, 4)}, {"w": f32(1, 1)}]
    after = aggregate(received, models, [3, 1], AggregationConfig(rule="clipped", clip_norm=2.0))
    np.testing.assert_allclose(after["w"], [1.9, 1.45], rtol=1e-6)


def test_without_a_norm_it_is_the_median_of_the_round() -> None:
    """Norms 1, 2 and 100: the limit is 2."""
    np.testing.assert_allclose(clipped_shares(np.array([1.0, 2.0, 100.0]), [1, 1, 2], 0.0), [1 / 4, 1 / 4, 2 / 4 / 50])
    assert clipped_shares(np.zeros(3), [1, 1, 1], 0.0) == pytest.approx([1 / 3] * 3)
    assert clipped_shares(np.array([0.0, 0.0, 5.0]), [1, 1, 1], 0.0)[2] == 0
    assert clipped_shares(np.array([1.0, np.inf]), [1, 1], 1.0) == [0.5, 0.0]


def test_wide_clipping_is_the_mean() -> None:
    models = [{"w": f32(3, 4)}, {"w": f32(0, 1)}]
    np.testing.assert_allclose(combine("clipped", models, weights=[3, 1], clip_norm=1e3)["w"], [2.25, 3.25], rtol=1e-6)


def test_trimmed_mean_leaves_out_both_ends() -> None:
    stack = np.array([[1.0, 9.0], [2.0, -50.0], [3.0, 4.0], [40.0, 5.0], [-9.0, 6.0]])
    np.testing.assert_allclose(trimmed_mean(stack, 0.2), [2.0, 5.0])
    np.testing.assert_allclose(trimmed_mean(stack, 0.0), stack.mean(axis=0))
    np.testing.assert_allclose(trimmed_mean(stack, 0.49), np.median(stack, axis=0))


@pytest.mark.parametrize(
    ("number", "trim", "left"), [(10, 0.3, 4), (10, 0.21, 4), (4, 0.49, 2), (3, 0.1, 1), (2, 0.4, 2), (1, 0.2, 1)]
)
def test_trim_is_rounded_up_and_leaves_somebody(number: int, trim: float, left: int) -> None:
    values = np.arange(number, dtype=np.float64)
    middle = values[(number - left) // 2 : (number + left) // 2]
    assert trimmed_mean(values**3, trim) == pytest.approx(np.mean(middle**3))


def test_median_of_each_number() -> None:
    models = [{"w": f32(1, 5)}, {"w": f32(2, -7)}, {"w": f32(900, 6)}]
    np.testing.assert_array_equal(combine("median", models)["w"], [2, 5])
    np.testing.assert_array_equal(combine("median", models[:2])["w"], [1.5, -1])


def test_krum_keeps_those_with_near_neighbours() -> None:
    """At 0, 1, 3, 4 and 100, f = 1: scores of the 2 nearest are 1 + 9, 1 + 4, 1 + 4, 1 + 9, and far more for the last."""
    positions = np.array([0.0, 1.0, 3.0, 4.0, 100.0])
    apart = np.abs(positions[:, None] - positions[None, :])
    assert krum_choice(apart, 1) == [1, 1, 1, 1, 0]
    assert krum_choice(apart, 2) == [1, 1, 1, 0, 0]  # one neighbour each: 1, 1, 1, 1
    assert krum_choice(apart[:1, :1], 1) == [1]
    models = [{"w": f32(position)} for position in positions]
    np.testing.assert_array_equal(combine("krum", models, attackers=1)["w"], [2])


def test_krum_scores_are_those_of_flower() -> None:
    """Of the squared distances to the n - f - 2 nearest others; Flower leaves to the user how many it keeps, here n - f."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.multikrum import select_multikrum

    rng = np.random.default_rng(0)
    for number, attackers in ((5, 1), (9, 3), (10, 2)):
        models = [{"w": rng.normal(size=4) * (1 + 5 * (k < attackers))} for k in range(number)]
        contents = [
            RecordDict({"a": ArrayRecord({name: Array(array) for name, array in model.items()}), "m": MetricRecord({"k": k})})
            for k, model in enumerate(models)
        ]
        kept = select_multikrum(contents, attackers, number - attackers)
        mine = krum_choice(np.array([distances(models, model) for model in models]), attackers)
        assert {int(record["m"]["k"]) for record in kept} == set(np.flatnonzero(mine).tolist())  # type: ignore[index, arg-type]


def test_the_geometric_median_of_a_triangle_is_its_fermat_point() -> None:
    """Of (0, 0), (4, 0) and (2, 3): all sides are seen at 120 degrees, at (2, 2 / sqrt 3)."""
    models = [{"w": np.array(point)} for point in ((0.0, 0.0), (4.0, 0.0), (2.0, 3.0))]
    np.testing.assert_allclose(geometric_median(models, [1, 1, 1])["w"], [2, 2 / np.sqrt(3)], atol=1e-3)


def test_the_geometric_median_goes_to_more_than_half_of_the_weights() -> None:
    models = [{"w": np.array([0.0])}, {"w": np.array([1.0])}, {"w": np.array([1e6])}]
    np.testing.assert_allclose(geometric_median(models, [1, 1, 1])["w"], [1.0], atol=1e-3)
    np.testing.assert_allclose(geometric_median(models, [5, 2, 2])["w"], [0.0], atol=1e-3)


def test_distances_are_over_all_arrays_but_counts() -> None:
    models = [{"w": f32(3, 0), "v": f32(4), "n": np.array(7)}]
    assert distances(models, {"w": f32(0, 0), "v": f32(0), "n": np.array(0)}) == [5]
    assert distances([{"w": np.full(4, 1e300)}], {"w": np.zeros(4)}) == [np.inf]


@pytest.mark.parametrize("rule", ROBUST)
def test_dtypes_stay_and_counts_are_rounded(rule: str) -> None:
    models = [{"w": f32(k, k), "n": np.array(n), "h": np.ones((), np.float16)} for k, n in ((0, 1), (1, 2), (2, 5), (3, 9))]
    after = combine(rule, models)
    assert {name: array.dtype for name, array in after.items()} == {name: array.dtype for name, array in models[0].items()}
    assert {name: array.shape for name, array in after.items()} == {"w": (2,), "n": (), "h": ()}


@pytest.mark.parametrize("rule", ROBUST)
def test_clients_without_images_do_not_count(rule: str) -> None:
    models = [{"w": f32(1, 2)}, {"w": f32(1, 2)}, {"w": f32(9, 9)}, {"w": f32(9, 9)}, {"w": f32(9, 9)}]
    after = combine(rule, models, weights=[1, 1, 0, 0, 0], clip_norm=100.0)
    np.testing.assert_allclose(after["w"], [1, 2])
    with pytest.raises(ValueError, match="weights"):
        combine(rule, models, weights=[0.0] * 5)


# -- what holds for all of them ------------------------------------------------------------------------------------------------

SMALL = st.floats(-4, 4, width=32)
ANY = st.floats(-(2.0**127), 2.0**127, width=32) | SMALL
SETTINGS = {"trim": 0.3, "attackers": 3}


@given(
    st.sampled_from(ROBUST),
    st.lists(st.tuples(SMALL, SMALL), min_size=7, max_size=7),
    st.lists(st.tuples(ANY, ANY), max_size=3),
)
def test_hostile_replies_move_the_result_by_a_bounded_step(
    rule: str, honest: list[tuple[float, float]], hostile: list[tuple[float, float]]
) -> None:
    """Up to 3 of 10. The worst bound is Krum's: a chosen model is within sqrt(n - f - 2) diameters of an honest one."""
    honest_models = [{"w": f32(*point)} for point in honest]
    models = [{"w": f32(*point)} for point in hostile] + honest_models
    after = combine(rule, models, **SETTINGS)["w"].astype(np.float64)
    points = np.array(honest)
    diameter = max(np.linalg.norm(a - b) for a in points for b in points)
    if rule == "clipped":  # each update is cut to the median of the norms, which is at most the largest honest one
        assert np.linalg.norm(after) <= np.linalg.norm(points, axis=1).max() * (1 + 1e-5) + 1e-5
        return
    slack = 1e-5 + 1e-5 * np.abs(points).max()
    if rule in ("median", "trimmed-mean"):
        assert (points.min(axis=0) - slack <= after).all() and (after <= points.max(axis=0) + slack).all()
    assert np.linalg.norm(after - points[0]) <= (1 + np.sqrt(5)) * diameter + slack


@given(st.sampled_from(ROBUST), st.permutations(range(5)), st.integers(0, 9))
def test_the_order_of_clients_decides_nothing(rule: str, order: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    models = [{"w": rng.normal(size=3).astype(np.float32), "v": rng.normal(size=(2, 2)).astype(np.float32)} for _ in order]
    weights = rng.uniform(1, 9, size=5).tolist()
    one, other = (
        combine(rule, models, weights=weights),
        combine(rule, [models[k] for k in order], weights=[weights[k] for k in order]),
    )
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6)


@given(st.sampled_from(ROBUST), st.lists(SMALL, min_size=1, max_size=4), st.integers(1, 6))
def test_equal_replies_give_that_reply(rule: str, values: list[float], number: int) -> None:
    model = {"w": f32(*values), "n": np.array(11)}
    after = combine(rule, [model] * number)
    np.testing.assert_allclose(after["w"], model["w"], rtol=1e-6)
    assert after["n"] == 11


@pytest.mark.parametrize("rule", UNWEIGHTED)
def test_a_false_number_of_images_changes_nothing(rule: str) -> None:
    models = [{"w": f32(k**2)} for k in range(5)]
    assert combine(rule, models) == combine(rule, models, weights=[1e9, 1, 1, 1, 1])


# -- settings ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"aggregation__rule": "average"}, "aggregation.rule: got 'average'"),
        ({"method__name": "scaffold"}, "method.name: scaffold does not work with aggregation.rule = 'median'"),
        ({"clients__methods": "fedgen=0.25, moon=0.25"}, "method.name: fedgen does not work"),
        ({"method__name": "feddyn"}, "method.name: feddyn does not work"),
        ({"balancing__average_embeddings": True}, "balancing.average-embeddings: true"),
        ({"privacy__clip_norm": 1.0, "aggregation__weight_by": "equal"}, "aggregation.rule: expected 'mean' with privacy.clip-norm"),
        ({"aggregation__rule": "krum"}, "aggregation.attackers: got 1, for which krum needs 5 clients in a round, and fraction-train gives 2"),
        (
            {"aggregation__rule": "krum", "generator__name": "federated", "num_clients": 9, "fraction_train": 1.0},
            "krum needs 5 clients in a round, and federated-generator.fraction-train gives 4",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_work_together(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    settings = {"aggregation__rule": "median", "federated_generator__fraction_train": 0.4} | settings
    with pytest.raises(ConfigError, match=problem) as found:
        parse_config(quick(tmp_path, **settings))
    assert len(found.value.problems) == 1


def test_a_node_whose_method_sends_more_is_left_out(tmp_path: Path) -> None:
    rows, _ = federate(
        tmp_path, lambda _: {1, 2, 3, 4}, {2: {"method": "scaffold"}}, num_server_rounds=1, aggregation__rule="median"
    )
    assert rows[0]["clients"] == [0, 2, 3]
    assert rows[0]["left_out"] == {"1": "its method, scaffold, does not work with aggregation.rule = 'median'"}


# -- runs ----------------------------------------------------------------------------------------------------------------------

RUN = {
    "num_clients": 5,
    "fraction_train": 1.0,
    "num_server_rounds": 9,
    "data__partition": "iid",
    "data__num_private": 500,
    "train__learning_rate": 0.3,
    "train__batch_size": 16,
    "train__epochs": 2,
    "train__schedule": "one-cycle",
}
SCALED = {"attack__kind": "scale", "attack__num_clients": 1, "attack__strength": 1000.0}


def accuracy(tmp_path: Path, **settings: Any) -> float:
    """Run and return the final accuracy; 0 if the run diverges."""
    try:
        return float(run_local(quick(tmp_path, **RUN | settings)).summary["final_accuracy"])
    except RunFailed:
        return 0.0


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> float:
    return accuracy(tmp_path_factory.mktemp("honest"))


def test_a_mean_of_scaled_updates_is_lost(tmp_path: Path, honest: float) -> None:
    assert honest > 0.7
    assert accuracy(tmp_path, **SCALED) < 0.25


@pytest.mark.parametrize("rule", ROBUST)
def test_a_robust_rule_withstands_scaled_updates(tmp_path: Path, honest: float, rule: str) -> None:
    assert accuracy(tmp_path, aggregation__rule=rule, **SCALED) > honest - 0.1


def test_a_run_names_its_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    watch_log(monkeypatch, lines)
    run_local(quick(tmp_path, num_server_rounds=1, aggregation__rule="trimmed-mean"))
    assert "Server: aggregation by trimmed-mean" in lines
    assert not any("attack" in line for line in lines)


def test_a_federated_generator_is_made_by_the_rule_too(tmp_path: Path) -> None:
    settings = {"num_server_rounds": 0, "federated_generator__fraction_train": 1.0, **SCALED, "attack__strength": 1e5}
    settings["federated_generator__rounds"] = 1  # the second would begin beyond the bounds of the gate, with the mean

    def largest_weight(rule: str) -> float:
        done = run_local(few(tmp_path / rule, aggregation__rule=rule, **settings))
        weights = RunDirectory(done.run_dir).generator_rounds.read_checkpoint().arrays
        return float(max(np.abs(array).max() for name, array in weights.items() if name != CLASS_CODES))

    assert 10 * largest_weight("median") < largest_weight("mean")
