"""A generator that the clients train together: one client's part, the rounds, and what a run does with the result."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import quick, run_and_kill
from test_attendance import federate

from fbl_flower import cli
from fbl_flower.config import parse_config
from fbl_flower.data.datasets import DATASETS, load_parts
from fbl_flower.data.examples import Examples
from fbl_flower.errors import ConfigError, GeneratorError, RunFailed, StateError
from fbl_flower.federation import client as client_app
from fbl_flower.federation.generator_supply import files_identity, with_generator
from fbl_flower.federation.local import Outcome, run_local
from fbl_flower.generation.federated import (
    CLASS_CODES,
    LocalTraining,
    federated_network,
    initial_arrays,
    learning_rate,
    local_stream,
    train_locally,
)
from fbl_flower.generation.loading import check_generator, choose_generator, kind_of, load_generator
from fbl_flower.generation.recipe import RECIPE, read_info
from fbl_flower.params import Arrays
from fbl_flower.reporting.rundir import RunDirectory

INFO = DATASETS["digits"]
WEIGHTS = "quanto_model.safetensors"


def few(tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    """Settings of a run with a federated generator that takes seconds, and is no good."""
    return quick(
        tmp_path,
        **{
            "generator__name": "federated",
            "generator__steps": 1,
            "generator__guidance": 1.0,
            "federated_generator__rounds": 2,
            "federated_generator__epochs": 1,
            "data__num_private": 90,
            "num_clients": 3,
            "num_server_rounds": 1,
            "checkpoint_every": 1,
        }
        | overrides,
    )


def images(number: int, *, label: int | None = None) -> Examples:
    parts = load_parts(parse_config({"data.name": "digits"}).data)
    chosen = parts.private if label is None else parts.private.take(torch.nonzero(parts.private.labels == label).flatten())
    return chosen.take(torch.arange(number))


def trained(
    arrays: Arrays, examples: Examples, *, server_round: int = 1, moments: Any = None, **settings: Any
) -> LocalTraining:
    config = parse_config({f"federated-generator.{key.replace('_', '-')}": value for key, value in settings.items()})
    return train_locally(
        arrays,
        examples,
        INFO,
        config.federated_generator,
        server_round=server_round,
        stream=local_stream(0, 0, server_round),
        moments=moments,
    )


def distance(a: Arrays, b: Arrays) -> float:
    return float(np.sqrt(sum(np.square(a[name] - b[name]).sum() for name in a)))


@pytest.fixture(scope="module")
def first() -> Arrays:
    return initial_arrays(INFO, 8, seed=0)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_local(few(tmp_path_factory.mktemp("federated")))


# -- one client ------------------------------------------------------------------------------------------------------------------


def test_a_client_trains_on_its_images_and_leaves_the_class_codes_alone(first: Arrays) -> None:
    result = trained(first, images(20), epochs=4)
    assert result.arrays.keys() == first.keys() and distance(result.arrays, first) > 0.1
    np.testing.assert_array_equal(result.arrays[CLASS_CODES], first[CLASS_CODES])
    again = trained(result.arrays, images(20), epochs=4)
    assert again.loss < result.loss
    assert result.moments == {}


def test_the_same_stream_gives_the_same_weights(first: Arrays) -> None:
    one, two = trained(first, images(9)), trained(first, images(9))
    assert all(np.array_equal(one.arrays[name], two.arrays[name]) for name in first)
    assert distance(one.arrays, trained(first, images(9), server_round=2).arrays) > 0


def test_a_client_with_fewer_images_than_a_batch_takes_a_step_an_epoch(first: Arrays) -> None:
    kept = trained(first, images(1), epochs=3, optimizer_state="kept")
    steps = {float(value) for name, value in kept.moments.items() if name.endswith("/step")}
    assert steps == {3.0}


def test_a_client_without_images_returns_the_weights(first: Arrays) -> None:
    result = trained(first, images(0))
    assert result.loss == 0 and distance(result.arrays, first) == 0


def test_moments_that_are_kept_make_two_rounds_one_training(first: Arrays) -> None:
    """With moments the second round's first step is as AdamW goes on; without, it is of the size of a first step again."""
    one = trained(first, images(20), optimizer_state="kept", epochs=1)
    kept = trained(one.arrays, images(20), server_round=2, moments=one.moments, optimizer_state="kept", epochs=1)
    reset = trained(one.arrays, images(20), server_round=2, epochs=1)
    assert {float(v) for name, v in kept.moments.items() if name.endswith("/step")} == {2.0}
    assert distance(kept.arrays, reset.arrays) > 0


