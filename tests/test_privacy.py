"""Class counts never leave the client.

Two federations differ only in which class is crowded, and in both of them one client fails. Everything that reaches the server has to be the
same, but for model arrays, losses and clock times.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from helpers import RecordingGrid, write_parquet

from fbl_flower.config import parse_config
from fbl_flower.data.datasets import load_parts
from fbl_flower.federation import client, server
from fbl_flower.federation.local import LocalGrid, run_local
from fbl_flower.training.prepare import client_examples

NUM_CLIENTS = 3


# Two of three clients are rich or run SCAFFOLD. The size of a rich client's set would tell; with real weights it stays there.
MIXED = {"clients.rich-share": 0.67, "clients.methods": "scaffold=0.34, moon=0.33", "aggregation.weight-by": "real"}


def settings(folder: Path, crowded: int) -> dict[str, Any]:
    """A federation in which every client has far more images of class `crowded` than of any other."""
    folder.mkdir()
    labels = np.concatenate([np.tile(np.arange(10), 20), np.full(100, crowded)])
    return {
        "data.name": "cifar10",
        "data.path": str(write_parquet(folder / "images.parquet", labels)),
        "data.num-test": 40,
        "data.num-public": 50,
        "data.num-validation": 0,
        "data.num-private": -1,
        "data.partition": "iid",
        "model.name": "tiny",
        "generator.name": "public-images",
        "num-clients": NUM_CLIENTS,
        "num-server-rounds": 2,
        "checkpoint-every": 1,
        "fraction-train": 1.0,
        "train.epochs": 1,
        "output-dir": str(folder / "runs"),
        "state-dir": str(folder / "state"),
    }


@pytest.fixture
def server_log() -> Iterator[list[str]]:
    """What Flower's logger, the server's, says, and what the clients say in this process: a simulation passes it on to the server."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Collect()
    for name in ("flwr", "fbl_flower.client"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO)
    yield lines
    for name in ("flwr", "fbl_flower.client"):
        logging.getLogger(name).removeHandler(handler)


def seen_by_server(run_config: dict[str, Any], engine: Callable[..., None], log: list[str]) -> tuple[list[str], list[str]]:
    """Resume a run in which client 1's state is damaged and every image has to be made again.

    Returns:
        The messages and the log lines, without what may differ.
    """
    first = run_local(run_config)
    folder = Path(str(run_config["state-dir"])) / "clients" / first.run_dir.name / "client-0001"
    damaged = folder / "round-000002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:40])
    shutil.rmtree(Path(str(run_config["state-dir"])) / "cache")
    client._prepared.cache_clear()
    log.clear()
    messages: list[Message] = []
    engine(run_config | {"resume": str(first.run_dir), "num-server-rounds": 4}, messages)

    def neutral(text: str) -> str:
        text = text.replace(str(Path(str(run_config["state-dir"])).parent), "FOLDER").replace(first.run_dir.name, "RUN")
        text = re.sub(r"(accuracy|loss|on 40 test images:) \d+\.\d+", r"\1 X", text)
        return re.sub(r"\d+\.\d+ s\b", "T s", text)

    own = [
        line
        for line in log
        if engine is in_process
        or not re.search(r"(?i)\bray|simulat|flower|resource|supernode|backend|node_id|pyproject|run with id", line)
    ]
    failures = [m for m in messages if m.has_error()]
    assert len(failures) == 2, "client 1 fails in both rounds"
    return sorted(neutral(describe(m)) for m in messages), sorted(neutral(line) for line in own if line.strip())


def describe(message: Message) -> str:
    """Write down everything in a message but model arrays, losses and clock times."""
    kind = message.metadata.message_type
    if message.has_error():
        return f"{kind} error {message.error.code} {message.error.reason}"
    parts = [kind]
    for name, record in sorted(message.content.array_records.items()):
        parts += [f"{name}.{key} {array.dtype} {array.shape}" for key, array in record.items()]
    for name, configs in sorted(message.content.config_records.items()):
        parts += [f"{name}.{key}={value!r}" for key, value in configs.items()]
    for name, metrics in sorted(message.content.metric_records.items()):
        parts += [f"{name}.{key}={'*' if key in ('train-loss', 'seconds') else value}" for key, value in metrics.items()]
    return " ".join(parts)


def in_process(run_config: dict[str, Any], messages: list[Message]) -> None:
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=run_config)
    with LocalGrid(client.app, num_nodes=NUM_CLIENTS, run_config=run_config) as grid:
        recorder = RecordingGrid(grid)
        server.app(recorder, context)
    messages += recorder.messages


def in_simulation(run_config: dict[str, Any], messages: list[Message]) -> None:
    from flwr.simulation import run_simulation

    def configured(context: Context) -> Context:
        return Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config=context.node_config,
            state=context.state,
            run_config=dict(run_config),
        )

    def with_config(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        return call_next(message, configured(context))

    clients = ClientApp(mods=[with_config])
    clients.query("describe")(client.describe)
    clients.train("prepare")(client.prepare)
    clients.train()(client.train)
    servers = ServerApp()

    @servers.main()
    def main(grid: Grid, context: Context) -> None:
        recorder = RecordingGrid(grid)
        server.main(recorder, configured(context))
        messages.extend(recorder.messages)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(servers, clients, NUM_CLIENTS, backend_config=resources)


FILTER = {"balancing.filter": "neighbours", "balancing.filter-share": 0.3, "balancing.replay-period": 1}


@pytest.mark.parametrize(
    ("engine", "extra"),
    [(in_process, {}), (in_process, FILTER), pytest.param(in_simulation, {}, marks=pytest.mark.real_process)],
    ids=["in-process", "filter", "simulation"],
)
@pytest.mark.parametrize("mixed", [{}, MIXED], ids=["alike", "mixed"])
def test_what_reaches_the_server_does_not_tell_which_class_is_crowded(
    tmp_path: Path,
    server_log: list[str],
    engine: Callable[..., None],
    extra: dict[str, Any],
    mixed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "_PROGRESS_EVERY_S", 0.0)  # else nothing is said of images that are made so fast
    zero, seven = settings(tmp_path / "zero", 0) | extra | mixed, settings(tmp_path / "nine", 7) | extra | mixed
    for config, crowded in ((zero, 0), (seven, 7)):
        parsed = parse_config(config)
        parts = load_parts(parsed.data)
        for k in range(NUM_CLIENTS):
            counts = client_examples(parsed, parts, k).counts(10)
            assert counts.argmax() == crowded and counts.max() > 2 * counts.sort().values[-2]
    messages_zero, lines_zero = seen_by_server(zero, engine, server_log)
    messages_seven, lines_seven = seen_by_server(seven, engine, server_log)
    assert messages_zero == messages_seven
    assert lines_zero == lines_seven
    assert any("the client's state on disk is damaged" in line for line in lines_zero)
    assert any("100 % of its synthetic images generated" in line for line in lines_zero) or engine is not in_process
    assert not any("picture" in line for line in lines_zero)
    filtered = [json.loads(line) for log in tmp_path.rglob("filter.jsonl") for line in log.read_text().splitlines()]
    assert any(row["passed"] != row["made"] for row in filtered) == bool(extra)
    assert len(messages_zero) == 2 * (NUM_CLIENTS * (1 + 1 + 2))  # describe, prepare, two rounds; there and back
