"""Rows, what they share, sizes, overrides, and the sets that come with the package."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from fbl_flower.commands import experiments
from fbl_flower.commands.experiments import Row, identity, read_rows
from fbl_flower.commands.overrides import read_overrides
from fbl_flower.config import flatten, parse_config
from fbl_flower.errors import ConfigError

ROOT = Path(__file__).parents[1]
SETS = sorted(
    path
    for path in (ROOT / "experiments").iterdir()
    if path.is_dir() and not path.name.endswith(("mnist5k", "digits")) and "recipe" not in path.name
)


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


def row_text(config: str = "", more: str = "") -> str:
    return f'title = "t"\nkind = "federation"\n{more}\n[config]\n{config}\n'


def problems_of(*paths: Path, **options: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_rows(paths, **options)  # type: ignore[arg-type]
    return caught.value.problems


def test_later_layers_win(tmp_path: Path) -> None:
    """Outer base, its size, folder's base, its size, row, its size, command line: each overrides one more of seven keys."""
    keys = ["num-clients", "num-server-rounds", "checkpoint-every", "data.num-test", "train.epochs", "train.batch-size"]
    keys.append("balancing.replay-period")

    def settings(layer: int) -> str:
        return "".join(f"{key} = {10 * (layer + 1)}\n" for key in keys[layer:])

    write(tmp_path, _outer=f"[config]\n{settings(0)}\n[cpu]\nnote = 'outer'\n[cpu.config]\n{settings(1)}")
    base = f'base = "../_outer.toml"\n[config]\n{settings(2)}\n[cpu.config]\n{settings(3)}'
    folder = write(tmp_path / "set", _base=base, a=row_text(settings(4)) + f"[cpu.config]\n{settings(5)}")
    (row,) = read_rows([folder], overrides={keys[6]: 70})
    assert [row.settings[key] for key in keys] == [10, 20, 30, 40, 50, 60, 70]
    assert row.size == "cpu" and row.notes == ("outer",) and row.report_rounds == (20,)


def test_the_size_is_cpu_unless_asked_for(tmp_path: Path) -> None:
    base = "target-accuracy = 0.3\n[cpu.config]\nnum-clients = 2\n[paper]\ntarget-accuracy = 0.6\n[paper.config]\nnum-clients = 20\n"
    folder = write(tmp_path / "set", _base=base, a=row_text())
    (small,), (large,) = read_rows([folder]), read_rows([folder], size="paper")
    assert (small.config.num_clients, small.target, small.size) == (2, 0.3, "cpu")
    assert (large.config.num_clients, large.target, large.size) == (20, 0.6, "paper")
    assert read_rows([folder], target=0.9)[0].target == 0.9
    assert "--size cpu --target-accuracy 0.9 --seeds 0" in read_rows([folder], target=0.9)[0].command((0,))
    assert large.command((0, 1)) == f"fbl-flower sweep {folder / 'a.toml'} --size paper --seeds 0,1"
    alone = write(tmp_path / "alone", b=row_text())
    assert read_rows([alone])[0].size == ""
    assert problems_of(alone, size="cpu") == [
        f"{alone / 'b.toml'}: --size: got 'cpu'; it has one size only, leave the option out"
    ]
    write(folder, _base="[paper.config]\nnum-clients = 20\n")
    assert read_rows([folder])[0].size == "paper"
    write(folder, _base="[cpu.config]\nnum-clients = 2\n")
    assert problems_of(folder, size="paper") == [f"{folder / 'a.toml'}: --size: got 'paper'; it has cpu only"]