def test_the_proximal_term_keeps_a_client_near_the_global_weights(first: Arrays) -> None:
    free, held = (trained(first, images(30), epochs=6, proximal=mu) for mu in (0.0, 100.0))
    assert distance(held.arrays, first) < 0.7 * distance(free.arrays, first)


def test_the_learning_rate_falls_from_the_setting_to_a_twentieth() -> None:
    config = parse_config({"federated-generator.rounds": 40}).federated_generator
    rates = [learning_rate(config, server_round) for server_round in range(1, 41)]
    assert rates[0] == config.learning_rate and rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.05 * config.learning_rate, rel=0.05)


def test_a_training_that_diverges_is_an_error_without_a_word_about_the_images(first: Arrays) -> None:
    broken = {name: np.full_like(array, np.nan) if name == "conv_in.weight" else array for name, array in first.items()}
    with pytest.raises(GeneratorError, match=r"diverged; lower federated-generator.learning-rate") as found:
        trained(broken, images(5))
    assert found.value.public == str(found.value)


@pytest.mark.parametrize(("size", "widths"), [(8, 2), (28, 2), (32, 2), (64, 2), (96, 3), (128, 3), (224, 4)])
def test_larger_images_get_a_deeper_network(size: int, widths: int) -> None:
    config = federated_network(dataclasses.replace(INFO, image_size=size), size)
    assert len(config["block_out_channels"]) == widths


def test_a_size_that_cannot_be_halved_says_which_one_can() -> None:
    with pytest.raises(GeneratorError, match=r"data.image-size: 30 pixels .* use a multiple of 4, such as 28"):
        federated_network(INFO, 30)


# -- which classes a client has ----------------------------------------------------------------------------------------------------


def test_no_row_of_the_class_codes_tells_which_classes_a_client_has(first: Arrays) -> None:
    """An attack on learned class vectors finds every class at once: only the rows of classes that a client has move."""
    for label in (0, 7):
        update = trained(first, images(12, label=label), epochs=4).arrays[CLASS_CODES] - first[CLASS_CODES]
        assert not update.any()


# -- a run ---------------------------------------------------------------------------------------------------------------------------


def test_a_run_trains_a_generator_and_fills_from_it(outcome: Outcome) -> None:
    run = RunDirectory(outcome.run_dir)
    assert outcome.summary["status"] == "completed"
    cost = outcome.summary["generator"]
    rows = run.generator_rounds.read_rows("metrics.jsonl")
    assert [row["round"] for row in rows] == [1, 2] and cost["rounds"] == 2
    assert all(row["clients"] and row["left_out"] == {} and row["bytes_to_clients"] > 1e6 for row in rows)
    assert cost["bytes_from_clients"] == sum(row["bytes_from_clients"] for row in rows)
    info = read_info(run.generator)
    assert info.weights == "4bit" and info.training is None and info.federation is not None
    assert info.federation.settings["rounds"] == 2 and info.num_images <= 90
    assert run.read_json("generator.json") == {"name": "federated", "path": str(run.generator)}
    config = parse_config(run.read_settings())
    state = Path(config.state_dir)
    (stored,) = state.glob("clients/*/generator")
    assert {f.name: f.read_bytes() for f in stored.iterdir()} == {f.name: f.read_bytes() for f in run.generator.iterdir()}
    assert list((state / "cache").rglob("*"))


def test_the_same_seed_gives_the_same_generator(outcome: Outcome, tmp_path: Path) -> None:
    again = run_local(few(tmp_path), workers=3)
    assert (again.run_dir / "generator" / WEIGHTS).read_bytes() == (outcome.run_dir / "generator" / WEIGHTS).read_bytes()
    for name in ("metrics.jsonl", "generator-rounds/metrics.jsonl"):
        assert (again.run_dir / name).read_bytes() == (outcome.run_dir / name).read_bytes()


@pytest.mark.parametrize("in_round", [1, 2])
def test_a_run_that_is_killed_in_a_generator_round_goes_on(
    outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_round: int
) -> None:
    killed = run_and_kill(few(tmp_path), monkeypatch, in_round=in_round)
    assert not (killed / "generator").exists()
    resumed = run_local(few(tmp_path, resume="auto"))
    assert resumed.run_dir == killed
    for name in ("metrics.jsonl", "generator-rounds/metrics.jsonl", f"generator/{WEIGHTS}"):
        assert (resumed.run_dir / name).read_bytes() == (outcome.run_dir / name).read_bytes()
    assert "started again" in json.loads((killed / "nodes.json").read_text())["events"][0]["event"]


