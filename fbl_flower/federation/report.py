"""The pictures of a finished run. Those that show clients' data are for simulation, where it is all in one place anyway."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from fbl_flower.balancing.state import BalancingState, StateStore
from fbl_flower.config import OWN_IMAGES, RunConfig
from fbl_flower.data.corruption import private_examples
from fbl_flower.data.datasets import DataParts, load_parts
from fbl_flower.data.examples import Examples, concatenate
from fbl_flower.device import pick_device
from fbl_flower.errors import StateError
from fbl_flower.federation.client import state_folder
from fbl_flower.params import Arrays
from fbl_flower.reporting.alignment_picture import alignment_picture
from fbl_flower.reporting.pictures import accuracy_curve, class_counts, gallery
from fbl_flower.reporting.rundir import RunDirectory
from fbl_flower.training.evaluation import predict
from fbl_flower.training.filtering import filtered
from fbl_flower.training.prepare import ClientData, prepare_client
from fbl_flower.training.round import load_classifier

_MOST_IMAGES = 500  # real, and as many synthetic ones, behind the alignment picture


def write_report(run: RunDirectory, config: RunConfig, arrays: Arrays, *, simulated: bool) -> None:
    """Draw the accuracy curve and, in simulation, what balancing did to the clients' data.

    Args:
        run: The finished run.
        config: Its configuration.
        arrays: The final model.
        simulated: Whether the clients are simulated. In a deployment the server has no business with their data, even where one
            of their folders happens to be on its machine.
    """
    accuracy_curve(run.read_rows("metrics.jsonl"), run.path / "accuracy.png", part=config.data.evaluate_on)
    state_dir = Path(config.state_dir).expanduser()
    if not simulated or not state_folder(state_dir, run.identity, 0).parent.is_dir():
        return
    folders = [state_folder(state_dir, run.identity, k) for k in range(config.num_clients)]
    if config.balancing.enabled:
        took_part = {row["round"]: set(row.get("clients", ())) for row in run.read_rows("metrics.jsonl")}
        run.write_json("choices.json", choices_by_round(folders, took_part))
    parts = load_parts(config.data)
    names = parts.info.class_names
    clients = [
        prepare_client(config, k, cache_folder=state_dir / "cache", may_generate=False) for k in range(config.num_clients)
    ]
    states = [_newest_state(folder) for folder in folders]
    clients = [filtered(c, None if s is None else s.kept_fill, seed=config.seed) for c, s in zip(clients, states, strict=True)]
    filled = np.stack([c.fill.counts(len(names)).numpy() for c in clients])
    before = np.stack([c.real.counts(len(names)).numpy() for c in clients])
    kept = np.stack([c.plan.keep if c.plan else b for c, b in zip(clients, before, strict=True)])
    synthetic = concatenate(*(c.fill for c in clients))
    kind = "repeated" if config.generator.name == OWN_IMAGES else "synthetic"
    class_counts(before, kept, filled, names, run.path / "class_counts.png", kind=kind)
    if not synthetic.synthetic.any():  # none, or repeats of own images
        return
    everyone = private_examples(config, parts, torch.arange(len(parts.private)))
    gallery(everyone, synthetic, names, run.path / "gallery.png")
    if config.balancing.alignment:
        _write_alignment(run, config, parts, arrays, clients, states)


def choices_by_round(folders: list[Path], took_part: Mapping[int, set[int]]) -> list[dict[str, int]]:
    """Sum what the clients noted of their choices of real images, for each round in which one was made after a client's first.

    Of the images kept in classes that were cut down: how many the choice before had kept too, and how many the replay brought back.

    Args:
        folders: The clients' own, by number.
        took_part: By round, the clients whose replies counted: a reply that was lost has left a line too. Of several lines of a round the
            last counts.
    """
    rows: dict[int, dict[str, int]] = {}
    for client, folder in enumerate(folders):
        file = folder / "choices.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        for row in {row["round"]: row for row in map(json.loads, lines)}.values():
            if row["kept_again"] is not None and client in took_part.get(row["round"], ()):
                total = rows.setdefault(row["round"], {"clients": 0, "kept": 0, "kept_again": 0, "replayed": 0})
                total["clients"] += 1
                for name in ("kept", "kept_again", "replayed"):
                    total[name] += row[name]
    return [{"round": server_round} | rows[server_round] for server_round in sorted(rows)]


def _newest_state(folder: Path) -> BalancingState | None:
    """Return what a client last knew; a damaged state was reported when the client failed over it."""
    try:
        return StateStore(folder).newest()
    except StateError:
        return None


def _write_alignment(
    run: RunDirectory,
    config: RunConfig,
    parts: DataParts,
    arrays: Arrays,
    clients: list[ClientData],
    states: list[BalancingState | None],
) -> None:
    """Compare features of real and synthetic images under the final global model; each synthetic image has its own client's P."""
    info, device = parts.info, pick_device(config)
    model = load_classifier(arrays, config, channels=info.channels, num_classes=info.num_classes, device=device)
    pairs = [(c.fill, s) for c, s in zip(clients, states, strict=True) if s is not None and len(c.fill)]
    if not pairs:
        return
    synthetic = concatenate(*(examples for examples, _ in pairs))
    offsets = torch.cat([s.embeddings[examples.labels] for examples, s in pairs])
    chosen = torch.linspace(0, len(synthetic) - 1, min(len(synthetic), _MOST_IMAGES)).long()
    synthetic, offsets = synthetic.take(chosen), offsets[chosen]
    real = private_examples(config, parts, torch.arange(min(len(parts.private), _MOST_IMAGES)))

    def features(examples: Examples) -> np.ndarray:
        return predict(model, examples.images.to(device))[0].cpu().numpy()

    rows = alignment_picture(
        features(real), real.labels.numpy(), features(synthetic), synthetic.labels.numpy(), offsets.numpy(),
        info.class_names, run.path / "alignment.png",
    )  # fmt: skip
    run.write_json(
        "alignment.json",
        {
            "classes": [asdict(row) for row in rows],
            "clients": [
                {"client": c.client} | s.alignment_row() for c, s in zip(clients, states, strict=True) if s is not None
            ],
        },
    )
