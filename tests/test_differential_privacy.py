"""Client-level differential privacy: the mechanism by hand, what it guarantees, its accounting, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from helpers import quick, run_and_kill, watch_log
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as array_strategy
from test_attendance import federate
from test_federated_generator import few

from fbl_flower.config import PrivacyConfig, parse_config
from fbl_flower.data.datasets import DATASETS
from fbl_flower.errors import ConfigError
from fbl_flower.federation import client as client_app
from fbl_flower.federation.global_model import next_point
from fbl_flower.federation.local import run_local
from fbl_flower.federation.preflight import preflight
from fbl_flower.federation.privacy import PrivacyLedger, clipped, cohort_size, epsilon, private_model
from fbl_flower.federation.wire import Reply
from fbl_flower.generation.federated import CLASS_CODES, initial_arrays
from fbl_flower.generation.loading import read_info
from fbl_flower.params import Arrays
from fbl_flower.reporting.results_table import TableLine, as_csv, as_markdown
from fbl_flower.reporting.rundir import Checkpoint, RunDirectory
from fbl_flower.training.roles import Role

CLIP = {"privacy__clip_norm": 1.0, "aggregation__weight_by": "equal"}
NOISE = CLIP | {"privacy__noise_multiplier": 1.0}


def of_google(sigma: float, rounds: int, delta: float = 1e-5) -> float:
    """Epsilon of some rounds of the Gaussian mechanism, from dp-accounting itself."""
    accountant = RdpAccountant()
    if rounds:
        accountant.compose(dp_accounting.GaussianDpEvent(sigma), rounds)
    return float(accountant.get_epsilon(delta))


def f32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def rows_of(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return RunDirectory(run).read_rows(name)


def most_rounds(*rows: list[dict[str, Any]]) -> int:
    """In how many rounds the client chosen most often took part, of all phases together."""
    clients = [k for phase in rows for row in phase for k in row.get("clients", ())]
    return max(map(clients.count, clients))


# -- the mechanism -------------------------------------------------------------------------------------------------------------


def test_an_update_is_clipped_as_one_vector_over_all_arrays() -> None:
    update = {"a": np.array([[3.0, 0.0]]), "b": np.array([4.0])}
    cut = clipped(update, 1.0)
    np.testing.assert_allclose(cut["a"], [[0.6, 0.0]])
    np.testing.assert_allclose(cut["b"], [0.8])
    for name, array in clipped(update, 5.0).items():
        np.testing.assert_array_equal(array, update[name])
    assert not clipped({"a": np.zeros(3)}, 1.0)["a"].any()


def test_the_model_moves_by_the_clipped_sum_over_the_cohort() -> None:
    """Updates (3, 4) and (0, 1), clipped to 2: (1.2, 1.6) and (0, 1); sum over 4 expected clients."""
    received = {"w": f32(1, 1), "count": np.array(7)}
    replies = [{"w": f32(4, 5), "count": np.array(9)}, {"w": f32(1, 2), "count": np.array(8)}]
    after = private_model(received, replies, PrivacyConfig(clip_norm=2.0), cohort=4)
    np.testing.assert_allclose(after["w"], [1 + 1.2 / 4, 1 + 2.6 / 4], rtol=1e-6)
    assert after["w"].dtype == np.float32 and after["count"] == 7


def test_clients_count_alike_and_no_images_add_nothing() -> None:
    received = {"w": f32(0, 0)}
    point = Checkpoint(server_round=0, arrays=received, embeddings=None)
    config = parse_config({"privacy.clip-norm": 1.0, "aggregation.weight-by": "equal", "num-clients": 4})
    moves = {0: (f32(1, 0), 1), 1: (f32(0, 1), 1000), 2: (f32(0, 0), 0)}
    replies = {k: Reply(arrays={"w": w}, num_examples=n, num_real=n, loss=0.0, seconds=0.0) for k, (w, n) in moves.items()}
    roles = dict.fromkeys(range(4), Role(capability="full", method="fedavg"))
    after = next_point(point, replies, roles, config=config, server_round=1, parameters=list)
    np.testing.assert_allclose(after.arrays["w"], [0.5, 0.5])


def test_the_cohort_is_what_a_round_chooses_when_all_are_there() -> None:
    assert [cohort_size(0.5, 10), cohort_size(0.5, 5), cohort_size(0.28, 25), cohort_size(1e-12, 10)] == [5, 3, 7, 1]


FINITE = st.floats(-(2.0**127), 2.0**127, width=32) | st.floats(-2, 2, width=32)
MODEL = st.fixed_dictionaries(
    {"a": array_strategy(np.float32, 3, elements=FINITE), "b": array_strategy(np.float32, (1, 2), elements=FINITE)}
)
NEAR = st.fixed_dictionaries(
    {
        "a": array_strategy(np.float32, 3, elements=st.floats(-9, 9, width=32)),
        "b": array_strategy(np.float32, (1, 2), elements=st.floats(-9, 9, width=32)),
    }
)


@given(NEAR, st.lists(MODEL, max_size=3), MODEL, MODEL, st.sampled_from([1e-3, 1.0, 30.0]))
def test_one_client_moves_the_sum_by_at_most_the_norm(
    received: Arrays, others: list[Arrays], one: Arrays, other: Arrays, norm: float
) -> None:
    received = {name: array.astype(np.float64) for name, array in received.items()}  # the sum as it is, before it is rounded

    def sum_of(replies: list[Arrays]) -> Arrays:
        return private_model(received, replies, PrivacyConfig(clip_norm=norm), cohort=1)

    def apart(a: Arrays, b: Arrays) -> float:
        return float(np.sqrt(sum(np.square(a[name] - b[name]).sum() for name in a)))

    without, with_one, with_other = sum_of(others), sum_of([*others, one]), sum_of([*others, other])
    assert apart(without, with_one) <= norm + 1e-9
    assert apart(with_one, with_other) <= 2 * norm + 1e-9


def test_a_reply_beyond_all_bounds_adds_nothing() -> None:
    huge = {"w": np.full(4, 1e300)}
    after = private_model({"w": np.zeros(4)}, [huge], PrivacyConfig(clip_norm=1.0), cohort=1)
    assert not after["w"].any()


@pytest.mark.parametrize("number", [0, 3])
def test_noise_has_the_stated_scale_however_many_answer(number: int) -> None:
    """Standard deviation sigma C / m = 1.5 * 2 / 6; of 200,000 draws it is known to a fifth of a percent."""
    received = {"w": np.zeros((500, 200)), "v": np.zeros(100_000)}
    privacy = PrivacyConfig(clip_norm=2.0, noise_multiplier=1.5)
    after = private_model(received, [received] * number, privacy, cohort=6, rng=np.random.default_rng(0))
    drawn = np.concatenate([array.ravel() for array in after.values()])
    assert drawn.std() == pytest.approx(0.5, rel=0.01) and abs(drawn.mean()) < 0.005
    assert abs(np.corrcoef(drawn[:100_000], drawn[100_000:])[0, 1]) < 0.02


def test_noise_does_not_follow_from_anything_known() -> None:
    privacy = PrivacyConfig(clip_norm=1.0, noise_multiplier=1.0)
    one, two = (private_model({"w": np.zeros(5)}, [], privacy, cohort=1)["w"] for _ in range(2))
    assert (one != two).all()


def test_class_codes_get_no_noise_and_no_update() -> None:
    received = initial_arrays(DATASETS["digits"], 8, seed=0)
    moved = {name: array + 1 for name, array in received.items()}
    privacy = PrivacyConfig(clip_norm=1.0, noise_multiplier=1.0)
    after = private_model(received, [moved], privacy, cohort=2, fixed={CLASS_CODES})
    np.testing.assert_array_equal(after[CLASS_CODES], received[CLASS_CODES])
    assert all((after[name] != received[name]).any() for name in received if name != CLASS_CODES)


# -- accounting ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "rounds"), [(0.3, 1), (1.0, 7), (4.0, 200), (1.0, 0)])
def test_epsilon_is_that_of_googles_accountant(sigma: float, rounds: int) -> None:
    privacy = PrivacyConfig(clip_norm=1.0, noise_multiplier=sigma, delta=1e-6)
    assert epsilon(privacy, num_clients=50, rounds=rounds) == pytest.approx(of_google(sigma, rounds, 1e-6), rel=1e-12)


def test_the_client_chosen_most_often_decides(tmp_path: Path) -> None:
    config = parse_config(quick(tmp_path, **NOISE))
    run = RunDirectory.create(config)
    ledger = PrivacyLedger(config, run)
    assert ledger.spent() == {"epsilon": 0.0}
    for chosen in ([0, 1], [1, 2], [1]):
        ledger.add(chosen)
    assert ledger.spent()["epsilon"] == pytest.approx(of_google(1.0, 3))
    assert PrivacyLedger(config, run).spent() == ledger.spent()


def test_without_noise_nothing_is_accounted_for(tmp_path: Path) -> None:
    config = parse_config(quick(tmp_path, **CLIP))
    run = RunDirectory.create(config)
    ledger = PrivacyLedger(config, run)
    ledger.add([0])
    assert ledger.spent() == {} and not (run.path / "privacy.json").exists()


def test_noise_without_the_accountant_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"dp-accounting is not installed. .*pip install 'fbl-flower\[dp\]'"):
        run_local(quick(tmp_path, **NOISE))
    assert not (tmp_path / "runs").exists()
    preflight(parse_config(quick(tmp_path, **CLIP)))


# -- settings ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"privacy__clip_norm": 0.0}, "privacy.noise-multiplier: got 1, but privacy.clip-norm is 0"),
        ({"privacy__noise_multiplier": 0.001}, "privacy.noise-multiplier: expected 0 .* or at least 0.01, got 0.001"),
        ({"privacy__delta": 0.25}, r"privacy.delta: expected less than 1 / num-clients \(0.25\), got 0.25"),
        ({"aggregation__weight_by": "balanced"}, "aggregation.weight-by: expected 'equal'"),
        ({"method__name": "scaffold"}, "method.name: scaffold does not work with privacy.clip-norm"),
        ({"clients__methods": "fedgen=0.25, moon=0.25"}, "method.name: fedgen does not work"),
        ({"method__name": "feddyn"}, "method.name: feddyn does not work"),
        ({"balancing__average_embeddings": True}, "balancing.average-embeddings: true"),
        ({"model__name": "resnet18"}, "model.norm: expected 'group' with privacy.noise-multiplier, got 'batch'"),
    ],
)
def test_settings_that_do_not_work_together(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as found:
        parse_config(quick(tmp_path, **NOISE | settings))
    assert len(found.value.problems) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"transport__precision": "fp16"},
        {"model__name": "resnet18", "model__norm": "group"},
        {"model__name": "resnet18", "privacy__noise_multiplier": 0.0},
        {"clients__methods": "fedprox=0.25, moon=0.25"},
        {"server__optimizer": "adam"},
        {
            "num_server_rounds": 0,
            "generator__name": "federated",
            "aggregation__weight_by": "balanced",
            "model__name": "resnet18",
        },
    ],
)
def test_settings_that_do(tmp_path: Path, settings: dict[str, Any]) -> None:
    parse_config(quick(tmp_path, **NOISE | settings))


# -- runs ----------------------------------------------------------------------------------------------------------------------


def test_a_run_states_epsilon_in_metrics_summary_and_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    watch_log(monkeypatch, lines)
    done = run_local(quick(tmp_path, **NOISE))
    rows = rows_of(done.run_dir)
    found = [row["epsilon"] for row in rows]
    assert found == pytest.approx([of_google(1.0, n) for n in (0, *(most_rounds(rows[1 : r + 1]) for r in (1, 2, 3)))])
    assert done.summary["epsilon"] == found[-1] and done.summary["delta"] == 1e-5
    assert "Server: clips updates to a norm of 1, noise multiplier 1" in lines
    assert any(line.endswith(f", epsilon {found[-1]:.3g}") for line in lines)


def test_both_phases_are_one_account(tmp_path: Path) -> None:
    done = run_local(few(tmp_path, num_server_rounds=2, **NOISE))
    first, then = rows_of(done.run_dir, "generator-rounds/metrics.jsonl"), rows_of(done.run_dir)
    assert [row["epsilon"] for row in first] == pytest.approx([of_google(1.0, most_rounds(first[:r])) for r in (1, 2)])
    assert then[0]["epsilon"] == first[-1]["epsilon"]
    assert then[-1]["epsilon"] == done.summary["epsilon"] == pytest.approx(of_google(1.0, most_rounds(first, then)))
    info = read_info(done.run_dir / "generator")
    assert (
        info.num_images == 0
        and info.federation is not None
        and info.federation.num_clients == len({k for row in first for k in row["clients"]})
    )


def test_a_run_for_the_generator_alone_states_its_epsilon(tmp_path: Path) -> None:
    done = run_local(few(tmp_path, num_server_rounds=0, **NOISE))
    rows = rows_of(done.run_dir, "generator-rounds/metrics.jsonl")
    assert done.summary["epsilon"] == rows[-1]["epsilon"] > 0 and done.summary["delta"] == 1e-5


def test_a_longer_run_goes_on_with_its_account(tmp_path: Path) -> None:
    short = run_local(quick(tmp_path, **NOISE))
    longer = run_local(quick(tmp_path, resume=str(short.run_dir), num_server_rounds=5, **NOISE))
    rows = rows_of(longer.run_dir)
    assert longer.summary["epsilon"] == rows[-1]["epsilon"] == pytest.approx(of_google(1.0, most_rounds(rows)))
    assert rows[3]["epsilon"] == short.summary["epsilon"]


@pytest.mark.parametrize("in_round", [1, 3])
def test_rounds_that_are_repeated_count_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_round: int) -> None:
    """Killed before its only checkpoint, of round 0, is renewed: the clients saw models with other noise than those that follow."""
    settings = quick(tmp_path, **NOISE | {"fraction_train": 1.0})
    killed = run_and_kill(settings, monkeypatch, in_round=in_round)
    done = run_local(settings | {"resume": str(killed)})
    assert [row["round"] for row in rows_of(killed)] == [0, 1, 2, 3]
    assert done.summary["epsilon"] == pytest.approx(of_google(1.0, 3 + in_round))


def test_clip_only_can_be_repeated_and_states_no_epsilon(tmp_path: Path) -> None:
    one, two = (run_local(quick(tmp_path / name, num_server_rounds=2, **CLIP)) for name in ("one", "two"))
    assert (one.run_dir / "metrics.jsonl").read_bytes() == (two.run_dir / "metrics.jsonl").read_bytes()
    assert "epsilon" not in one.summary and all("epsilon" not in row for row in rows_of(one.run_dir))
    assert not (one.run_dir / "privacy.json").exists()


def test_a_wide_clip_norm_gives_the_mean_of_equal_weights(tmp_path: Path) -> None:
    plain = run_local(quick(tmp_path / "plain", num_server_rounds=2, aggregation__weight_by="equal"))
    wide = run_local(quick(tmp_path / "wide", num_server_rounds=2, **CLIP | {"privacy__clip_norm": 1e4}))
    found, expected = ([row["loss"] for row in rows_of(run.run_dir)] for run in (wide, plain))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_client_that_fails_pays_as_the_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_local_round = client_app.run_local_round

    def fails(*args: Any, **kwargs: Any) -> Any:
        result = run_local_round(*args, **kwargs)
        return dataclasses.replace(result, loss=float("nan")) if args[1].client == 1 else result

    monkeypatch.setattr(client_app, "run_local_round", fails)
    done = run_local(quick(tmp_path, **NOISE | {"fraction_train": 1.0}))
    assert all(list(row["left_out"]) == ["1"] for row in rows_of(done.run_dir)[1:])
    assert json.loads((done.run_dir / "privacy.json").read_text())["rounds_of_client"]["1"] == 3
    assert done.summary["epsilon"] == pytest.approx(of_google(1.0, 3))


def test_a_node_whose_method_sends_more_is_left_out(tmp_path: Path) -> None:
    rows, _ = federate(tmp_path, lambda _: {1, 2, 3, 4}, {2: {"method": "scaffold"}}, num_server_rounds=1, **NOISE)
    assert rows[0]["clients"] == [0, 2, 3]
    assert rows[0]["left_out"] == {"1": "its method, scaffold, does not work with privacy.clip-norm"}
    (run,) = (tmp_path / "runs").iterdir()
    ledger = json.loads((run / "privacy.json").read_text())
    assert ledger["rounds_of_client"] == {"0": 1, "1": 1, "2": 1, "3": 1}


def test_a_generator_of_another_run_is_not_in_the_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run_local(few(tmp_path, num_server_rounds=0))
    lines: list[str] = []
    watch_log(monkeypatch, lines)
    run_local(few(tmp_path, generator__path=str(alone.run_dir / "generator"), **NOISE))
    assert any("another run, whose epsilon is not part" in line for line in lines)


def test_a_results_table_has_epsilon_where_a_row_has_one() -> None:
    plain = TableLine(title="plain", rounds="20", accuracies={0: 0.9}, seconds={0: 1.0}, command="x")
    private = dataclasses.replace(plain, title="private", epsilon={0: 15.25})
    assert "epsilon" not in as_markdown([plain], [0]) + as_csv([plain], [0])
    head, _, first, second = as_markdown([plain, private], [0]).splitlines()
    column = head.split(" | ").index("epsilon")
    assert [line.split(" | ")[column] for line in (first, second)] == ["–", "15.2"]
    head, first, second = as_csv([plain, private], [0]).splitlines()
    column = head.split(",").index("mean_epsilon")
    assert [line.split(",")[column] for line in (first, second)] == ["", "15.25"]
