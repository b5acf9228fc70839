"""Real failures in a federation of real processes: TLS, node authentication, one SuperLink and three SuperNodes.

Each test puts several events into one federation, because starting one takes longer than most of them. A test waits for what it is
about, and fails after minutes of that. Three clocks remain, which a very busy machine can run out: the time that a round and the
preparation may take (`timeout`, `prepare.timeout`), and the number of rounds in which a node must have come back.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deployment import Deployment, Watch, carries, cuttable_network, wait_for
from helpers import quick, write_folder
from safetensors.numpy import load_file
from test_generation_support import TINY

from fbl_flower.config import parse_config
from fbl_flower.data.datasets import load_parts
from fbl_flower.generation.training import train_generator

pytestmark = pytest.mark.real_process

LONG = 300.0  # seconds; patience of a busy machine


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path / "deployment", dict(os.environ)) as made:
        yield made


def settings_of(tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    common = {"num_clients": 3, "fraction_train": 1.0, "checkpoint_every": 1, "timeout": 90.0, "prepare__timeout": 120.0}
    return quick(tmp_path, **(common | overrides))


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Return number and time of every whole file: a file that is written again has others."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def alignment_rounds(state_dir: Path) -> list[int]:
    (file,) = state_dir.glob("clients/*/*/alignment.jsonl")
    return [json.loads(line)["round"] for line in file.read_text().splitlines()]


def test_clients_that_are_killed_are_left_out_and_come_back(tmp_path: Path, deployment: Deployment) -> None:
    """Node 2 is killed while it generates, node 1 while it trains; the method has a state on each client."""
    for node in range(3):
        deployment.start_node(node)
    generator = {"generator__name": "diffusion", "generator__steps": 45, "generator__batch_size": 4}
    settings = settings_of(
        tmp_path, num_server_rounds=6, timeout=150.0, prepare__timeout=180.0, method__name="moon", **generator
    )
    watch, caches = Watch(tmp_path / "runs", deployment.log), [deployment.state_dir(node) / "cache" for node in range(3)]
    run_id = deployment.submit(settings)

    wait_for(lambda: len(files_of(caches[2])) >= 4, LONG, "node 2 to generate", deployment.log)
    deployment.send(signal.SIGSTOP, "node-2")
    before_kill = files_of(caches[2])
    deployment.kill("node-2")

    first = watch.wait_for_row(lambda row: 1 in row["clients"], LONG, "node 1 in a round")
    deployment.wait_for_new_process("node-1", "flwr-clientapp", LONG)
    complete, rounds_before = files_of(caches[1]), alignment_rounds(deployment.state_dir(1))
    (memory,) = deployment.state_dir(1).glob("clients/*/client-0001/moon")
    newest, written = max(files_of(memory).items())
    deployment.kill("node-1")
    lost = watch.wait_for_row(
        lambda row: row["round"] > first["round"] and "1" in row["left_out"], LONG, "node 1 to be left out"
    )
    assert files_of(memory)[newest] == written and load_file(memory / newest)  # deleted two rounds after its return
    watch.wait_for_row(lambda row: row["round"] > lost["round"] and 1 in row["clients"], LONG, "node 1 to return")
    summary = watch.wait_for_end(2 * LONG)

    assert summary["status"] == "completed" and summary["rounds"] == 6
    assert summary["not_prepared"].keys() == {"2"}
    assert any(2 in row["clients"] for row in watch.rows() if row["round"])
    after = files_of(caches[2])
    assert before_kill.items() <= after.items() and len(after) > len(before_kill)  # made once, and the rest
    assert files_of(caches[1]) == complete
    assert alignment_rounds(deployment.state_dir(1))[: len(rounds_before)] == rounds_before != []
    wait_for(lambda: "Round 6/6" in deployment.flwr("log", run_id, "edge", "--show"), LONG, "the whole log", deployment.log)
    assert "starts afresh" not in deployment.flwr("log", run_id, "edge", "--show")
    table = json.loads((watch.run_dir / "nodes.json").read_text())
    assert [row["name"] for row in table["nodes"]] == ["site-0", "site-1", "site-2"]
    assert all(row["not_prepared"] == {} for row in table["nodes"])
    # Started again within seconds, it may have been back before the server asked Flower who is connected.
    assert lost["left_out"]["1"] in (
        "no answer within 150 s", "its node is not connected", "its process ended without an answer",
    )  # fmt: skip


def test_a_client_that_is_too_slow_is_left_out_and_back_in_a_later_round(tmp_path: Path, deployment: Deployment) -> None:
    """Node 0 stands still, as an overloaded machine does, until a round has gone on without it."""
    for node in range(3):
        deployment.start_node(node)
    watch = Watch(tmp_path / "runs", deployment.log)
    deployment.submit(settings_of(tmp_path, num_server_rounds=8, timeout=150.0, balancing__enabled=False))
    first = watch.wait_for_row(lambda row: row["clients"] == [0, 1, 2], LONG, "all three in a round")
    deployment.wait_for_new_process("node-0", "flwr-clientapp", LONG)
    assert deployment.send(signal.SIGSTOP, "node-0")
    slow = watch.wait_for_row(
        lambda row: row["round"] > first["round"] and "0" in row["left_out"], LONG, "node 0 to be left out"
    )
    deployment.send(signal.SIGCONT, "node-0")
    watch.wait_for_row(lambda row: row["round"] > slow["round"] and 0 in row["clients"], LONG, "node 0 to return")
    summary = watch.wait_for_end(LONG)
    assert summary["status"] == "completed" and "0" in summary["left_out"][str(slow["round"])]
    # Flower takes a node that is silent for up to 60 s for gone, which is sooner than the round's end.
    assert slow["left_out"]["0"] in ("no answer within 150 s", "its node is not connected")


def mount_small_disk(folder: Path) -> bool:
    """Put a disk of 16 KiB at a folder; without the right to, warn and return False."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        warnings.warn(f"a full disk is not tried, because no small one can be mounted: {done.stderr.strip()}", stacklevel=2)
    return done.returncode == 0


