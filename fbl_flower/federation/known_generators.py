"""Federated generators of earlier simulations: a run with the same images, settings and seed takes what was trained already."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch

from fbl_flower.config import RunConfig, flatten
from fbl_flower.data.datasets import DataParts
from fbl_flower.generation.new_folder import new_folder
from fbl_flower.reporting.rundir import RunDirectory

_DECISIVE = (
    "seed", "num-clients", "num-threads", "device", "data.", "federated-generator.", "aggregation.", "attack.", "privacy.",
    "transport.precision",
)  # fmt: skip
_ELSEWHERE = ("data.path", "data.evaluate-on")  # where the images lie, and what scores the classifier


def take_known(run: RunDirectory, config: RunConfig, parts: DataParts) -> bool:
    """Copy a generator of an earlier run, and what its rounds left, into the run's directory; return False if there is none."""
    known = _folder(config, parts)
    if not known.is_dir():
        return False
    shutil.copytree(known / "rounds", run.generator_rounds.path, dirs_exist_ok=True)
    with new_folder(run.generator) as folder:
        shutil.copytree(known / "generator", folder, dirs_exist_ok=True)
    return True


def remember(run: RunDirectory, config: RunConfig, parts: DataParts) -> None:
    """Keep the run's generator for later runs."""
    known = _folder(config, parts)
    if known.is_dir():
        return
    with new_folder(known) as folder:
        shutil.copytree(run.generator, folder / "generator")
        rounds = folder / "rounds"
        shutil.copytree(run.generator_rounds.path, rounds, ignore=shutil.ignore_patterns("checkpoint.*"))


def _folder(config: RunConfig, parts: DataParts) -> Path:
    settings = {key: value for key, value in flatten(config).items() if key.startswith(_DECISIVE) and key not in _ELSEWHERE}
    key = [settings, parts.identity, config.train.precision, torch.__version__]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(config.state_dir).expanduser() / "generators" / digest[:32]
