"""A node of a deployment that has a generator folder of its own, and a server that has none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from helpers import quick
from test_generation_support import TINY

from fbl_flower.config import parse_config
from fbl_flower.data.datasets import load_parts
from fbl_flower.errors import GeneratorError
from fbl_flower.federation import client, preflight, server
from fbl_flower.federation.local import LocalGrid
from fbl_flower.generation.loading import load_generator
from fbl_flower.generation.training import train_generator
from fbl_flower.training.readiness import Readiness


class DeploymentGrid(LocalGrid):
    """For the server, nodes of their own."""

    is_simulated = False


def settings_of(tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    nowhere = str(tmp_path / "nowhere")
    return quick(tmp_path, generator__name="diffusion", generator__path=nowhere, generator__steps=1, **overrides)


def context_of(settings: dict[str, Any], **node_config: Any) -> Context:
    return Context(run_id=1, node_id=1, node_config=node_config, state=RecordDict(), run_config=settings)


def test_each_node_fills_from_its_own_folder_and_one_that_lacks_it_is_named(tmp_path: Path) -> None:
    """The run names a folder that is nowhere; two nodes have different generators, and the third one's folder is missing."""
    client._prepared.cache_clear()
    settings = settings_of(tmp_path, data__num_private=60, num_clients=3, num_server_rounds=1, fraction_train=1.0)
    parts, fingerprints = load_parts(parse_config(settings).data), set()
    with DeploymentGrid(client.app, num_nodes=3, run_config=settings) as grid:
        for node in (1, 2, 3):
            folder = tmp_path / f"generator-{node}"
            grid._contexts[node].node_config["generator-path"] = str(folder)
            if node != 3:
                train_generator(parts, recipe=replace(TINY, seed=node), out=folder)
                config = parse_config(settings | {"generator.path": str(folder)})
                fingerprints.add(load_generator(config, parts).fingerprint[:16])
        context = context_of(settings)
        server.app(grid, context)
    run_dir = Path(str(context.state.config_records["run"]["directory"]))
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["clients"] == [0, 1]
    assert row["left_out"]["2"].startswith("its generator cannot be used: its folder is missing; ")
    assert len(fingerprints) == 2
    assert {path.name for path in (tmp_path / "state" / "cache").iterdir()} == fingerprints


def test_a_node_without_the_key_has_the_run_s_configuration(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    assert client._config(context_of(settings)) == parse_config(settings)
    own = client._config(context_of(settings, **{"generator-path": "/srv/generator"}))
    assert own == parse_config(settings | {"generator.path": "/srv/generator"})


def test_a_node_that_was_prepared_with_another_generator_is_checked_again(tmp_path: Path) -> None:
    def mark(**node_config: Any) -> Path:
        config = client._config(context_of(settings_of(tmp_path), **node_config))
        return Readiness(config, 0, state_dir=tmp_path, own_folder=None)._mark

    assert len({mark(), mark(**{"generator-path": "/a"}), mark(**{"generator-path": "/b"})}) == 3


@pytest.mark.parametrize("warm_start", [False, True])
def test_a_server_needs_the_generator_only_for_a_warm_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_start: bool
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(preflight, "log", lambda level, text, *values: lines.append(text % values))
    config = parse_config(settings_of(tmp_path, warm_start__enabled=warm_start))
    with pytest.raises(GeneratorError, match="no folder at"):
        preflight.preflight(config)
    assert lines == []
    if warm_start:
        with pytest.raises(GeneratorError, match="no folder at"):
            preflight.preflight(config, clients_here=False)
    else:
        preflight.preflight(config, clients_here=False)
        assert len(lines) == 1 and str(tmp_path / "nowhere") in lines[0]
