"""A client of a deployment that has images of its own on its device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from helpers import quick, write_folder
from test_generation_support import TINY

from fbl_flower.config import DataConfig
from fbl_flower.data.client_folder import client_folder_examples, client_folder_parts
from fbl_flower.data.datasets import load_parts
from fbl_flower.errors import DataError, RunFailed
from fbl_flower.federation import client, server
from fbl_flower.federation.local import LocalGrid
from fbl_flower.generation.training import train_generator

CLASSES = "cat,bee,ant"


def config_of(**settings: Any) -> DataConfig:
    return DataConfig(**({"name": "folder", "path": "/server", "classes": CLASSES, "image_size": 8} | settings))


@pytest.mark.parametrize("inner", ["", "train"])
def test_all_training_images_of_the_folder_are_the_clients(tmp_path: Path, inner: str) -> None:
    """Two of three classes are there; their labels are their places in the federation's list."""
    write_folder(tmp_path / inner, {"ant": 4, "cat": 3})
    if inner:
        write_folder(tmp_path / "test", {"bee": 5})
    mine = client_folder_examples(config_of(), tmp_path)
    assert mine.counts(3).tolist() == [3, 0, 4]
    assert mine.images[:, 0, 0, 0].tolist() == list(range(7)) and mine.labels.tolist() == [2] * 4 + [0] * 3
    assert mine.images.shape == (7, 3, 8, 8) and not mine.synthetic.any()


def test_they_are_the_private_part_of_a_data_set_that_is_otherwise_empty(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 4})
    parts = client_folder_parts(config_of(image_size=16, channels=1), tmp_path)
    assert [len(p) for p in (parts.test, parts.public, parts.validation, parts.private)] == [0, 0, 0, 4]
    assert parts.info.class_names == ("cat", "bee", "ant") and parts.info.channels == 1
    assert parts.private.images.shape == (4, 1, 16, 16) and parts.image_size == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cifar10", "classes": ""}, "data.name: got 'cifar10'; a node with a data-path of its own needs 'folder'"),
        ({"classes": ""}, "data.classes: not set; clients with folders of their own need the same classes"),
        ({"classes": "", "image_size": 0}, "data.classes, data.image-size: not set"),
        ({"noise": 0.1}, "data.noise, data.wrong-labels: only for a simulated private part"),
    ],
)
def test_settings_that_an_own_folder_needs(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write_folder(tmp_path, {"ant": 4})
    with pytest.raises(DataError, match=message) as caught:
        client_folder_examples(config_of(**settings), tmp_path)
    assert caught.value.public == str(caught.value)  # about the server's settings: the server may read it


def test_the_server_does_not_learn_what_is_wrong_in_a_clients_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, {"diagnosis": 4})
    with pytest.raises(DataError, match="the directory .*/diagnosis is none of the classes cat, bee, ant") as caught:
        client_folder_examples(config_of(), tmp_path)
    assert caught.value.public == "DataError"


def federate(tmp_path: Path, folders: dict[int, Path], **settings: Any) -> dict[str, Any]:
    """Run a federation of three nodes, some of which have a folder of their own; return the last row of the metrics."""
    client._prepared.cache_clear()
    write_folder(tmp_path / "server", {"ant": 30, "bee": 30, "cat": 30})
    own = {"data.name": "folder", "data.path": str(tmp_path / "server"), "data.classes": CLASSES, "data.image-size": 8}
    config = quick(tmp_path) | {"data.num-private": -1, "num-clients": 3, "num-server-rounds": 1, "fraction-train": 1.0}
    config |= {"balancing.enabled": False} | own | settings
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    with LocalGrid(client.app, num_nodes=3, run_config=config) as grid:
        for node, folder in folders.items():
            grid._contexts[node].node_config["data-path"] = str(folder)
        server.app(grid, context)
    run_dir = Path(str(context.state.config_records["run"]["directory"]))
    row: dict[str, Any] = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    return row


def test_clients_train_on_their_own_folders(tmp_path: Path) -> None:
    """4, 5 and 6 images on the three devices; the server's own private part is left alone."""
    folders = {node: write_folder(tmp_path / f"device{node}", {"ant": 2, "cat": node + 1}) for node in (1, 2, 3)}
    assert federate(tmp_path, folders)["num_real"] == 4 + 5 + 6


def test_one_folder_is_not_several_clients(tmp_path: Path) -> None:
    folders = {node: write_folder(tmp_path / f"device{node}", {"ant": 2}) for node in (1, 2, 3)}
    with pytest.raises(RunFailed, match=r"data-path: this node hosts several clients \(4 on 3 nodes\), and has one folder"):
        federate(tmp_path, folders, **{"num-clients": 4})


def test_the_servers_generator_fills_what_a_device_lacks(tmp_path: Path) -> None:
    """Devices without a class get images of it from a generator trained on the server's public part, which is not there to compare."""
    server_folder = write_folder(tmp_path / "server", {"ant": 30, "bee": 30, "cat": 30})
    parts = load_parts(config_of(path=str(server_folder)))
    train_generator(parts, recipe=TINY, out=tmp_path / "generator")
    folders = {node: write_folder(tmp_path / f"device{node}", {"ant": 4, "cat": 2}) for node in (1, 2, 3)}
    settings = {"balancing.enabled": True, "generator.name": "diffusion", "generator.path": str(tmp_path / "generator")}
    row = federate(tmp_path, folders, **settings, **{"generator.steps": 1})
    assert row["num_examples"] == 3 * 6 and row["left_out"] == {}
    made = [path for path in (tmp_path / "state" / "cache").rglob("*") if path.is_file()]
    assert len(made) == 3 * 2  # 4, 0 and 2 images become 2 of each class