def test_all_broken_files_are_named_at_once_and_a_shared_one_once(tmp_path: Path) -> None:
    one = write(tmp_path / "one", _base="[config]\nnum-clients = 0\nextra = 1\n", a=row_text(), b=row_text("train.epochs = 0"))
    two = write(tmp_path / "two", _base="= broken", c=row_text(), d="also broken")
    three = write(tmp_path / "three", _base='base = "nowhere.toml"', e=row_text())
    found = problems_of(one, two, three)
    assert len(found) == len(set(found)) == 6
    for start in (
        f"{one / '_base.toml'}: num-clients: got 0",
        f"{one / '_base.toml'}: extra: unknown key",
        f"{one / 'b.toml'}: train.epochs: got 0",
        f"{two / '_base.toml'}: cannot be read as TOML",
        f"{two / 'd.toml'}: cannot be read as TOML",
        f"{three / 'nowhere.toml'}: cannot be read as TOML",
    ):
        assert sum(problem.startswith(start) for problem in found) == 1, start


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        ('title = "x"', "title: unknown key; allowed: base, report-rounds"),
        ("base = 3", "base: got 3; wanted the path of a file"),
        ('base = "_base.toml"', "base: leads back to this file"),
        ("cpu = 1", "cpu: got 1; wanted a table"),
        ("[cpu]\nconfi = 1", "cpu.confi: unknown key; allowed: report-rounds, target-accuracy, note, config"),
        ("note = 1", "note: got 1; wanted text"),
        ("[cpu]\nconfig = 2", "config: got 2; wanted a table of settings"),
        ("target-accuracy = 60", "target-accuracy: got 60; wanted a number > 0 and <= 1"),
        (
            "[cpu]\nreport-rounds = [9]",
            "report-rounds: got [9]; wanted a list of whole numbers from 1 to num-server-rounds, which is 5",
        ),
        ("[config]\nseed = 3", "seed: the sweep itself sets it; leave it out"),
    ],
)
def test_a_malformed_base_is_named(tmp_path: Path, base: str, problem: str) -> None:
    folder = write(tmp_path / "set", _base=base, a=row_text())
    found = problems_of(folder)
    assert len(found) == 1 and found[0].startswith(f"{folder / '_base.toml'}: {problem}")


