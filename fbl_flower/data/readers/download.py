"""Data sets without a path: where a package of the system has them, else torchvision's download into `~/.fbl/data`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from fbl_flower.errors import DataError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_CLASS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "eurosat": "EuroSAT", "fashion-mnist": "FashionMNIST"}
_OTHER_WAY = {
    "cifar10": "give the folder cifar-10-batches-py or parquet files",
    "cifar100": "give the folder cifar-100-python or parquet files",
    "eurosat": "give the folder with the ten class directories",
    "fashion-mnist": "install Debian's package dataset-fashion-mnist, or give the folder of its four IDX files",
}


def default_path(name: str) -> Path:
    """Return the folder of a data set that was given without a path; it is downloaded if it is not on this machine.

    Raises:
        DataError: It is not here and cannot be downloaded.
    """
    if name == "fashion-mnist" and DEBIAN_FASHION_MNIST.is_dir():
        return DEBIAN_FASHION_MNIST
    home = Path("~/.fbl/data").expanduser()
    if not (home / name).is_dir():
        _download(name, home)
    return home / name


def _download(name: str, home: Path) -> None:
    """Download beside the place and rename: a folder that is there is whole, also with several processes at once."""
    print(f"{name}: downloading to {home / name}", file=sys.stderr, flush=True)
    try:
        from torchvision import datasets

        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=f".{name}-", ignore_cleanup_errors=True) as folder:
            getattr(datasets, _CLASS[name])(folder, download=True)
            for pattern in ("*.tar.gz", "*/*.zip"):
                for packed in Path(folder).glob(pattern):
                    packed.unlink()
            try:
                os.rename(folder, home / name)
            except OSError:
                if not (home / name).is_dir():  # else another process was first
                    raise
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data.path: empty, and {name} cannot be downloaded to {home / name} ({reason}); connect this machine once, or {_OTHER_WAY[name]}"
        ) from error
