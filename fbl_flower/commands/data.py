"""`fbl-flower data plot`: what the clients would hold, without a run."""

from __future__ import annotations

import argparse

import numpy as np

from fbl_flower.commands.json_file import check_place, unwritable_file
from fbl_flower.commands.overrides import chosen_config
from fbl_flower.config import RunConfig
from fbl_flower.data.corruption import believed_labels
from fbl_flower.data.datasets import load_parts
from fbl_flower.data.partition import partition
from fbl_flower.reporting.pictures import partition_picture


def plot(options: argparse.Namespace) -> None:
    """Draw each client's class counts, and print how unequal the clients are."""
    config, _ = chosen_config(options.config)
    check_place(options.out, make_folder=True)
    parts = load_parts(config.data)
    labels, num_classes = believed_labels(config, parts).numpy(), parts.info.num_classes
    counts = np.stack([np.bincount(labels[owned], minlength=num_classes) for owned in partition(labels, config)])
    title = f"{parts.info.name}, {_described(config)}, seed {config.seed}"
    try:
        partition_picture(counts, parts.info.class_names, title, options.out)
    except OSError as error:
        raise unwritable_file(options.out, error) from error
    for note in parts.notes:
        print(note)
    sizes, classes = counts.sum(1), (counts > 0).sum(1)
    print(
        f"{options.out}: {len(counts)} clients with {sizes.min()} to {sizes.max()} images (median {np.median(sizes):g}) "
        f"of {classes.min()} to {classes.max()} classes"
    )


def _described(config: RunConfig) -> str:
    data = config.data
    match data.partition:
        case "dirichlet" | "quantity":
            text = f"{data.partition} with alpha {data.alpha:g}"
        case "classes":
            text = f"{data.classes_per_client} classes per client"
        case _:
            text = data.partition
    return text + (f", {100 * data.wrong_labels:g} % wrong labels" if data.wrong_labels else "")