def test_a_run_that_is_killed_while_its_clients_fill_goes_on_with_its_generator(
    outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(client_app, "prepare_client", dies)
        with pytest.raises(KeyboardInterrupt):
            run_local(few(tmp_path))
    resumed = run_local(few(tmp_path, resume="auto"))
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert (resumed.run_dir / "metrics.jsonl").read_bytes() == (outcome.run_dir / "metrics.jsonl").read_bytes()


def test_a_run_that_is_resumed_in_a_generator_round_on_other_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = run_and_kill(few(tmp_path), monkeypatch, in_round=2)
    before = {path: path.read_bytes() for path in sorted(killed.rglob("*")) if path.is_file()}
    checkpoint = RunDirectory.read_checkpoint

    def other(self: RunDirectory) -> Any:
        point = checkpoint(self)
        return dataclasses.replace(point, data=dict(point.data) | {"private": "others"})

    monkeypatch.setattr(RunDirectory, "read_checkpoint", other)
    with pytest.raises(StateError, match="private: others before"):
        run_local(few(tmp_path, resume=str(killed)))
    assert {path: path.read_bytes() for path in sorted(killed.rglob("*")) if path.is_file()} == before


def test_no_rounds_train_a_generator_only_and_a_later_run_uses_its_folder(outcome: Outcome, tmp_path: Path) -> None:
    alone = run_local(few(tmp_path, num_server_rounds=0))
    assert alone.summary["status"] == "completed" and alone.summary["rounds"] == 0
    assert not (alone.run_dir / "metrics.jsonl").exists()
    later = run_local(few(tmp_path, generator__name="auto", generator__path=str(alone.run_dir / "generator")))
    assert not (later.run_dir / "generator-rounds").exists()
    assert (later.run_dir / "metrics.jsonl").read_bytes() == (outcome.run_dir / "metrics.jsonl").read_bytes()


def test_a_second_simulation_takes_the_generator_of_the_first(
    outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_local(few(tmp_path, num_server_rounds=0))
    with monkeypatch.context() as patch:
        patch.setattr(client_app, "train_locally", None)
        second = run_local(few(tmp_path))
        with pytest.raises(RunFailed, match="generator round 1"):
            run_local(few(tmp_path, seed=1))
        for other in ({"aggregation__rule": "median"}, {"attack__kind": "sign-flip", "attack__num_clients": 1}):
            with pytest.raises(RunFailed, match="generator round 1"):  # another rule or an attack makes another generator
                run_local(few(tmp_path, **other))
    assert second.run_dir != first.run_dir and second.summary["generator"] == first.summary["generator"]
    assert (second.run_dir / "metrics.jsonl").read_bytes() == (outcome.run_dir / "metrics.jsonl").read_bytes()


def test_no_rounds_and_another_generator_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num-server-rounds: got 0"):
        parse_config(few(tmp_path, num_server_rounds=0, generator__name="public-images"))
    with pytest.raises(ConfigError, match=r"num-server-rounds: got 0.*'diffusion'"):
        run_local(few(tmp_path, num_server_rounds=0, generator__name="auto"))


def test_half_the_bytes_go_back_with_rounded_differences(outcome: Outcome, tmp_path: Path) -> None:
    half = run_local(few(tmp_path, num_server_rounds=0, transport__precision="fp16"))
    full, less = outcome.summary["generator"], half.summary["generator"]
    assert less["bytes_from_clients"] < 0.52 * full["bytes_from_clients"]
    assert less["final_train_loss"] == pytest.approx(full["final_train_loss"], rel=0.02)


def test_a_method_of_its_own_and_a_server_that_tunes_work_with_it(tmp_path: Path) -> None:
    done = run_local(few(tmp_path, server_tuning__part="head", server_tuning__num_images=10, method__name="fedprox"))
    assert (
        done.summary["status"] == "completed"
        and "untuned_accuracy" in RunDirectory(done.run_dir).read_rows("metrics.jsonl")[-1]
    )


# -- clients that fail, come late, or do not train it --------------------------------------------------------------------------------


def test_a_node_that_does_not_train_the_generator_uses_it(tmp_path: Path) -> None:
    settings = few(tmp_path, num_clients=4, federated_generator__fraction_train=1.0)
    settings.pop("output-dir"), settings.pop("state-dir")
    overrides = {key.replace(".", "__").replace("-", "_"): value for key, value in settings.items()}
    rows, _ = federate(tmp_path, lambda _: {1, 2, 3, 4}, {2: {"trains-generator": False}}, **overrides)
    (run,) = (tmp_path / "runs").iterdir()
    assert [row["clients"] for row in RunDirectory(run).generator_rounds.read_rows("metrics.jsonl")] == [[0, 2, 3]] * 2
    assert rows[0]["clients"] == [0, 1, 2, 3] and rows[0]["left_out"] == {}


def test_a_node_that_comes_late_gets_the_generator_at_first_contact(tmp_path: Path) -> None:
    settings = few(tmp_path, num_clients=4, num_server_rounds=3, prepare__timeout=4.0)
    settings.pop("output-dir"), settings.pop("state-dir")
    overrides = {key.replace(".", "__").replace("-", "_"): value for key, value in settings.items()}
    states = {node: {"state-dir": str(tmp_path / f"node-{node}")} for node in (1, 2, 3, 4)}
    rows, _ = federate(tmp_path, lambda done: {1, 2, 3} | ({4} if done >= 1 else set()), states, **overrides)
    assert [row["clients"] for row in rows] == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert [row["left_out"] for row in rows] == [{}] * 3
    assert len(list(tmp_path.glob("node-*/clients/*/generator"))) == 4


def test_a_client_that_lost_the_generator_is_named_and_gets_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = RunDirectory.append

    def lose(self: RunDirectory, name: str, row: dict[str, Any]) -> None:
        append(self, name, row)
        if name == "metrics.jsonl" and row["round"] == 1 and "accuracy" in row:
            client_app.forget_clients()
            (folder,) = (tmp_path / "node-2" / "clients").glob("*/generator")
            shutil.rmtree(folder)

    monkeypatch.setattr(RunDirectory, "append", lose)
    settings = few(tmp_path, num_clients=4, num_server_rounds=3)
    settings.pop("output-dir"), settings.pop("state-dir")
    overrides = {key.replace(".", "__").replace("-", "_"): value for key, value in settings.items()}
    states = {node: {"state-dir": str(tmp_path / f"node-{node}")} for node in (1, 2, 3, 4)}
    rows, _ = federate(tmp_path, lambda _: {1, 2, 3, 4}, states, **overrides)
    assert [list(row["left_out"]) for row in rows] == [[], ["1"], []]
    assert rows[1]["left_out"]["1"].startswith("it does not have the federation's generator; it gets it with the next request")


def test_an_update_that_is_not_finite_is_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(arrays: Arrays, *args: Any, **kwargs: Any) -> LocalTraining:
        result = train_locally(arrays, *args, **kwargs)
        if result.loss and len(args[0]) == sizes[0]:
            result.arrays["conv_out.bias"][:] = np.inf
        return result

    config = parse_config(few(tmp_path, num_server_rounds=0, federated_generator__fraction_train=1.0))
    sizes = [len(client_app.client_images(config, k)[1]) for k in range(3)]
    assert len(set(sizes)) == 3
    monkeypatch.setattr(client_app, "train_locally", spoiled)
    done = run_local(config)
    assert done.summary["left_out"] == {str(r): {"0": "its model or its loss is not finite"} for r in (1, 2)}


def test_a_class_that_no_client_has_ends_a_simulation_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(GeneratorError, match=r"no client has an image of "):
        run_local(few(tmp_path, data__num_private=4, num_clients=2))
    assert not (tmp_path / "runs").exists()


def test_every_client_failing_in_a_generator_round_names_the_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> LocalTraining:
        raise GeneratorError("secret", public="public reason")

    monkeypatch.setattr(client_app, "train_locally", fails)
    with pytest.raises(RunFailed, match=r"^generator round 1: no client succeeded: .*public reason"):
        run_local(few(tmp_path))


# -- which generator, and whose ------------------------------------------------------------------------------------------------------


def test_auto_takes_a_path_then_the_bundled_one_then_the_federation(outcome: Outcome) -> None:
    def chosen(**settings: Any) -> str:
        config = parse_config(
            {"data.name": "digits"} | {key.replace("__", ".").replace("_", "-"): v for key, v in settings.items()}
        )
        return choose_generator(config, load_parts(config.data))[0]

    assert chosen() == "diffusion"
    assert chosen(data__num_public=300) == "federated"
    assert chosen(generator__path=str(outcome.run_dir / "generator")) == "federated"
    assert chosen(generator__name="own-images") == "own-images"
    assert kind_of(Path("/nowhere")) == "diffusion"


def test_the_generator_of_another_federation_is_refused(outcome: Outcome, tmp_path: Path) -> None:
    folder = str(outcome.run_dir / "generator")
    for name in ("federated", "diffusion", "auto"):
        config = parse_config(few(tmp_path, generator__name=name, generator__path=folder, data__num_private=91))
        problems = check_generator(config, load_parts(config.data))
        assert len(problems) == 1 and "by a federation with other images" in problems[0]
    same = parse_config(few(tmp_path, generator__path=folder, num_clients=2, data__alpha=5.0, seed=3))
    assert check_generator(same, load_parts(same.data)) == []
    load_generator(same, load_parts(same.data))


def test_a_generator_from_public_images_is_not_a_federated_one(tmp_path: Path) -> None:
    bundled = choose_bundled()
    config = parse_config(few(tmp_path, generator__path=str(bundled), data__num_private=-1))
    assert "was not trained by a federation" in check_generator(config, load_parts(config.data))[0]


def choose_bundled() -> Path:
    from fbl_flower.generation.loading import bundled_generator

    return bundled_generator("digits", 8)


def test_a_federated_generator_that_is_not_trained_yet_cannot_be_loaded(tmp_path: Path) -> None:
    config = parse_config(few(tmp_path))
    with pytest.raises(GeneratorError, match="once the clients have trained it"):
        load_generator(config, load_parts(config.data))


# -- files from the server -----------------------------------------------------------------------------------------------------------


def test_files_that_are_not_those_announced_are_refused_and_nothing_is_stored(outcome: Outcome, tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in (outcome.run_dir / "generator").iterdir()}
    identity, config = files_identity(files), parse_config(few(tmp_path))

    def store(sent: dict[str, bytes], number: int, announced: str = identity) -> Path:
        folder = tmp_path / str(number) / "generator"
        with_generator(config, name="federated", identity=announced, files=sent, folder=folder, own_path=False)
        return folder

    assert store(files, 0).is_dir()
    damaged = files | {WEIGHTS: files[WEIGHTS][:-1]}
    bad = [damaged, files | {"../x": b""}, files | {".hidden": b""}, {n: f for n, f in files.items() if n != WEIGHTS}]
    bad += [files | {RECIPE: b"{}"}, files | {str(k): b"" for k in range(9)}]
    for number, sent in enumerate(bad, start=1):
        with pytest.raises(GeneratorError):
            store(sent, number)
        assert not (tmp_path / str(number) / "generator").exists() and not (tmp_path / "x").exists()
    with pytest.raises(GeneratorError):
        store(files | {RECIPE: b"{}"}, 20, files_identity({RECIPE: b"{}"}))
    with pytest.raises(StateError):
        store({}, 30)


# -- the command ---------------------------------------------------------------------------------------------------------------------

FEW = [
    "-c", "federated-generator.rounds=2 federated-generator.epochs=1 data.num-private=90 num-clients=3 model.name='tiny'",
    "--data", "digits", "--threads", "1",
]  # fmt: skip


def test_the_command_trains_the_same_generator_and_goes_on_after_a_kill(
    outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "generator"
    command = ["generator", "train", "--federated", "--out", str(out), *FEW]
    append = RunDirectory.append

    def dies(self: RunDirectory, name: str, row: dict[str, Any]) -> None:
        if row["round"] == 2:
            raise KeyboardInterrupt
        append(self, name, row)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", dies)
        patch.setattr(cli.os, "_exit", lambda code: None)  # which spares a user the wait for the clients' threads
        assert cli.main(command) == 130
    assert not out.exists() and (tmp_path / "new" / "generator.training").is_dir()
    assert cli.main(command) == 0
    assert [path.name for path in out.parent.iterdir()] == ["generator"]
    assert (out / WEIGHTS).read_bytes() == (outcome.run_dir / "generator" / WEIGHTS).read_bytes()
    assert "trained by 3 clients" in capsys.readouterr().out
    assert cli.main(command) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_command_names_options_that_belong_to_the_other_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generator", "train", "--federated", "--steps", "3", "--weights", "8bit", *FEW]) == 2
    told = capsys.readouterr().err
    assert "--steps: not together with --federated" in told and "--weights: not together with --federated" in told
