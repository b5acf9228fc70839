"""Which run to go on with, and that no two servers work on one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fbl_flower.claim import Claim
from fbl_flower.config import RunConfig, flatten
from fbl_flower.errors import StateError
from fbl_flower.reporting.rundir import Checkpoint, RunDirectory, changed_settings

AUTO = "auto"
_PATIENCE = 60.0  # seconds that the server process of a killed SuperLink may take to end


def open_run(
    config: RunConfig, *, data: Mapping[str, str], patience: float = _PATIENCE
) -> tuple[RunDirectory, Checkpoint | None, Claim]:
    """Make a run directory, or open the one that `resume` asks for together with its checkpoint.

    Args:
        config: Its `resume` is empty, a run directory, or "auto".
        data: What the server reads, as `DataParts.identity`: a run is resumed with the same only.
        patience: Seconds to wait for a server that is about to end.

    Raises:
        ConfigError, StateError: As `RunDirectory` and `Claim`.
    """
    found = _newest_unfinished(config) if config.resume == AUTO else None
    if found is not None:
        config = replace(config, resume=str(found))
    if config.resume in ("", AUTO):
        run = RunDirectory.create(config)
        return run, None, Claim(run.path, patience=patience)
    folder = Path(config.resume).expanduser()
    if not folder.is_dir():
        raise StateError(f"resume: {folder} is not the directory of a run (no such folder)")
    try:
        claim = Claim(folder, patience=patience)
    except StateError as error:
        raise StateError(f"resume: {error}; or start a run of its own (resume empty)") from error
    try:
        return *RunDirectory.reopen(config, data=data), claim
    except BaseException:
        claim.release()
        raise


def _newest_unfinished(config: RunConfig) -> Path | None:
    """Return the newest run below `output-dir` that has a checkpoint, these settings, and no final result."""
    wanted = flatten(config)
    folders = {path.parent for path in Path(config.output_dir).expanduser().resolve().glob("*/config.toml")}
    for folder in sorted(folders, reverse=True):  # names begin with the time of the start
        run = RunDirectory(folder)
        if not (run.has_checkpoint() or run.generator_rounds.has_checkpoint()):
            continue
        try:
            settings = run.read_settings()
            summary = folder / "summary.json"
            ended = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {"status": "not ended"}
            completed = ended["status"] == "completed" and ended["rounds"] == settings["num-server-rounds"]
        except (OSError, ValueError, KeyError):
            continue  # no run of ours
        as_long = settings.get("num-server-rounds") == config.num_server_rounds
        if not completed and as_long and not changed_settings(settings, wanted) and run.knows_its_data():
            return folder
    return None