def test_a_base_is_no_row(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", _base="", _other="")
    assert problems_of(folder) == [f"{folder}: no .toml file with a row in this folder"]
    assert f"{folder / '_other.toml'}: holds what rows share, and is no row" in problems_of(folder / "_other.toml")


def test_overrides_from_the_command_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", a=row_text("data.name = 'cifar10'"))
    (row,) = read_rows([folder], overrides={"data.path": "/home/me/cifar", "data.alpha": 0.5, "state-dir": "/s"})
    assert row.config.data.path == "/home/me/cifar" and row.config.data.alpha == 0.5
    assert row.command((0,)) == f"fbl-flower sweep {folder / 'a.toml'} -c 'data.path=\"PATH\" data.alpha=0.5' --seeds 0"
    assert problems_of(folder, overrides={"seed": 1, "data.alfa": 1}) == [
        "-c: seed: the sweep itself sets it; leave it out",
        "-c: data.alfa: unknown key; did you mean data.alpha?",
    ]


@pytest.mark.parametrize("text", ['a "nice" photo of {name}', "a child's {name}", "plain", "C:\\images"])
def test_the_command_of_a_row_gives_its_text_again(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "set", a=row_text("data.name = 'cifar10'"))
    (row,) = read_rows([folder], overrides={"generator.prompt": text})
    words = shlex.split(row.command((0,)))
    assert read_overrides([words[words.index("-c") + 1]]) == {"generator.prompt": text}


def test_a_result_is_of_the_settings_that_change_numbers(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", a=row_text("data.name = 'cifar10'"))

    def read(**overrides: bool | int | float | str) -> Row:
        return read_rows([folder], overrides={key.replace("__", ".").replace("_", "-"): v for key, v in overrides.items()})[0]

    stored = {"kind": "federation", "config": identity(read(data__path="/a/b").config)}
    assert "/a/b" not in json.dumps(stored)
    assert read(data__path="/c", state_dir="/d", timeout=5.0).differences(stored) == []
    assert read(data__alpha=0.2).differences(stored) == ["data.alpha: 0.1, now 0.2"]
    del stored["config"]["data.wrong-labels"]  # a result from before this setting existed: it had the default
    assert read().differences(stored) == []
    assert read(data__wrong_labels=0.2).differences(stored) == ["data.wrong-labels: 0.0, now 0.2"]


def test_a_generator_is_known_by_its_content_and_not_by_its_place(tmp_path: Path) -> None:
    for place, recipe in (("a", "{}"), ("b", "{}"), ("c", '{"steps": 1}')):
        (tmp_path / place / "mine").mkdir(parents=True)
        (tmp_path / place / "mine" / "recipe.json").write_text(recipe)
    a, b, c = (
        identity(parse_config({"generator.path": str(tmp_path / place / "mine")}))["generator.path"]
        for place in ("a", "b", "c")
    )
    assert a == b != c and str(a).startswith("mine@") and str(tmp_path) not in str(a)


def test_a_packaged_generator_that_changed_makes_other_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", a=row_text("data.name = 'digits'"), b=row_text("balancing.enabled = false"))
    row, without = read_rows([folder])
    stored = {"kind": "federation", "config": identity(row.config)}
    assert str(stored["config"]["generator.bundled"]).startswith("digits-8px@")
    assert row.differences(stored) == []
    older = {key: value for key, value in stored["config"].items() if key != "generator.bundled"}
    assert row.differences({"kind": "federation", "config": older}) == []  # a result of before this was noted
    assert "generator.bundled" not in identity(without.config)  # a row that generates nothing
    assert "generator.bundled" in identity(without.config, kind="synthetic-only")
    (tmp_path / "recipe.json").write_text("retrained")
    monkeypatch.setattr(experiments, "bundled_generator", lambda *_: tmp_path)
    row = read_rows([folder])[0]
    assert [text.split("@")[0] for text in row.differences(stored)] == ["generator.bundled: 'digits-8px"]


def test_own_files_are_part_of_a_result_and_a_named_data_sets_place_is_not(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name / "cat").mkdir(parents=True)
        (tmp_path / name / "cat" / "1.png").write_bytes(b"12345678"[: len(name)])
    text = "data.name = 'folder'\ndata.path = '{0}'\ngenerator.name = 'public-images'"
    paths = {name: str(tmp_path / name) for name in ("one", "other")}
    rows = {name: row_text(text.format(path)).replace('"t"', f'"{name}"') for name, path in paths.items()}
    folder = write(tmp_path / "set", **rows)
    one, other = read_rows([folder])
    assert experiments.twins([one, other]) == []
    stored = {"kind": "federation", "config": dict(one.identity)}
    assert one.differences(stored) == [] and other.differences(stored)[0].startswith("data.files: ")
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = read_rows([folder / "one.toml"], overrides={"data.path": str(tmp_path / "moved")})[0]
    assert moved.differences(stored) == []
    assert "data.files" not in read_rows([write(tmp_path / "named", a=row_text())])[0].identity


@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name)
def test_every_set_finds_the_generators_that_it_uses(folder: Path) -> None:
    for size in ("cpu", "paper"):
        used = [
            identity(row.config, row.kind).get("generator.bundled", "")
            for row in read_rows([folder], size=size, overrides={"data.path": "/data"})
        ]
        # CIFAR-10's does not come with the package yet: its sets say so, and take generator.path on the command line
        assert {str(name) for name in used if str(name).endswith("@none")} <= {"cifar10-32px@none"}


def test_the_folder_that_one_stands_in_is_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "set", a=row_text())
    monkeypatch.chdir(folder)
    assert [row.name for row in read_rows([Path(".")])] == ["a"]


