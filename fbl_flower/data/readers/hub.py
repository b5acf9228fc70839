"""Data sets of the Hugging Face hub: their parquet files, fetched once into `~/.fbl/data/hub`."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path, PurePosixPath

from fbl_flower.data.readers.parquet import configurations
from fbl_flower.errors import DataError

PREFIX = "hf://"
_URL = re.compile(
    r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>refs/convert/parquet|refs/pr/\d+|[\w.-]+))?(//?(?P<folder>[\w./-]+?))?/?"
)
_CONVERTED = "refs/convert/parquet"  # where the hub itself keeps the parquet files that it makes of other formats


def hub_path(url: str) -> Path:
    """Return the folder with the parquet files of a data set on the hub; they are downloaded if they are not on this machine.

    Those of the data set's own are taken, or else those that the hub has made of its files.

    Args:
        url: `hf://datasets/OWNER/NAME`, with `@COMMIT` behind it for one state of it, and `/FOLDER` for some of its files.

    Raises:
        DataError: It is no such name, or it is not here and cannot be downloaded, or its files have several configurations.
    """
    match = _URL.fullmatch(url)
    if match is None or {".", ".."} & set(url.split("/")):
        raise DataError(f"data.path: got {url!r}; wanted hf://datasets/OWNER/NAME, and perhaps @COMMIT and /FOLDER behind it")
    home = Path("~/.fbl/data/hub").expanduser()
    place = home / re.sub(r"/+", "--", url.removeprefix("hf://datasets/").rstrip("/"))
    if not place.is_dir():
        try:
            _download(place, name=match["name"], revision=match["revision"], folder=match["folder"] or "")
        except DataError:
            raise
        except Exception as error:  # the hub's client raises many kinds
            raise DataError(
                f"data.path: {url} cannot be downloaded to {place} ({type(error).__name__}): no such data set, no access, no room, or no network; "
                "correct the name, or download its parquet files where there is a network and give their folder"
            ) from error
    return place


def _download(place: Path, *, name: str, revision: str | None, folder: str) -> None:
    """Download beside the place and rename: a folder that is there is whole, also with several processes at once."""
    from huggingface_hub import HfApi, snapshot_download

    for state in [revision] if revision else [None, _CONVERTED]:
        files = _parquet_files(HfApi().list_repo_files(name, repo_type="dataset", revision=state), folder)
        if files:
            break
    else:
        raise DataError(f"data.path: {name} has no parquet files{f' in {folder}' if folder else ''} on the hub; choose another")
    if len(kinds := configurations(PurePosixPath(file).relative_to(folder) for file in files)) > 1:
        one = "/".join(filter(None, [PREFIX + "datasets/" + name + (f"@{revision}" if revision else ""), folder, kinds[0]]))
        raise DataError(f"data.path: {name} has several configurations: {', '.join(kinds)}; choose one, such as {one}")
    print(f"{name}: downloading {len(files)} parquet files to {place}", file=sys.stderr, flush=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-", ignore_cleanup_errors=True) as part:
        snapshot_download(name, repo_type="dataset", revision=state, allow_patterns=files, local_dir=part)
        shutil.rmtree(Path(part, ".cache"), ignore_errors=True)  # the client's own notes
        try:
            os.rename(part, place)
        except OSError:
            if not place.is_dir():  # else another process was first
                raise


def _parquet_files(files: list[str], folder: str) -> list[str]:
    """Return those of `files` that are parquet and below `folder`."""
    below = f"{folder}/" if folder else ""
    return [file for file in files if file.endswith(".parquet") and file.startswith(below)]