@pytest.mark.filterwarnings("default:a full disk is not tried")
def test_bad_machines_are_named_and_a_killed_server_goes_on_by_the_same_command(tmp_path: Path, deployment: Deployment) -> None:
    """Node 1's disk is full and node 2's generator broken, until both are mended; then the server dies, and node 2's data with it."""
    small_disk = deployment.state_dir(1)
    full = mount_small_disk(small_disk)
    try:
        own = {
            "data.name": "folder", "data.path": str(write_folder(tmp_path / "server", {"ant": 30, "bee": 30, "cat": 30})),
            "data.classes": "ant,bee,cat", "data.image-size": 8, "data.num-private": -1,
            "generator.name": "diffusion", "generator.path": "~/generator", "resume": "auto",
        }  # fmt: skip
        settings = settings_of(tmp_path, num_server_rounds=5, timeout=240.0) | own
        train_generator(load_parts(parse_config(settings).data), recipe=TINY, out=deployment.home("server") / "generator")
        weights = []
        for node in range(3):
            photos = write_folder(tmp_path / f"photos-{node}", {"ant": 8, "cat": 4})
            deployment.start_node(node, data_path=str(photos))
            shutil.copytree(deployment.home("server") / "generator", deployment.home(f"node-{node}") / "generator")
            weights.append(next((deployment.home(f"node-{node}") / "generator").glob("*.safetensors")))
        whole = weights[2].read_bytes()
        weights[2].write_bytes(whole[:-10])
        watch = Watch(tmp_path / "runs", deployment.log)
        deployment.submit(settings)

        first = watch.wait_for_row(lambda row: True, LONG, "the first round")
        assert first["clients"] == ([0] if full else [0, 1])
        assert first["left_out"].keys() == ({"1", "2"} if full else {"2"})
        if full:
            assert "its disk has too little space: 0.0 MiB needed for 12 images, 0.0 MiB free" in first["left_out"]["1"]
        assert "its generator cannot be used" in first["left_out"]["2"]
        table = json.loads((watch.run_dir / "nodes.json").read_text())
        assert [list(row["not_prepared"]) for row in table["nodes"]] == [[], ["1"] if full else [], ["2"]]

        if full:
            subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
        weights[2].write_bytes(whole)
        watch.wait_for_row(lambda row: row["clients"] == [0, 1, 2], LONG, "all three in a round")
        deployment.kill("server")
        before = watch.rows()
        assert watch.summary() is None
        (tmp_path / "photos-2").rename(tmp_path / "vanished")
        deployment.start_superlink()
        deployment.submit(settings)
        summary = watch.wait_for_end(LONG)

        rows = watch.rows()
        assert summary["status"] == "completed" and [row["round"] for row in rows] == list(range(6))
        assert rows[: len(before) - 1] == before[:-1]  # the last may have come after the last checkpoint
        assert rows[-1]["clients"] == [0, 1] and "its data cannot be used" in rows[-1]["left_out"]["2"]
        # What went wrong before the kill is not forgotten, and the kill itself is told.
        assert summary["not_prepared"].keys() == first["left_out"].keys()
        for what in ("generator", "data"):
            assert f"its {what} cannot be used" in summary["not_prepared"]["2"]
        events = json.loads((watch.run_dir / "nodes.json").read_text())["events"]
        again = [event["round"] for event in events if (event["name"], event["event"]) == ("server", "started again")]
        assert again in ([before[-1]["round"]], [before[-1]["round"] + 1])
    finally:
        subprocess.run(["umount", "--lazy", small_disk], check=False, capture_output=True)


