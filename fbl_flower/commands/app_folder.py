"""Where the Flower app is: the checkout, or a copy made from the installed package."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import fbl_flower
from fbl_flower.errors import ConfigError

_PACKAGE = Path(fbl_flower.__file__).parent
_CARRIED = (
    "_app"  # in a wheel: pyproject.toml, server_app.py, client_app.py and what else stands beside the package in a checkout
)


@contextlib.contextmanager
def app_folder(given: Path | None = None) -> Iterator[Path]:
    """Give the directory for `flwr run`: the given one, the checkout, or a temporary copy of the installed package.

    Raises:
        ConfigError: The given directory is no Flower app, or the installed package lacks its app files.
    """
    if given is not None:
        if not (given / "pyproject.toml").is_file():
            raise ConfigError([f"--app: {given} holds no pyproject.toml; wanted the directory of a Flower app"])
        yield given.resolve()
    elif (checkout := checkout_root()) is not None:
        yield checkout
    else:
        with tempfile.TemporaryDirectory(prefix="fbl-app-") as temporary:
            yield assemble_app(Path(temporary, "fbl-flower"))


def checkout_root(package: Path = _PACKAGE) -> Path | None:
    """Return the checkout that the package stands in; None if it is installed."""
    file = package.parent / "pyproject.toml"
    if not file.is_file():
        return None
    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    return package.parent if project.get("name") == "fbl-flower" else None


def assemble_app(folder: Path, package: Path = _PACKAGE) -> Path:
    """Lay out a Flower app in `folder` from an installed package, and return it."""
    carried = package / _CARRIED
    if not (carried / "pyproject.toml").is_file():
        raise ConfigError(
            [f"the installed package has no {carried}/pyproject.toml; install it again, or name a checkout with --app"]
        )
    shutil.copytree(carried, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in package.rglob("*.py"):
        inside = file.relative_to(package)
        if inside.parts[0] != _CARRIED:
            target = folder / package.name / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return folder
