"""The ServerApp: train a generator together if one is needed, prepare the clients, then rounds of FedAvg, with every client that fails named.

The loop is ours and not a `flwr` Strategy's, because it has phases before round 1, goes on from a checkpoint, chooses clients by number
and sums replies in a fixed order; the messages and the nodes are Flower's.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fbl_flower.config import FEDERATED, RunConfig, parse_config, rounded_up
from fbl_flower.data.datasets import DataParts, load_parts, scored_part
from fbl_flower.errors import FBLError, RunFailed
from fbl_flower.federation.arrival import is_simulated
from fbl_flower.federation.attendance import Attendance
from fbl_flower.federation.classification import Classification
from fbl_flower.federation.exchange import ask
from fbl_flower.federation.gate import read_prepared
from fbl_flower.federation.generator_supply import GeneratorSupply
from fbl_flower.federation.generator_task import GeneratorTask
from fbl_flower.federation.global_model import server_in_words
from fbl_flower.federation.known_generators import remember, take_known
from fbl_flower.federation.method_rounds import announce, roles_of
from fbl_flower.federation.preflight import generator_needed, preflight
from fbl_flower.federation.privacy import PrivacyLedger
from fbl_flower.federation.report import write_report
from fbl_flower.federation.roster import Roster, call_roll
from fbl_flower.federation.rounds import reasons, run_rounds
from fbl_flower.federation.wire import PREPARE, Request
from fbl_flower.methods.server_step import AVERAGE
from fbl_flower.params import Arrays
from fbl_flower.reporting.rundir import Checkpoint, RunDirectory
from fbl_flower.reporting.unfinished import open_run
from fbl_flower.training.attack import attackers

app = ServerApp()
_SCORES = ("accuracy", "loss", "averaged_accuracy", "averaged_loss", "untuned_accuracy", "untuned_loss")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that `context.run_config` describes."""
    try:
        config = parse_config(context.run_config)
        settled = preflight(config, clients_here=is_simulated(grid))
        torch.set_num_threads(config.num_threads)
        run, start, claim = open_run(config, data=load_parts(config.data).identity)
    except FBLError as error:
        log(WARNING, "The run cannot start. %s", error)
        raise
    context.state["run"] = ConfigRecord({"directory": str(run.path)})
    log(INFO, "Run directory: %s", run.path)
    try:
        _Federation(grid, settled, run).run(start)
    except BaseException as error:
        reason = str(error) or type(error).__name__
        log(WARNING, "The run failed: %s", reason)
        log(WARNING, "Run directory: %s", run.path)
        with contextlib.suppress(OSError):  # a full disk, which may be why it failed
            run.write_json("summary.json", {"status": "failed", "reason": reason})
        raise
    finally:
        claim.release()


