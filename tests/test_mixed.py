"""Federations whose clients differ: who can generate how much, and who trains by which method."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from helpers import RecordingGrid, quick
from safetensors.numpy import load_file

from fbl_flower.balancing.plan import make_rich_plan
from fbl_flower.config import RunConfig, parse_config
from fbl_flower.config.methods import METHODS, counts_of
from fbl_flower.errors import ConfigError, GeneratorError, RunFailed
from fbl_flower.federation import client, method_rounds, server
from fbl_flower.federation.local import LocalGrid, run_local
from fbl_flower.federation.preflight import preflight
from fbl_flower.federation.wire import Reply
from fbl_flower.training.prepare import prepare_client
from fbl_flower.training.roles import Role, drawn_roles, role_of


def config_of(**keys: Any) -> RunConfig:
    return parse_config({key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()})


def with_(kind: str, config: RunConfig) -> set[int]:
    return {k for k, role in enumerate(drawn_roles(config)) if kind in (role.capability, role.method)}


def metrics(run_dir: Path) -> bytes:
    return (run_dir / "metrics.jsonl").read_bytes()


# Who is who


def test_shares_are_exact_numbers_and_a_higher_share_contains_a_lower_ones_clients() -> None:
    """Of 20 clients: 0.25 are 5; 0.4 are 8; all of them at 1."""
    sizes = {0.0: 0, 0.25: 5, 0.4: 8, 0.6: 12, 1.0: 20}
    for key, kind in (("clients__rich_share", "rich"), ("clients__no_generator_share", "none")):
        sets = [with_(kind, config_of(num_clients=20, seed=3, **{key: share})) for share in sizes]
        assert [len(s) for s in sets] == list(sizes.values())
        assert all(a <= b for a, b in itertools.pairwise(sets))
    sets = [with_("moon", config_of(num_clients=20, seed=3, clients__methods=f"moon={share}")) for share in sizes]
    assert [len(s) for s in sets] == list(sizes.values())
    assert all(a <= b for a, b in itertools.pairwise(sets))
    other_seed = with_("rich", config_of(num_clients=20, seed=4, clients__rich_share=0.4))
    assert other_seed != with_("rich", config_of(num_clients=20, seed=3, clients__rich_share=0.4))


def test_the_kinds_do_not_overlap_and_the_rest_is_as_usual() -> None:
    config = config_of(
        num_clients=10, clients__rich_share=0.3, clients__no_generator_share=0.2,
        clients__methods="fedprox=0.3, moon = 0.2", method__name="scaffold",
    )  # fmt: skip
    roles = drawn_roles(config)
    assert [sum(r.capability == c for r in roles) for c in ("rich", "none", "full")] == [3, 2, 5]
    assert [sum(r.method == m for r in roles) for m in ("fedprox", "moon", "scaffold")] == [3, 2, 5]
    assert set(drawn_roles(config_of(num_clients=4))) == {Role(capability="full", method="fedavg")}


def test_shares_are_rounded_together() -> None:
    """0.3 and 0.7 of five clients are 1.5 and 3.5, which must be 2 and 3: the first gets its half up, both together get all.

    Four quarters of ten clients end at 2.5, 5, 7.5 and 10, so with halves up at 3, 5, 8 and 10.
    """
    assert counts_of([0.25] * 4, 10) == [3, 2, 3, 2] and counts_of([], 7) == [] and counts_of([0.28], 25) == [7]
    assert counts_of([0.1] * 10, 33) == [3, 4, 3, 3, 4, 3, 3, 3, 4, 3] and counts_of([0.05, 0.95], 10) == [1, 9]
    config = config_of(num_clients=5, clients__rich_share=0.3, clients__no_generator_share=0.7)
    assert len(with_("rich", config)) == 2 and len(with_("none", config)) == 3
    config = config_of(num_clients=5, clients__methods="moon=0.3, fedprox=0.7")
    assert len(with_("moon", config)) == 2 and len(with_("fedprox", config)) == 3


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"clients__methods": "fedsgd=0.1"},
            "clients.methods: got 'fedsgd=0.1'; allowed: method=share between commas, methods "
            f"{' | '.join(METHODS)}, each once, shares 0 .. 1",
        ),
        ({"clients__methods": "moon=1.5"}, "clients.methods: got 'moon=1.5'; allowed: method=share between commas"),
        ({"clients__methods": "moon=nan"}, "clients.methods: got 'moon=nan'; allowed"),
        ({"clients__methods": "moon"}, "clients.methods: got 'moon'; allowed"),
        ({"clients__methods": "moon=0.2,"}, "clients.methods: got ''; allowed"),
        ({"clients__methods": "moon=0.2, moon=0.1"}, "clients.methods: got 'moon' twice; allowed"),
        (
            {"clients__methods": "foo=0.3, moon=2, scaffold"},
            "clients.methods: got 'foo=0.3', got 'moon=2', got 'scaffold'; allowed",
        ),
        (
            {"clients__methods": "moon=0.6, fedprox=0.6"},
            "clients.methods: the shares sum to 1.2; allowed: at most 1, and the rest is method.name",
        ),
        ({"clients__rich_share": 1.2}, "clients.rich-share: got 1.2 (float); allowed: number >= 0 and <= 1"),
        (
            {"clients__rich_share": 0.6, "clients__no_generator_share": 0.6},
            "clients.rich-share and clients.no-generator-share: they sum to 1.2; allowed: at most 1",
        ),
        (
            {"clients__rich_share": 0.5, "balancing__enabled": False},
            "clients.rich-share: got 0.5, but balancing.enabled is false: nobody fills anything",
        ),
        (
            {"clients__no_generator_share": 0.5, "balancing__enabled": False},
            "clients.no-generator-share: got 0.5, but balancing.enabled is false: nobody fills anything",
        ),
        (
            {"num_clients": 2, "clients__methods": "fedprox=0.25, moon=0.25"},
            "clients.methods: moon: got 0.25, and of 2 clients that is nobody, as shares are rounded in their order",
        ),
        (
            {"num_clients": 4, "clients__rich_share": 0.1},
            "clients.rich-share: got 0.1, and of 4 clients that is nobody, as shares are rounded in their order",
        ),
        ({"method__name": "sgd"}, "method.name: got 'sgd' (str); allowed: " + " | ".join(METHODS)),
    ],
)
def test_wrong_shares_are_one_clear_sentence(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**keys)
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(problem)


def test_shares_that_sum_to_one_in_floats_are_allowed() -> None:
    config_of(clients__methods="moon=0.1, fedprox=0.2, scaffold=0.7")
    config_of(clients__rich_share=0.7, clients__no_generator_share=0.3)


def test_what_a_node_states_comes_before_what_is_drawn() -> None:
    config = config_of(num_clients=2, clients__no_generator_share=1.0, method__name="moon")
    assert role_of(config, 1) == Role(capability="none", method="moon")
    assert role_of(config, 1, capability="rich") == Role(capability="rich", method="moon")
    assert role_of(config, 1, method="fedprox") == Role(capability="none", method="fedprox")
    with pytest.raises(ConfigError) as caught:
        role_of(config, 1, capability="strong", method="adam")
    assert len(caught.value.problems) == 2


# What they train on


def test_a_rich_client_discards_nothing_and_fills_up_to_its_largest_class() -> None:
    plan = make_rich_plan(np.array([18, 5, 1, 0]))
    assert plan.keep.tolist() == [18, 5, 1, 0] and plan.fill.tolist() == [0, 13, 17, 18]
    assert plan.num_balanced == 4 * 18
    assert make_rich_plan(np.array([18, 5, 1, 0]), filling=False).fill.tolist() == [0, 0, 0, 0]
    assert make_rich_plan(np.zeros(3, np.int64)).num_balanced == 0


def test_a_client_prepares_what_its_capability_allows(tmp_path: Path) -> None:
    config = parse_config(quick(tmp_path, data__num_private=120))
    for number in range(4):
        rich = prepare_client(config, number, cache_folder=tmp_path, capability="rich")
        counts, filled = (part.counts(10).numpy() for part in (rich.real, rich.fill))
        assert (counts + filled == counts.max()).all()
        none = prepare_client(config, number, cache_folder=tmp_path, capability="none")
        assert none.plan is None and len(none.fill) == 0 and len(none.real) == len(rich.real)
        full = prepare_client(config, number, cache_folder=tmp_path)
        assert full.plan is not None and full.plan.num_balanced == len(full.real)


def federate(settings: dict[str, Any], nodes: dict[int, dict[str, str]] | None = None) -> tuple[Path, list[Message]]:
    """Run a federation in which some nodes, by partition, state something; return its directory and every message."""
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=settings)
    with LocalGrid(client.app, num_nodes=4, run_config=settings) as grid:
        for partition, stated in (nodes or {}).items():
            grid._contexts[partition + 1].node_config.update(stated)
        recorder = RecordingGrid(grid)
        server.app(recorder, context)
    return Path(str(context.state.config_records["run"]["directory"])), recorder.messages


def replies(messages: list[Message]) -> list[Reply]:
    return [Reply.from_record(m.content) for m in messages if "metrics" in m.content]


def test_nobody_who_can_generate_is_federated_averaging_and_needs_no_generator(tmp_path: Path) -> None:
    settings = quick(tmp_path, data__num_private=120)
    fedavg = run_local(settings | {"balancing.enabled": False})
    broken = {"generator.name": "diffusion", "generator.path": str(tmp_path / "nowhere")}
    nobody = run_local(settings | broken | {"clients.no-generator-share": 1.0})
    assert metrics(nobody.run_dir) == metrics(fedavg.run_dir)
    with pytest.raises(GeneratorError):
        preflight(parse_config(settings | broken | {"clients.no-generator-share": 0.75}))


def test_clients_that_cannot_generate_may_have_a_step_size_of_their_own(tmp_path: Path) -> None:
    """One is drawn and one is stated by its node: these two send what they do at that step size, the others what they do at theirs."""
    settings = quick(
        tmp_path, data__num_private=120, num_server_rounds=1, fraction_train=1.0, clients__no_generator_share=0.25
    )  # fmt: skip
    drawn = [role.capability for role in drawn_roles(parse_config(settings))].index("none")
    stated = (drawn + 1) % 4
    rates = {"ours": {}, "low": {"train.learning-rate": 0.001}, "both": {"clients.no-generator-learning-rate": 0.001}}
    sent = {name: replies(federate(settings | more, {stated: {"capability": "none"}})[1]) for name, more in rates.items()}
    for k in range(4):
        for name, array in sent["both"][k].arrays.items():
            np.testing.assert_array_equal(array, sent["low" if k in (drawn, stated) else "ours"][k].arrays[name])
    assert any((sent["low"][drawn].arrays[name] != array).any() for name, array in sent["ours"][drawn].arrays.items())


def test_a_federation_of_all_kinds_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(method_rounds, "log", lambda level, text, *values: lines.append(text % values))
    settings = quick(
        tmp_path, num_clients=8, num_server_rounds=2, fraction_train=1.0, clients__rich_share=0.25,
        clients__no_generator_share=0.25, clients__methods="fedprox=0.25, moon=0.25, scaffold=0.25",
    )  # fmt: skip
    run_dir, messages = federate(settings)
    rows = [json.loads(line) for line in metrics(run_dir).splitlines()]
    assert all(row["clients"] == list(range(8)) and row["left_out"] == {} for row in rows[1:])
    assert rows[1]["num_examples"] > rows[1]["num_real"] == 300
    assert [set(r.extras) for r in replies(messages)].count({"scaffold"}) == 2 * 2
    assert lines == [
        "Methods of the clients: 2 fedavg, 2 fedprox, 2 moon, 2 scaffold",
        "Capabilities of the clients: 4 full, 2 none, 2 rich",
    ]


def test_with_real_weights_the_size_of_a_rich_clients_set_stays_on_it(tmp_path: Path) -> None:
    settings = quick(
        tmp_path, data__num_private=120, num_server_rounds=1, fraction_train=1.0, clients__rich_share=1.0
    )  # fmt: skip
    balanced = replies(federate(settings)[1])
    assert all(r.num_examples >= r.num_real and r.num_examples % 10 == 0 for r in balanced)
    assert any(r.num_examples > r.num_real for r in balanced)
    real = replies(federate(settings | {"aggregation.weight-by": "real"})[1])
    assert [r.num_examples for r in real] == [r.num_real for r in balanced]
    alike = replies(federate(settings | {"aggregation.weight-by": "equal"})[1])
    assert [r.num_examples for r in alike] == [r.num_real for r in balanced]


def test_the_mean_by_hand_under_each_weight(tmp_path: Path) -> None:
    settings = quick(tmp_path, data__num_private=120, num_server_rounds=1, fraction_train=1.0, clients__rich_share=0.5)
    for by in ("balanced", "real", "equal"):
        run_dir, messages = federate(settings | {"aggregation.weight-by": by})
        sent = replies(messages)
        weights = [float({"balanced": r.num_examples, "real": r.num_real, "equal": 1}[by]) for r in sent]
        assert (len(set(weights)) == 1) == (by == "equal")
        model = load_file(run_dir / "model.safetensors")
        for name, array in model.items():
            expected = np.average(np.stack([r.arrays[name] for r in sent]).astype(np.float64), axis=0, weights=weights)
            np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-7)


def test_a_node_states_its_own_capability_and_method(tmp_path: Path) -> None:
    settings = quick(tmp_path, data__num_private=120, num_server_rounds=1, fraction_train=1.0)
    run_dir, messages = federate(settings, {1: {"capability": "rich", "method": "scaffold"}, 2: {"capability": "none"}})
    by_number = replies(messages)
    assert [set(r.extras) for r in by_number] == [set(), {"scaffold"}, set(), set()]
    assert by_number[1].num_examples > by_number[1].num_real
    folders = client.state_folder(settings["state-dir"], run_dir.name, 0).parent
    states = {path.parent.name for path in folders.glob("client-*/round-*.safetensors")}
    assert states == {"client-0000", "client-0001", "client-0003"}  # client 2 balances nothing and remembers nothing


def test_nodes_that_state_something_unknown_are_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = quick(tmp_path, data__num_private=120, num_server_rounds=1, fraction_train=1.0)
    run_dir, _ = federate(settings, {1: {"capability": "strong"}, 3: {"method": "adam"}})
    assert json.loads(metrics(run_dir).splitlines()[-1])["clients"] == [0, 2]
    strong = "capability: got 'strong'; allowed in a node's --node-config: full | rich | none"
    assert f"Node node-1 is refused: {strong}" in caplog.messages
    assert any(message.startswith("Node node-3 is refused: method: got 'adam'; allowed") for message in caplog.messages)
    with pytest.raises(RunFailed) as caught:
        federate(settings, {node: {"capability": "strong"} for node in range(4)})
    assert str(caught.value) == "nothing was trained; " + "; ".join(f"node-{node}: {strong}" for node in range(4))
