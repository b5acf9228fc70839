"""One parquet file: its labels and splits, and its images a few at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fbl_flower.data.readers.names import class_name, shown
from fbl_flower.errors import DataError

IMAGE, LABEL = ("image", "img"), ("label", "fine_label", "labels")
_ROWS = 64  # read at once: a row group's images together may be too many for one Arrow array, which ends at 2 GiB, or for the memory
_GET_AGAIN = "Download it again"


class ParquetImages:
    """A file whose columns have been checked. Its images are read when they are decoded.

    Attributes:
        file: Its path.
        num_rows: Its images.
        labels: int64 [N], or names in form NFC.
        labels_are_text: Which of these.
        class_names: Those of the Hugging Face metadata; None without.
        split_values: What the column split says of each row; None without that column.
    """

    def __init__(self, file: Path, *, needs_split: bool) -> None:
        import pyarrow

        self.file = file
        with _opened(file) as parquet:
            schema = parquet.schema_arrow
            features = _hugging_face_features(schema.metadata)
            self._image = _column(schema.names, IMAGE, "Image", features)
            label = _column(schema.names, LABEL, "ClassLabel", features)
            wanted = [self._image, label, *(["split"] if needs_split or "split" in schema.names else [])]
            if missing := [name for name in wanted if name not in schema.names]:
                raise DataError(
                    f"data.path: {shown(file)} has the columns {', '.join(schema.names)}, and none called {' or '.join(missing)}; "
                    "rename yours: image, label and, if one file has several parts, split"
                )
            _check_images(file, schema.field(self._image))
            table = parquet.read(columns=wanted[1:])
        labels = table[label]
        if pyarrow.types.is_dictionary(labels.type):  # as pandas writes categories
            labels = labels.cast(labels.type.value_type)
        self.num_rows, kind = len(labels), labels.type
        self.labels_are_text = str(kind) in ("string", "large_string", "string_view")
        if not (self.labels_are_text or pyarrow.types.is_integer(kind)) or labels.null_count:
            got = f"{kind} with {labels.null_count} empty rows"
            raise DataError(
                f"data.path: {shown(file)}, column {label}: got {got}; wanted a whole number or a name in every row"
            )
        values = labels.to_pylist()
        try:
            self.labels = (
                np.array([class_name(v) for v in values], dtype=object) if self.labels_are_text else np.array(values, np.int64)
            )
        except OverflowError as error:
            raise DataError(f"data.path: {shown(file)}, column {label}: has a number above 2^63, which is no class") from error
        names = features.get(label, {}).get("names")
        self.class_names = tuple(class_name(str(name)) for name in names) if isinstance(names, list) and names else None
        self.split_values: list[Any] | None = table["split"].to_pylist() if "split" in wanted else None

    def blobs(self) -> Iterator[bytes | None]:
        """Yield each row's encoded image; None where there is none.

        Raises:
            DataError: The file is damaged, or holds paths.
        """
        import pyarrow

        with _opened(self.file) as parquet:
            for batch in parquet.iter_batches(batch_size=_ROWS, columns=[self._image]):
                column = batch.column(0)
                if pyarrow.types.is_struct(column.type):
                    fields = dict(zip([field.name for field in column.type], column.flatten(), strict=True))
                    column, paths = fields["bytes"], fields.get("path")
                    if len(column) and column.null_count == len(column) and paths is not None and paths.null_count < len(paths):
                        raise _paths_only(self.file, self._image)
                for value in column:
                    yield value.as_py()


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a parquet file; what fails inside is told by its cause."""
    import pyarrow
    import pyarrow.parquet

    try:
        with file.open("rb") as stream:
            _check_ends(file, stream)
            yield pyarrow.parquet.ParquetFile(stream)
    except pyarrow.ArrowNotImplementedError as error:
        raise DataError(f"data.path: {shown(file)} needs what this pyarrow cannot do ({error}). Write it otherwise") from error
    except (pyarrow.ArrowException, KeyError) as error:
        raise DataError(f"data.path: {shown(file)} is damaged ({error}). {_GET_AGAIN}") from error
    except OSError as error:
        if error.errno:
            raise DataError(f"data.path: {shown(file)} cannot be read ({error.strerror}); check its permissions") from error
        raise DataError(f"data.path: {shown(file)} is damaged ({error}). {_GET_AGAIN}") from error


def _check_ends(file: Path, stream: Any) -> None:
    """A parquet file begins and ends with the same four letters."""
    start = stream.read(16)
    size = stream.seek(0, 2)
    if size >= 4:
        stream.seek(-4, 2)
    end = stream.read(4)
    stream.seek(0)
    if not start:
        raise DataError(f"data.path: {shown(file)} is empty (0 bytes). {_GET_AGAIN}")
    if start.startswith(b"version https://"):
        raise DataError(f"data.path: {shown(file)} is a pointer of Git LFS, not the file itself. Fetch it with `git lfs pull`")
    if start[:4] == b"PARE":
        raise DataError(f"data.path: {shown(file)} is encrypted. Write it without encryption")
    if start[:4] != b"PAR1":
        raise DataError(f"data.path: {shown(file)} is not a parquet file: it begins with {start!r}. Check its name")
    if end != b"PAR1" or size < 12:
        raise DataError(f"data.path: {shown(file)} is cut off: the end of the parquet file is missing. {_GET_AGAIN}")


def _check_images(file: Path, column: Any) -> None:
    """Raise an error unless the column holds encoded images."""
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        if "path" in fields and ("bytes" not in fields or types.is_null(fields["bytes"])):
            raise _paths_only(file, column.name)
        if "bytes" not in fields or not _is_bytes(fields["bytes"]):
            raise DataError(
                f"data.path: {shown(file)}, column {column.name}: got a struct of {', '.join(fields) or 'nothing'}; expected one with the "
                "field bytes, an encoded image"
            )
    elif types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view":
        raise _paths_only(file, column.name)
    elif not _is_bytes(kind):
        raise DataError(
            f"data.path: {shown(file)}, column {column.name}: got {kind}; expected encoded images (PNG, JPEG, ...) as bytes, or a struct with bytes"
        )


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return bool(
        types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind) or str(kind) == "binary_view"
    )


def _paths_only(file: Path, column: str) -> DataError:
    return DataError(
        f"data.path: {shown(file)}, column {column}: holds paths, not images. Write the files' contents into the "
        "column, as bytes; or give the folder of images with data.name = 'folder'"
    )


def _hugging_face_features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """Return what the metadata that the library `datasets` writes says of each column; nothing where there is none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {str(name): feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _column(there: list[str], known: tuple[str, ...], kind: str, features: dict[str, dict[str, Any]]) -> str:
    """Return the column with one of the `known` names, else the only one of its kind, else the first known name."""
    of_kind = [name for name, feature in features.items() if feature.get("_type") == kind and name in there]
    named = [name for name in known if name in there]
    return named[0] if named else of_kind[0] if len(of_kind) == 1 else known[0]