class _Federation:
    """One run on one grid."""

    def __init__(self, grid: Grid, config: RunConfig, run: RunDirectory) -> None:
        self.grid, self.config, self.run_dir = grid, config, run
        self.parts: DataParts = load_parts(config.data)
        self.summary: dict[str, Any] = {}  # what summary.json says beside the results

    def run(self, start: Checkpoint | None) -> None:
        config = self.config
        started = time.perf_counter()
        for note in self.parts.notes:
            log(WARNING, "data: %s", note)
        if self.run_dir.restart:
            log(INFO, "Round %d: %s", start.server_round + 1 if start else 0, self.run_dir.restart)
        if config.balancing.enabled and config.balancing.average_embeddings:
            log(WARNING, "balancing.average-embeddings: vectors that moved tell the server which classes a client fills")
        roster = call_roll(self.grid, num_clients=config.num_clients, timeout=config.prepare.timeout)
        roles = roles_of(config, roster)
        announce(roles, balancing=config.balancing.enabled)
        if hostile := attackers(config):
            names = ", ".join(map(str, hostile))
            log(WARNING, "attack.kind: %s is simulated by the clients %s", config.attack.kind, names)
        if extras := server_in_words(config):
            log(INFO, "Server: %s", extras)
        self.attendance = Attendance(self.grid, self.run_dir, roster)
        supply = self._generator()
        config = self.config  # with the generator's folder
        if config.num_server_rounds == 0:
            self._finish_generator_only(time.perf_counter() - started)
            return
        self._prepare(self.attendance.roster, supply)
        prepare_seconds = time.perf_counter() - started
        earlier = sum(
            row["clients_seconds"] + row.get("tuning_seconds", 0) + row["evaluate_seconds"]
            for row in self.run_dir.read_rows("timings.jsonl")
        )
        task = Classification(config, self.run_dir, self.parts, self.attendance, roles, supply=supply)
        point = start or task.first_point(started)
        task.go_on_from(point)
        point = run_rounds(task, point, grid=self.grid, config=config, attendance=self.attendance)
        tuned = task.tuned
        if tuned is None and not config.server_tuning.every:
            tuned, _ = task.tune(point)  # resumed after its last round
        self._finish(point, tuned or point.arrays, prepare_seconds, earlier + time.perf_counter() - started)

    def _generator(self) -> GeneratorSupply:
        """Have the clients train a generator together, if this run needs one of that kind and has none yet; and return who supplies it."""
        config, run = self.config, self.run_dir
        if not generator_needed(config):
            return GeneratorSupply("")
        given = config.generator.path
        if config.generator.name != FEDERATED or given:
            if config.generator.name == FEDERATED and config.privacy.noise_multiplier:
                log(
                    WARNING,
                    "generator.path: clients trained this generator in another run, whose epsilon is not part of this run's",
                )
            run.write_json("generator.json", {"name": config.generator.name, "path": given})
            return GeneratorSupply(
                config.generator.name, Path(given).expanduser() if config.generator.name == FEDERATED else None
            )
        # On nodes of their own, nobody knows whether the images are the same; with noise, each training is to be accounted for.
        known = is_simulated(self.grid) and not config.privacy.noise_multiplier
        begun = run.generator_rounds.has_checkpoint()
        if known and not run.generator.is_dir() and not begun and take_known(run, config, self.parts):
            log(INFO, "The federation's generator: an earlier run with the same settings has trained it")
        if not run.generator.is_dir():
            task = GeneratorTask(config, run, self.parts, self.attendance)
            self.attendance.title = task.title
            point = run_rounds(task, task.start(), grid=self.grid, config=config, attendance=self.attendance)
            task.finish(point)
            if known:
                remember(run, config, self.parts)
            self.attendance.title = "Round"
        run.write_json("generator.json", {"name": FEDERATED, "path": str(run.generator)})
        self.summary["generator"] = cost_of_generator(run)
        self.config = replace(config, generator=replace(config.generator, path=str(run.generator)))
        return GeneratorSupply(FEDERATED, run.generator)

    def _prepare(self, roster: Roster, supply: GeneratorSupply) -> None:
        """Ask every client to check its machine and get its data ready, and name those that could not."""
        config = self.config
        log(INFO, "Preparing %d clients: check, plan, and generate what is missing", len(roster.node_of))
        requests = {
            client: (
                node,
                Request(run=self.run_dir.identity, client=client, arrays={}, **supply.for_client(client)).to_record(),
            )
            for client, node in roster.node_of.items()
        }
        answers = ask(
            self.grid,
            requests,
            PREPARE,
            read=lambda _, content: read_prepared(content),
            timeout=config.prepare.timeout,
            progress=lambda done, total: log(INFO, "Prepared %d of %d clients", done, total),
        )
        failures = dict.fromkeys(roster.absent, "no node hosts it") | answers.failures
        supply.delivered(answers.values)
        self.attendance.prepared(answers.values, failures)
        self.attendance.log_table()
        for client, reason in sorted(failures.items()):
            log(WARNING, "Client %d is not prepared: %s", client, reason)
        if not answers.values:
            raise RunFailed("no client could be prepared: " + reasons(failures))
        if len(answers.values) < (wanted := rounded_up(config.prepare.quorum, config.num_clients)):
            raise RunFailed(
                f"{len(answers.values)} of {config.num_clients} clients are prepared; prepare.quorum = {config.prepare.quorum:g} asks for "
                f"{wanted}: {reasons(failures)}"
            )

    def _finish_generator_only(self, seconds: float) -> None:
        """End a run that was for the generator alone."""
        left_out = left_out_of(self.run_dir.generator_rounds)
        summary = {"status": "completed", "rounds": 0, "left_out": left_out, "seconds": seconds} | self.summary | self._spent()
        self.run_dir.write_json("summary.json", summary)
        log(INFO, "The generator's folder: %s", self.run_dir.generator)

    def _finish(self, point: Checkpoint, model: Arrays, prepare_seconds: float, seconds: float) -> None:
        self.run_dir.write_model(model)
        if AVERAGE in point.method_state:
            self.run_dir.write_model(point.method_state[AVERAGE], "averaged.safetensors")
        rows = self.run_dir.read_rows("metrics.jsonl")
        left_out = left_out_of(self.run_dir)
        self.run_dir.write_json(
            "summary.json",
            {
                "status": "completed",
                "rounds": point.server_round,
                "evaluated_on": self.config.data.evaluate_on,
                **{f"final_{name}": rows[-1][name] for name in _SCORES if name in rows[-1]},
                "not_prepared": self.attendance.not_prepared,
                "left_out": left_out,
                "seconds_to_prepare": prepare_seconds,
                "seconds": seconds,
                **self.summary,
                **self._spent(),
            },
        )
        try:
            if self.config.pictures:
                write_report(self.run_dir, self.config, model, simulated=is_simulated(self.grid))
        except Exception as error:  # the run itself is whole
            log(WARNING, "Not every picture could be drawn: %s", error)
        scored = len(scored_part(self.config.data, self.parts))
        log(INFO, "Final accuracy on %d %s images: %.2f %%", scored, self.config.data.evaluate_on, 100 * rows[-1]["accuracy"])
        if left_out or self.attendance.not_prepared:
            log(WARNING, "Clients failed in this run; summary.json names them")
        log(INFO, "Run directory: %s", self.run_dir.path)

    def _spent(self) -> dict[str, float]:
        """Return epsilon and delta of the whole run, as summary.json has them; without noise, nothing."""
        spent = PrivacyLedger(self.config, self.run_dir).spent()
        return spent | {"delta": self.config.privacy.delta} if spent else {}


def left_out_of(run: RunDirectory) -> dict[str, dict[str, str]]:
    """Return by round which clients were left out, and why."""
    return {str(row["round"]): row["left_out"] for row in run.read_rows("metrics.jsonl") if row.get("left_out")}


def cost_of_generator(run: RunDirectory) -> dict[str, Any]:
    """Return what training the run's federated generator cost, as summary.json has it."""
    rows, times = (run.generator_rounds.read_rows(name) for name in ("metrics.jsonl", "timings.jsonl"))
    return {
        "name": FEDERATED,
        "rounds": len(rows),
        "final_train_loss": rows[-1]["train_loss"],
        "bytes_to_clients": sum(row["bytes_to_clients"] for row in rows),
        "bytes_from_clients": sum(row["bytes_from_clients"] for row in rows),
        "seconds": sum(row["clients_seconds"] for row in times),
        "left_out": left_out_of(run.generator_rounds),
    }
