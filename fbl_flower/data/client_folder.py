"""A client with images of its own: a folder on its device, instead of a share of the federation's private part."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from fbl_flower.config import DataConfig
from fbl_flower.data.datasets import DataParts
from fbl_flower.data.examples import Examples
from fbl_flower.data.readers.folders import read_folder
from fbl_flower.data.readers.names import disk_path
from fbl_flower.data.sources import image_format, own_info
from fbl_flower.errors import DataError

_log = logging.getLogger("fbl_flower.client")  # not Flower's logger, whose lines may reach the server


def client_folder_examples(config: DataConfig, path: Path) -> Examples:
    """Read all training images in a client's folder: `path`/CLASS/IMAGE, or `path`/train/CLASS/IMAGE.

    Labels follow `data.classes`, which belongs to the federation: a folder that lacks classes never numbers them by itself.

    Args:
        config: `name` must be "folder"; `classes` and `image_size` must be given, so that all clients' images fit one model.
        path: The folder.

    Returns:
        uint8 images [N, C, S, S] with S = `data.image-size`, and their labels.

    Raises:
        DataError: A setting is missing, or the folder is not as wanted. The public text tells nothing of the folder.
    """
    if config.name != "folder":
        problem = f"data.name: got {config.name!r}; a node with a data-path of its own needs 'folder'"
        raise DataError(problem, public=problem)
    if config.noise or config.wrong_labels:
        problem = "data.noise, data.wrong-labels: only for a simulated private part, not for a node with a data-path of its own"
        raise DataError(problem, public=problem)
    missing = [
        key for key, value in (("data.classes", config.class_names), ("data.image-size", config.image_size)) if not value
    ]
    if missing:
        problem = f"{', '.join(missing)}: not set; clients with folders of their own need the same classes in the same order, and one size"
        raise DataError(problem, public=problem)
    source = read_folder(disk_path(str(path)), image_format(config))
    for note in source.notes:
        _log.info("data-path: %s", note)
    return source.train


def client_folder_parts(config: DataConfig, path: Path) -> DataParts:
    """Return a client's own images as the private part of a data set whose other parts are empty: the server has those."""
    private = client_folder_examples(config, path)
    nothing = private.take(torch.zeros(0, dtype=torch.int64))
    # Its name is not the federation's: the public part that a generator was trained on is the server's, and not here to compare.
    info = own_info("own folder", config.class_names, channels=private.images.shape[1], image_size=config.image_size)
    info = replace(info, num_private=len(private))
    return DataParts(info=info, image_size=config.image_size, test=nothing, public=nothing, validation=nothing, private=private)
