"""The command line: what it accepts, what it says of bad input, and its exit codes."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fbl_flower import cli
from fbl_flower.commands import app_folder, flower_cli, simulation
from fbl_flower.commands.overrides import chosen_config, read_overrides, read_toml
from fbl_flower.config import RunConfig, flatten, to_toml
from fbl_flower.errors import ConfigError, RunFailed

ROOT = Path(__file__).parents[1]


def problems_of(arguments: list[str], **kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        chosen_config(arguments, **kwargs)
    return caught.value.problems


def test_overrides_are_read_as_flower_reads_them() -> None:
    from flwr.common.config import parse_config_args

    pairs = ["num-server-rounds=3 data.alpha=0.5", "balancing.enabled=false generator.path='/a b' data.name=\"digits\""]
    assert read_overrides([" ".join(pairs)]) == parse_config_args([" ".join(pairs)])
    assert read_overrides(pairs) == {  # of several arguments Flower itself would lose data.alpha
        "num-server-rounds": 3, "data.alpha": 0.5, "balancing.enabled": False, "generator.path": "/a b", "data.name": "digits",
    }  # fmt: skip


def test_overrides_from_a_file_and_later_ones_win(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('seed = 4\n[data]\nname = "digits"\n')
    assert read_overrides([str(tmp_path / "run.toml"), "seed=5"]) == {"seed": 5, "data.name": "digits"}


@pytest.mark.parametrize("text", ['a"b', "a'b", "line\nbreak", "tab\t", "\x7f", "Zürich 雪", "C:\\runs", ""])
def test_toml_round_trip(text: str, tmp_path: Path) -> None:
    values = {"output-dir": text, "data.alpha": 1e-05, "balancing.enabled": True, "seed": 7}
    (tmp_path / "x.toml").write_text(to_toml(values), encoding="utf-8")
    assert read_toml(tmp_path / "x.toml") == values


def test_every_problem_is_reported_at_once() -> None:
    problems = problems_of(["data.name=digits seed=-1 num-clients", "train.learnig-rate=0.1 data.alpha='x' nowhere.toml"])
    text = "\n".join(problems)
    assert len(problems) == 6
    assert "data.name: got digits, which is no TOML value" in text and "('digits')" in text
    assert "-c: got 'num-clients'" in text and "-c: got 'nowhere.toml'" in text
    assert "seed: got -1 (int); allowed: whole number >= 0" in text
    assert "did you mean train.learning-rate?" in text and "data.alpha: got 'x' (str)" in text


def test_only_differences_are_passed_on_and_relative_paths_are_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, settings = chosen_config(["num-clients=10 seed=3 output-dir='out' state-dir='~/x' generator.path='/abs'"])
    assert settings == {"seed": 3, "output-dir": str(tmp_path / "out"), "state-dir": "~/x", "generator.path": "/abs"}
    assert config.output_dir == str(tmp_path / "out")


def resumable(folder: Path) -> Path:
    (folder / "config.toml").write_text(to_toml(flatten(RunConfig(seed=3, num_server_rounds=8))))
    return folder


def test_resume_keeps_the_settings_and_may_raise_the_rounds(tmp_path: Path) -> None:
    _, settings = chosen_config(["num-server-rounds=12"], resume=resumable(tmp_path))
    assert settings == {"seed": 3, "num-server-rounds": 12, "resume": str(tmp_path)}


def test_resume_refuses_other_changes(tmp_path: Path) -> None:
    problems = problems_of(["num-server-rounds=7 data.alpha=0.3"], resume=resumable(tmp_path))
    assert len(problems) == 2 and "data.alpha: got 0.3" in problems[0] and "has 8, which may only be raised" in problems[1]
    assert "config.toml; wanted the run directory" in problems_of([], resume=tmp_path / "nowhere")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "-c", "seed=true"], "seed: got True (bool); allowed: whole number >= 0"),
        (["run", "--engine", "local", "--nodes", "2"], "--nodes, --app: only for --engine simulation"),
        (["run", "--nodes", "0"], "--nodes: got 0"),
        (["run", "-c", "data.name='cifar10' data.path='nowhere.parquet'"], "data.path: no file at"),
        (
            ["generator", "train", "--data", "mnist"],
            "data.name: got 'mnist' (str); allowed: mnist5k | digits | cifar10 | cifar100",
        ),
        (
            ["generator", "train", "--data", "digits", "--augmentation", "-1"],
            "augmentation of a generator's training: got -1.0",
        ),
        (["generator", "quality", "nowhere", "--data", "digits", "--image-size", "28"], "nowhere"),
        (["sweep", "nowhere.toml"], "nowhere.toml: cannot be read as TOML"),
    ],
)
def test_bad_input_is_one_clear_message_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_file_where_a_folder_is_wanted_is_a_failure_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["deploy", "keys", "a", "--dir", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith("fbl-flower: failed: [Errno ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_in_process_run_does_not_wait_for_its_clients(tmp_path: Path, number: signal.Signals) -> None:
    """The clients would sleep for ten minutes."""
    text = f"""
