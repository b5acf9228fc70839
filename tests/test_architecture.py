"""The folder listing is the architecture: who may import whom, and what must say the same in two places."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fbl_flower.config import surface

ROOT = Path(__file__).parents[1]
# From high to low. A module imports lower levels only, and nothing on its own level but its own folder.
LEVELS: list[set[str]] = [
    {"server_app", "client_app", "cli"},
    {"commands"},
    {"federation"},
    {"training", "reporting"},
    {"methods", "balancing"},
    {"models", "generation"},
    {"data"},
    {"device"},
    {"config", "roundstore", "claim"},
    {"params", "seeding", "errors", "whole_file", "quiet", "free_memory"},
]
LEVEL_OF = {name: len(LEVELS) - i for i, level in enumerate(LEVELS) for name in level}

# Libraries that only some folders may know.
RESERVED = {
    "flwr": {"federation", "server_app", "client_app"},
    "ray": set(),
    "diffusers": {"generation"},
    "transformers": {"generation"},
    "optimum": {"generation"},
    "fbl_generators": {"generation"},
}

MODULES = sorted([*(ROOT / "fbl_flower").rglob("*.py"), ROOT / "server_app.py", ROOT / "client_app.py"])


def unit_of(path: Path) -> str:
    """Return the folder in fbl_flower, or the module, that a file belongs to."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "fbl_flower" else parts[0]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full dotted name of every import, also those inside functions; `from a import b` is a.b."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            for alias in node.names:
                yield node.lineno, ".".join([*base, *filter(None, [node.module]), alias.name])


def violations_of(path: Path) -> Iterator[str]:
    unit = unit_of(path)
    for line, name in imports_of(path):
        top, *rest = name.split(".")
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        if top in RESERVED and unit not in RESERVED[top]:
            yield f"{where}: {top} is for {sorted(RESERVED[top]) or 'nobody'} only"
        if top in ("server_app", "client_app"):
            yield f"{where}: nobody imports the entry files"
        if top != "fbl_flower" or unit == "__init__" or not rest or rest[0].startswith("__"):
            continue
        other = rest[0]
        if other == unit:
            continue
        if LEVEL_OF[other] >= LEVEL_OF[unit]:
            yield f"{where}: {unit} is not above {other}"
        if unit == "balancing" and other == "generation" and rest[1] not in ("protocol", "cache"):
            yield f"{where}: balancing knows the generator protocol and the image cache, not a generator"


def test_every_module_has_its_level() -> None:
    units = {unit_of(path) for path in MODULES} - {"__init__"}
    assert units <= LEVEL_OF.keys(), (
        f"no level for {sorted(units - LEVEL_OF.keys())}: add it to LEVELS and docs/architecture.md"
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    assert list(violations_of(path)) == []


def test_the_rules_find_what_they_forbid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of `balancing` that breaks five rules, in every form of import, and two lines that are allowed."""
    monkeypatch.setattr("test_architecture.ROOT", tmp_path)
    path = tmp_path / "fbl_flower" / "balancing" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import fbl_flower.config\n"
        "from fbl_flower.generation.protocol import ImageGenerator\n"
        "import flwr\n"
        "from diffusers.models import UNet2DModel\n"
        "from fbl_flower import training\n"
        "from ..methods.base import LocalMethod\n"
        "def f():\n    from fbl_flower.generation.diffusion import DiffusionGenerator\n"
    )
    lines = [int(violation.split(":")[1].split()[0]) for violation in violations_of(path)]
    assert lines == [3, 4, 5, 6, 8]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("name", ["server_app", "client_app"])
def test_entry_files_hold_an_app_and_nothing_else(name: str) -> None:
    """A docstring, one import of `app`, and `__all__`."""
    statements = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")).body
    kinds = [type(statement) for statement in statements]
    assert kinds in ([ast.Expr, ast.ImportFrom, ast.Assign], [ast.ImportFrom, ast.Assign])
    assert ast.unparse(statements[-1]) == "__all__ = ['app']"
    imported = statements[-2]
    assert isinstance(imported, ast.ImportFrom)
    assert [(alias.name, alias.asname) for alias in imported.names] == [("app", None)]
    assert imported.module is not None and imported.module.startswith("fbl_flower.federation.")


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def test_pyproject_holds_every_setting_with_its_default() -> None:
    """Same keys in the same order, same values of the same types (1 is not 1.0, true is not 1)."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        found = flat(tomllib.load(file)["tool"]["flwr"]["app"]["config"])
    wanted = {setting.key: setting.default for setting in surface()}
    assert {key: (type(value), value) for key, value in found.items()} == {
        key: (type(value), value) for key, value in wanted.items()
    }
    assert list(found) == list(wanted)


def test_the_page_of_settings_is_the_generated_one() -> None:
    from fbl_flower.cli import configuration_table

    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page.strip() == configuration_table().strip(), "run: fbl-flower config > docs/configuration.md"
    assert all(f"| `{setting.key}` |" in page for setting in surface())


def test_versions_agree() -> None:
    import fbl_flower

    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert getattr(fbl_flower, "__version__", project["version"]) == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