def test_private_folders_alone_make_a_generator_through_kills_on_both_sides(tmp_path: Path, deployment: Deployment) -> None:
    """Nobody has a public image. Node 1 and then the server are killed in rounds of the generator, which node 2 does not train and uses."""
    settings = settings_of(tmp_path, num_server_rounds=2, timeout=150.0) | {
        "data.name": "folder", "data.path": str(write_folder(tmp_path / "server", {"ant": 30, "bee": 30, "cat": 30})),
        "data.classes": "ant,bee,cat", "data.image-size": 8, "data.num-private": -1, "resume": "auto",
        "generator.name": "auto", "generator.steps": 1, "generator.guidance": 1.0,
        "federated-generator.rounds": 6, "federated-generator.epochs": 1, "federated-generator.fraction-train": 1.0,
    }  # fmt: skip
    for node, photos in enumerate(({"ant": 8, "cat": 4}, {"bee": 9}, {"cat": 10, "ant": 1})):
        folder = write_folder(tmp_path / f"photos-{node}", photos)
        extra = {"trains_generator": False} if node == 2 else {}
        deployment.start_node(node, data_path=str(folder), **extra)
    watch = Watch(tmp_path / "runs", deployment.log)

    def generator_rows() -> list[dict[str, Any]]:
        assert (watch.summary() or {}).get("status") != "failed", f"{watch.summary()}\n{deployment.log()}"
        files = list((tmp_path / "runs").glob("*/generator-rounds/metrics.jsonl"))
        return [json.loads(line) for line in files[0].read_text().split("\n")[:-1]] if files else []

    deployment.submit(settings)
    wait_for(generator_rows, LONG, "a round of the generator", deployment.log)
    deployment.wait_for_new_process("node-1", "flwr-clientapp", LONG)
    deployment.kill("node-1")
    known = len(generator_rows())
    wait_for(lambda: len(generator_rows()) > known, LONG, "a round after node 1 was killed", deployment.log)
    deployment.kill("server")
    before = generator_rows()
    deployment.start_superlink()
    deployment.submit(settings)
    summary = watch.wait_for_end(2 * LONG)

    rows = generator_rows()
    assert summary["status"] == "completed" and [row["round"] for row in rows] == list(range(1, 7))
    assert len(before) < 6 and rows[: len(before) - 1] == before[:-1]  # the last may have come after the last checkpoint
    assert all(set(row["clients"]) <= {0, 1} and row["left_out"].keys() <= {"1"} for row in rows)
    assert summary["generator"]["rounds"] == 6 and watch.rows()[-1]["clients"] == [0, 1, 2]
    (made,) = (tmp_path / "runs").glob("*/generator")
    for node in range(3):
        (kept,) = deployment.state_dir(node).glob("clients/*/generator")
        assert {f.name: f.read_bytes() for f in kept.iterdir()} == {f.name: f.read_bytes() for f in made.iterdir()}


def test_a_network_that_is_cut_and_healed(tmp_path: Path) -> None:
    """Node 2 is in a network namespace of its own. Its cable is cut until it is left out of a round, and plugged again.

    Its connection may then wait as long again as the cut was before it tries again, hence the number of rounds.
    """
    here, name = "10.213.77.1", f"fbl{os.getpid()}"
    with contextlib.ExitStack() as stack:
        try:
            plug = stack.enter_context(cuttable_network(name, here=here, there="10.213.77.2"))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces need root and iproute2: {error}")
        with Deployment(tmp_path / "deployment", dict(os.environ), addresses=[here]) as deployment:
            if not carries(name, here, deployment.fleet_port):
                pytest.skip(f"a namespace of this machine does not reach {here}, although both ends of its cable are up")
            for node in range(2):
                deployment.start_node(node)
            deployment.start_node(2, at=here, within=["ip", "netns", "exec", name])
            watch = Watch(tmp_path / "runs", deployment.log)
            deployment.submit(settings_of(tmp_path, num_server_rounds=14, balancing__enabled=False))
            first = watch.wait_for_row(lambda row: 2 in row["clients"], LONG, "node 2 in a round")
            plug(False)
            cut = watch.wait_for_row(
                lambda row: row["round"] > first["round"] and "2" in row["left_out"], LONG, "the cut to show"
            )
            plug(True)
            watch.wait_for_row(lambda row: row["round"] > cut["round"] and 2 in row["clients"], LONG, "node 2 to return")
            summary = watch.wait_for_end(2 * LONG)
            assert summary["status"] == "completed" and summary["rounds"] == 14
            assert cut["left_out"]["2"] in ("no answer within 90 s", "its node is not connected")
