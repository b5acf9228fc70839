"""Numbers that no other change may touch: a few rounds of every method, to the last bit.

The files in tests/golden hold the metrics and the final model's digest of each run. Rounding depends on the machine, so they are compared on one like
that which made them, and skipped with the difference elsewhere. A change that is meant to change numbers writes them again, and says so:

    FBL_WRITE_GOLDEN=1 python -m pytest -m slow tests/test_golden.py
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fbl_flower.federation.local import run_local

FOLDER = Path(__file__).parent / "golden"
NAMES = ("round", "accuracy", "loss", "train_loss", "num_examples", "clients", "untuned_accuracy", "averaged_accuracy")
OFF = {"balancing.enabled": False}
ONE_CYCLE = {"train.schedule": "one-cycle", "train.nesterov": True, "train.weight-decay": 5e-4}
RUNS: dict[str, dict[str, Any]] = {
    "fbl": {},
    "fbl-swap": {"balancing.replay": "swap", "balancing.replay-period": 1, "balancing.replay-ratio": 0.3},
    "fbl-random": {"balancing.sampling": "random", "balancing.alignment": False},
    "fbl-weight": {"balancing.alignment": False, "balancing.synthetic-weight": 0.5},
    "fbl-one-cycle": ONE_CYCLE,
    "fbl-fp16": {"transport.precision": "fp16"},
    "fbl-scaffold": {"method.name": "scaffold"},
    "fbl-head": {"server-tuning.part": "head", "server-tuning.num-images": 40},
    "fbl-warm": {"warm-start.enabled": True, "warm-start.num-images": 40, "warm-start.epochs": 2},
    "fbl-public-images": {"generator.name": "public-images"},
    "oversampling": {"generator.name": "own-images"},
    "mixed": {
        "clients.methods": "fedprox=0.25, moon=0.25, scaffold=0.25", "clients.rich-share": 0.25,
        "clients.no-generator-share": 0.25,
    },
    "fedavg": OFF,
    "fedavg-iid": OFF | {"data.partition": "iid"},
    "fedavg-wrong-labels": OFF | {"data.wrong-labels": 0.2, "data.noise": 0.1},
    "fedprox": OFF | {"method.name": "fedprox"},
    "moon": OFF | {"method.name": "moon"},
    "scaffold": OFF | {"method.name": "scaffold"},
    "fedgen": OFF | {"method.name": "fedgen"},
    "logit-adjustment": OFF | {"method.name": "logit-adjustment"},
    "fedlc": OFF | {"method.name": "fedlc"},
    "feddyn": OFF | {"method.name": "feddyn"},
    "server-momentum": OFF | {"server.optimizer": "momentum", "server.average": 0.5},
    "server-adam": OFF | {"server.optimizer": "adam", "server.learning-rate": 0.01},
    "server-model": OFF | {"server-tuning.part": "model", "server-tuning.every": 1, "server-tuning.num-images": 40},
}  # fmt: skip
SETS: dict[str, dict[str, Any]] = {
    "digits": {"data.name": "digits", "data.num-private": 300, "model.name": "tiny"},
    "mnist5k": {"data.name": "mnist5k", "data.num-private": 200, "data.evaluate-on": "validation"},
}


def machine() -> dict[str, str]:
    """What decides how sums round."""
    return {"torch": torch.__version__.split("+")[0], "instructions": torch.backends.cpu.get_cpu_capability()}


def metrics_of(settings: dict[str, Any]) -> dict[str, Any]:
    run = run_local(settings).run_dir
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "rows": [{name: row[name] for name in NAMES if name in row} for row in rows],
        "model": hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("data", SETS)
def test_numbers_are_those_of_the_golden_files(data: str, tmp_path: Path) -> None:
    common = SETS[data] | {
        "num-clients": 4, "num-server-rounds": 2, "train.epochs": 1, "train.precision": "fp32", "device": "cpu",
        "num-threads": 1, "pictures": False, "generator.steps": 4, "generator.guidance": 2.0,
        "output-dir": str(tmp_path / "runs"), "state-dir": str(tmp_path / "state"),
    }  # fmt: skip
    file = FOLDER / f"{data}.json"
    write = bool(os.environ.get("FBL_WRITE_GOLDEN"))
    golden = {} if write else json.loads(file.read_text(encoding="utf-8"))
    if not write and golden["machine"] != machine():
        pytest.skip(f"{file.name} was made with {golden['machine']}; here {machine()}")
    found = {name: metrics_of(common | settings) for name, settings in RUNS.items()}
    if write:
        runs = ",\n".join(f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in found.items())
        file.write_text(f'{{"machine": {json.dumps(machine())}, "runs": {{\n{runs}\n}}}}\n', encoding="utf-8")
    else:
        assert found.keys() == golden["runs"].keys()
        changed = {
            name: (run["rows"][-1], found[name]["rows"][-1]) for name, run in golden["runs"].items() if run != found[name]
        }
        assert not changed