import sys, time
from fbl_flower import cli
from fbl_flower.federation import client
def prepare(*_, **__):
    print("at work", flush=True)
    time.sleep(600)
client.prepare_client = prepare
sys.exit(cli.main(["run", "--engine", "local", "-c", "output-dir={str(tmp_path / "runs")!r} state-dir={str(tmp_path / "state")!r} data.name='digits' model.name='tiny'"]))
"""
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("at work" in line for line in process.stdout)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.endswith("fbl-flower: interrupted\n")


def test_a_failed_run_exits_1_and_an_interrupted_one_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def fails(settings: dict[str, Any], **kwargs: Any) -> None:
        asked.update(kwargs, settings=settings)
        raise RunFailed("run 7: finished:failed: no client succeeded")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    arguments = ["run", "-c", "data.name='digits' model.name='tiny' data.num-private=-1 num-clients=4 balancing.enabled=false"]
    monkeypatch.setattr(simulation, "run_simulation", fails)
    assert cli.main(arguments) == 1
    assert "failed: run 7: finished:failed: no client succeeded" in capsys.readouterr().err
    assert asked["nodes"] == 4 and asked["settings"]["data.name"] == "digits"
    monkeypatch.setattr(simulation, "run_simulation", interrupted)
    assert cli.main(arguments) == 130


def fake_flower(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, status: str, started: bool = True, slow_starts: int = 0
) -> None:
    """Put a script in the place of `flwr` that exits 0 whatever happens, as the real one does."""
    script = tmp_path / "flwr"
    says = "Successfully started run 42 in federation x" if started else "Error: no such app"
    answer = f'{{"success": true, "runs": [{{"run-id": "42", "status": "{status}", "status-details": "told to fail"}}]}}'
    script.write_text(f"""#!/bin/sh
if [ $1 != run ]; then echo Listing; echo '{answer}'; exit; fi
echo run >> {tmp_path}/calls
if [ $(wc -l < {tmp_path}/calls) -le {slow_starts} ]; then echo '| Failed to start local SuperLink within 15s. See'; exit 1; fi
echo '{says}'
""")
    script.chmod(0o755)
    for module in (simulation, flower_cli):
        monkeypatch.setattr(module, "flower_program", lambda name: str(script))
        monkeypatch.setattr(module, "neutral_directory", lambda: tmp_path)
    monkeypatch.setattr(simulation, "check_superlink", lambda app: None)


def test_a_run_that_failed_is_found_out_although_flower_exits_0(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_flower(monkeypatch, tmp_path, status="finished:failed")
    with pytest.raises(RunFailed, match="run 42: finished:failed: told to fail"):
        simulation.run_simulation({"seed": 1}, nodes=2)


def test_a_run_that_completed_and_one_that_was_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_flower(monkeypatch, tmp_path, status="finished:completed")
    simulation.run_simulation({"seed": 1}, nodes=2)
    assert "started run 42" in capfd.readouterr().out
    fake_flower(monkeypatch, tmp_path, status="", started=False)
    with pytest.raises(RunFailed, match="did not start the run: Error: no such app"):
        simulation.run_simulation({}, nodes=2)


@pytest.mark.parametrize("slow_starts", [1, 2])
def test_a_superlink_that_starts_slowly_gets_a_second_chance(
    slow_starts: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And no third one."""
    fake_flower(monkeypatch, tmp_path, status="finished:completed", slow_starts=slow_starts)
    expected = (
        contextlib.nullcontext() if slow_starts == 1 else pytest.raises(RunFailed, match="start local SuperLink within 15s")
    )
    with expected:
        simulation.run_simulation({}, nodes=2)
    output = capfd.readouterr()
    assert output.err == "This machine is slow or busy. Trying once more.\n"
    assert output.out.count("Failed to start") == slow_starts and ("started run 42" in output.out) == (slow_starts == 1)
    assert (tmp_path / "calls").read_text() == "run\nrun\n"