def test_test_and_validation_are_not_mixed_in_a_table(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", a=row_text(), b=row_text("data.evaluate-on = 'validation'"))
    assert problems_of(folder)[0].startswith("data.evaluate-on: some rows are scored on test images and others on validation")


@pytest.mark.parametrize("size", ["cpu", "paper"])
@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name)
def test_every_set_is_valid_and_says_what_its_size_is(folder: Path, size: str) -> None:
    rows = read_rows([folder], size=size, overrides={"data.path": "/data"})
    federations = [row for row in rows if row.kind == "federation"]  # of the others, rounds say only how many steps are taken
    assert all(row.config.num_server_rounds >= 30 and row.config.fraction_train == 0.5 for row in federations)
    assert all(any(f"size {size}" in note for note in row.notes) and row.target for row in rows)
    distinct = {json.dumps([row.kind, flatten(row.config)]) for row in rows}
    assert len(distinct) == len(rows) == len({row.title for row in rows})
    assert {row.config.data.evaluate_on for row in rows} == {"validation" if "tuning" in folder.name else "test"}
    if size == "paper":
        assert all("200 rounds" in row.notes[0] or "tuning" in folder.name for row in federations)
        assert all(row.config.model.stem == "32x32" and row.config.model.name == "resnet18" for row in rows)
        assert {row.config.num_server_rounds for row in federations} == {60 if "tuning" in folder.name else 200}
        assert {row.config.num_clients for row in rows} == ({20, 50, 100} if "framework" in folder.name else {20})


def test_what_reduces_a_set_is_in_its_table() -> None:
    """Its rounds, epochs and images are those that the note says; the note names all in which the sizes differ."""
    for file, what in (
        ("02-ablation-cifar10/05-replay", ["40 rounds instead of 200", "one local epoch instead of two", "10,000 images", "40,000 at full"]),
        ("01-main-cifar10/06-fbl", ["40 rounds instead of 200", "one local epoch instead of two", "20,000 images", "40,000 at full"]),
        ("06-embedding-tiny-imagenet/01-raw", ["50 rounds instead of 200", "scaled to 32", "6,000 images", "2,000 for the"]),
    ):  # fmt: skip
        path = ROOT / "experiments" / f"{file}.toml"
        small, large = (read_rows([path], size=size, overrides={"data.path": "/d"})[0] for size in ("cpu", "paper"))
        text, config = " ".join(small.notes).replace("\n", " "), small.config
        assert all(words in text for words in what)
        assert f"{config.num_server_rounds} rounds instead of {large.config.num_server_rounds}" in text
        assert f"{config.data.num_private:,} images" in text and "ImageNet stem" in text
        differ = {key for key, value in flatten(config).items() if flatten(large.config)[key] != value}
        assert differ <= {
            "num-server-rounds", "train.epochs", "model.stem", "data.num-test", "data.num-private", "data.image-size",
            "data.num-public", "data.num-validation",
        }  # fmt: skip


@pytest.mark.parametrize("size", ["cpu", "paper"])
def test_fedavg_and_what_is_built_on_it_have_its_best_learning_rate(size: str) -> None:
    """In every set but the tuning's own, unless the title says that a row has another."""
    for folder in SETS:
        for row in read_rows([folder], size=size, overrides={"data.path": "/d"}) if "tuning" not in folder.name else []:
            alone = row.kind == "federation" and not row.config.balancing.enabled and row.config.method.name != "scaffold"
            said = re.search(r", learning rate ([\d.]+)", row.title)
            wanted = float(said[1]) if said else 0.003 if alone else 0.05
            assert row.config.train.learning_rate == wanted, row.file


def test_every_method_has_the_same_number_of_candidates() -> None:
    rows = read_rows([ROOT / "experiments" / "00-tuning-cifar10"])
    candidates: dict[tuple[str, bool], int] = {}
    for row in rows:
        kind = (row.config.method.name, row.config.balancing.enabled)
        candidates[kind] = candidates.get(kind, 0) + 1
    assert len(candidates) == 6 and set(candidates.values()) == {4}


def test_the_ablation_adds_one_part_at_a_time() -> None:
    rows = read_rows([ROOT / "experiments" / "02-ablation-cifar10"])
    before = flatten(rows[0].config)
    steps = []
    for row in rows[1:5]:
        now = flatten(row.config)
        steps.append({key: now[key] for key in now if now[key] != before[key]})
        before = now
    assert steps == [
        {"balancing.sampling": "loss"},
        {"balancing.alignment": True, "balancing.drop": 0.0},
        {"balancing.drop": 0.5},
        {"balancing.replay-period": 5},
    ]
    assert sorted(row.config.balancing.replay_ratio for row in rows[4:9]) == [0.0, 0.05, 0.1, 0.3, 1.0]