def test_flowers_advice_is_left_out_of_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Lines of Flower 1.39, with its colours; an empty line between others is left out too, an empty warning is not."""
    lines = [
        "Successfully started run 42\n",
        "\x1b[93mWARNING \x1b[0m:   Since flwr 1.32, default simulated SuperNodes changed from 10 to 2.\n",
        "\x1b[92mINFO \x1b[0m:      Federation `@none/default` (4 simulated SuperNodes)\n",
        "\x1b[92mINFO \x1b[0m:      To change federation size, use the following command:\n",
        "\x1b[92mINFO \x1b[0m:      \tflwr federation simulation-config @none/default <superlink> --num-supernodes <N>\n",
        "\x1b[92mINFO \x1b[0m:      \n",
        "INFO :      \n",
        "(pid=12829) [mutex.cc : 452] RAW: Lock blocking 0x5561d294b810   @ 0x7f57d6d98752\n",
        "\x1b[93mWARNING \x1b[0m:   \n",
        "\x1b[91mERROR \x1b[0m:     x\n",
    ]
    (tmp_path / "log").write_text("".join(lines))
    assert simulation.follow(["cat", str(tmp_path / "log")]) == "42"
    assert capfd.readouterr().out == "".join(lines[i] for i in (0, 2, 8, 9))


def test_the_app_is_the_checkout_or_made_from_the_package(tmp_path: Path) -> None:
    assert app_folder.checkout_root() == ROOT
    package = tmp_path / "site-packages" / "fbl_flower"
    (package / "_app").mkdir(parents=True)
    (package / "data").mkdir()
    for file in ("_app/pyproject.toml", "_app/server_app.py", "_app/client_app.py", "__init__.py", "data/batches.py"):
        (package / file).write_text("")
    assert app_folder.checkout_root(package) is None
    folder = app_folder.assemble_app(tmp_path / "app", package)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["client_app.py", "fbl_flower/__init__.py", "fbl_flower/data/batches.py", "pyproject.toml", "server_app.py"]
    with pytest.raises(ConfigError, match=r"--app: .* holds no pyproject\.toml"), app_folder.app_folder(tmp_path):
        pass


def test_the_local_engine_is_given_the_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fbl_flower.federation import local

    asked: list[Any] = []

    def run(settings: dict[str, Any], *, workers: int) -> SimpleNamespace:
        asked.extend((settings, workers))
        return SimpleNamespace(run_dir=Path("/runs/1"))

    monkeypatch.setattr(local, "run_local", run)
    assert cli.main(["run", "--engine", "local", "-c", "data.name='digits' model.name='tiny' balancing.enabled=false"]) == 0
    assert asked == [{"data.name": "digits", "model.name": "tiny", "balancing.enabled": False}, cli.num_cores()]
    assert "run directory: /runs/1" in capsys.readouterr().out


def test_the_page_of_settings_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == cli.configuration_table() + "\n", (
        "fbl-flower config > docs/configuration.md"
    )


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, fbl_flower.cli as c; c._parser(); sys.exit('torch' in sys.modules or 'flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_unknown_arguments_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["sweep", "x.toml", "--seeds", "0,0"])
    assert caught.value.code == 2 and "--seeds" in capsys.readouterr().err


def test_data_plot_draws_the_partition_of_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten classes over five clients with two each: every class has one owner."""
    out = tmp_path / "p.png"
    settings = "data.name='digits' data.partition='classes' num-clients=5"
    assert cli.main(["data", "plot", "-c", settings, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: 5 clients with ") and printed.endswith(" of 2 to 2 classes\n")
    assert cli.main(["data", "plot", "-c", settings + " data.classes-per-client=11", "--out", str(tmp_path / "no.png")]) == 2
    assert "data.classes-per-client: got 11; the private part has 10 classes" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


def test_data_plot_names_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "plot", "-c", "data.name='digits'", "--out", str(tmp_path)]) == 2
    assert f"--out: {tmp_path} is a folder; give the name of a file" in capsys.readouterr().err


def test_a_gallery_of_real_and_synthetic_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pictures" / "gallery.png"
    assert cli.main(["generator", "gallery", "--data", "digits", "--threads", "1", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and str(out) in capsys.readouterr().out
    assert cli.main(["generator", "gallery", str(tmp_path / "nowhere"), "--out", str(out)]) == 2
    assert "no folder at" in capsys.readouterr().err
