"""The ServerApp: prepare the clients, then rounds of FedAvg, with every client that fails named.

The loop is ours and not a `flwr` Strategy's, because it has a phase before round 1, goes on from a checkpoint, chooses clients by number
and sums replies in a fixed order; the messages and the nodes are Flower's.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from logging import INFO, WARNING
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fbl_flower.config import RunConfig, parse_config, rounded_up
from fbl_flower.data.datasets import DataParts, load_parts, scored_part
from fbl_flower.device import pick_device
from fbl_flower.errors import FBLError, RunFailed
from fbl_flower.federation.attendance import Attendance
from fbl_flower.federation.cost import Traffic, payload_bytes
from fbl_flower.federation.exchange import ask, is_simulated
from fbl_flower.federation.global_model import next_point, server_in_words, with_average
from fbl_flower.federation.method_rounds import announce, packed_state, roles_of, update_of
from fbl_flower.federation.preflight import preflight
from fbl_flower.federation.report import write_report
from fbl_flower.federation.roster import Roster, call_roll
from fbl_flower.federation.transport import restore
from fbl_flower.federation.wire import PREPARE, TRAIN, Reply, Request, array_record
from fbl_flower.methods.server import lacks_arrays, with_clients
from fbl_flower.methods.server_step import AVERAGE
from fbl_flower.models import as_received, empty_classifier, fitted, new_classifier
from fbl_flower.params import Arrays, all_finite, to_arrays
from fbl_flower.reporting.rundir import Checkpoint, RunDirectory
from fbl_flower.reporting.unfinished import open_run
from fbl_flower.seeding import numpy_stream
from fbl_flower.training.central import warm_start_model
from fbl_flower.training.evaluation import Evaluation, evaluate
from fbl_flower.training.roles import Role
from fbl_flower.training.round import load_classifier
from fbl_flower.training.server_tuning import tune

app = ServerApp()
_DIVERGED = 1e9  # a loss that no classifier has that learns
_HOW_TO_CONVERGE = "the training has diverged. Lower train.learning-rate (or the server's)."
_SCORES = ("accuracy", "loss", "averaged_accuracy", "averaged_loss", "untuned_accuracy", "untuned_loss")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that `context.run_config` describes."""
    try:
        config = parse_config(context.run_config)
        preflight(config, clients_here=is_simulated(grid))
        torch.set_num_threads(config.num_threads)
        run, start, claim = open_run(config, data=load_parts(config.data).identity)
    except FBLError as error:
        log(WARNING, "The run cannot start. %s", error)
        raise
    context.state["run"] = ConfigRecord({"directory": str(run.path)})
    log(INFO, "Run directory: %s", run.path)
    try:
        _Federation(grid, config, run).run(start)
    except BaseException as error:
        reason = str(error) or type(error).__name__
        log(WARNING, "The run failed: %s", reason)
        log(WARNING, "Run directory: %s", run.path)
        with contextlib.suppress(OSError):  # a full disk, which may be why it failed
            run.write_json("summary.json", {"status": "failed", "reason": reason})
        raise
    finally:
        claim.release()


@dataclass(frozen=True, kw_only=True)
class _Round:
    """What the clients' part of a round came to."""

    replies: dict[int, Reply]
    failures: dict[int, str]
    traffic: Traffic
    seconds: float
    tuning_seconds: float = 0.0


class _Federation:
    """One run on one grid."""

    def __init__(self, grid: Grid, config: RunConfig, run: RunDirectory) -> None:
        self.grid, self.config, self.run_dir = grid, config, run
        self.parts: DataParts = load_parts(config.data)
        self.device = pick_device(config)
        self.last_round: dict[int, int] = {}  # the last round in which a client succeeded
        self.roles: dict[int, Role] = {}

    def run(self, start: Checkpoint | None) -> None:
        config = self.config
        started = time.perf_counter()
        for note in self.parts.notes:
            log(WARNING, "data: %s", note)
        if start is not None:
            log(INFO, "Round %d: %s", start.server_round + 1, self.run_dir.restart)
        if config.balancing.enabled and config.balancing.average_embeddings:
            log(WARNING, "balancing.average-embeddings: vectors that moved tell the server which classes a client fills")
        roster = call_roll(self.grid, num_clients=config.num_clients, timeout=config.prepare.timeout)
        self.roles = roles_of(config, roster)
        announce(self.roles, balancing=config.balancing.enabled)
        if extras := server_in_words(config):
            log(INFO, "Server: %s", extras)
        self.attendance = Attendance(self.grid, self.run_dir, roster)
        self._prepare(roster)
        prepare_seconds = time.perf_counter() - started
        earlier = sum(
            row["clients_seconds"] + row.get("tuning_seconds", 0) + row["evaluate_seconds"]
            for row in self.run_dir.read_rows("timings.jsonl")
        )
        point = start or self._first_point(started)
        self.network = as_received(config.model, point.arrays)
        checkpoint_round, tuned = point.server_round, None
        for row in self.run_dir.read_rows("metrics.jsonl"):
            self.last_round |= dict.fromkeys(row.get("clients", ()), row["round"])
        for server_round in range(point.server_round + 1, config.num_server_rounds + 1):
            self.attendance.renew(server_round, timeout=config.timeout)
            before, self.roles = self.roles, roles_of(config, self.attendance.roster)
            if {role.method for role in self.roles.values()} - {role.method for role in before.values()}:
                announce(self.roles, balancing=config.balancing.enabled)  # a node came late, with a method that nobody had
            point = self._with_method_state(point)
            result = self._train(point, server_round, checkpoint_round)
            untuned = next_point(
                point, result.replies, self.roles, config=config, server_round=server_round, parameters=self._parameters
            )
            _check_finite(untuned)
            tuned, tuning_seconds = self._tune(untuned)
            point = with_average(replace(untuned, arrays=tuned) if tuned and config.server_tuning.every else untuned, config)
            self._record(replace(result, tuning_seconds=tuning_seconds), point, tuned=tuned, untuned=untuned.arrays)
            if server_round % config.checkpoint_every == 0 or server_round == config.num_server_rounds:
                self._write_checkpoint(point)
                checkpoint_round = server_round
        if tuned is None and not config.server_tuning.every:
            tuned, _ = self._tune(point)  # resumed after its last round
        self._finish(point, tuned or point.arrays, prepare_seconds, earlier + time.perf_counter() - started)

    def _prepare(self, roster: Roster) -> None:
        """Ask every client to check its machine and get its data ready, and name those that could not."""
        config = self.config
        log(INFO, "Preparing %d clients: check, plan, and generate what is missing", len(roster.node_of))
        requests = {
            client: (node, Request(run=self.run_dir.identity, client=client, arrays={}).to_record())
            for client, node in roster.node_of.items()
        }
        answers = ask(
            self.grid,
            requests,
            PREPARE,
            timeout=config.prepare.timeout,
            progress=lambda done, total: log(INFO, "Prepared %d of %d clients", done, total),
        )
        failures = dict.fromkeys(roster.absent, "no node hosts it") | answers.failures
        self.attendance.prepared(answers.contents, failures)
        self.attendance.log_table()
        for client, reason in sorted(failures.items()):
            log(WARNING, "Client %d is not prepared: %s", client, reason)
        if not answers.contents:
            raise RunFailed("no client could be prepared: " + _reasons(failures))
        if len(answers.contents) < (wanted := rounded_up(config.prepare.quorum, config.num_clients)):
            raise RunFailed(
                f"{len(answers.contents)} of {config.num_clients} clients are prepared; prepare.quorum = {config.prepare.quorum:g} asks for "
                f"{wanted}: {_reasons(failures)}"
            )

    def _first_point(self, started: float) -> Checkpoint:
        """Make the initial model, and record how good it is as round 0; its time is all since `started`: preparation, warm start."""
        config, info = self.config, self.parts.info
        if config.warm_start.enabled:
            log(INFO, "Warm start: training the initial model on %s images", config.warm_start.images)
            model = warm_start_model(config)
        else:
            network = fitted(config.model, image_size=self.parts.image_size, device=self.device)
            model = new_classifier(network, channels=info.channels, num_classes=info.num_classes, seed=config.seed)
        embeddings = None
        if config.balancing.enabled and config.balancing.average_embeddings:
            embeddings = np.zeros((info.num_classes, model.width), dtype=np.float32)
        point = Checkpoint(server_round=0, arrays=to_arrays(model.state_dict()), embeddings=embeddings)
        point = with_average(point, config)
        traffic, seconds = Traffic(sent={}, received={}, elapsed={}), time.perf_counter() - started
        self._record(_Round(replies={}, failures={}, traffic=traffic, seconds=seconds), point)
        self._write_checkpoint(point)
        return point

    def _write_checkpoint(self, point: Checkpoint) -> None:
        self.run_dir.write_checkpoint(replace(point, data=self.parts.identity))

    def _with_method_state(self, point: Checkpoint) -> Checkpoint:
        methods = [role.method for role in self.roles.values()]
        return replace(point, method_state=with_clients(point.method_state, methods, self._parameters))

    def _parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        info = self.parts.info
        return empty_classifier(self.network, channels=info.channels, num_classes=info.num_classes).named_parameters()

    def _train(self, point: Checkpoint, server_round: int, checkpoint_round: int) -> _Round:
        started = time.perf_counter()
        attendance, node_of = self.attendance, self.attendance.roster.node_of
        chosen = choose_clients(self.config, attendance.present(), server_round, unprepared=attendance.unprepared())
        requests: dict[int, tuple[int, RecordDict]] = {}
        packed, packed_extras = array_record(point.arrays), packed_state(point.method_state)
        for client in chosen:
            request = Request(
                run=self.run_dir.identity,
                client=client,
                server_round=server_round,
                checkpoint_round=checkpoint_round,
                last_round=self.last_round.get(client, 0),
                arrays=point.arrays,
                embeddings=point.embeddings,
            )
            extra = packed_extras.get(self.roles[client].method)
            requests[client] = (node_of[client], request.to_record(packed, extra))
        answers = ask(self.grid, requests, TRAIN, timeout=self.config.timeout)
        failures = self.attendance.away() | answers.failures
        traffic = Traffic(
            sent={client: payload_bytes(requests[client][1]) for client in answers.elapsed},
            received={client: payload_bytes(content) for client, content in answers.contents.items()},
            elapsed=answers.elapsed,
        )
        replies: dict[int, Reply] = {}
        for client, content in answers.contents.items():
            reply = self._read(content, client, point)
            if isinstance(reply, str):
                failures[client] = reply
                continue
            replies[client] = reply
            if reply.forgot:
                log(
                    WARNING, "Round %d: client %d finds nothing of this run on its disk and starts afresh", server_round, client
                )
            if reply.other_generator:
                log(
                    WARNING,
                    "Round %d: client %d has synthetic images of another generator than before: from here on, the results are not "
                    "those of one unbroken run",
                    server_round,
                    client,
                )
        for client, reason in sorted(failures.items()):
            log(WARNING, "Round %d: client %d is left out: %s", server_round, client, reason)
        if not replies:
            raise RunFailed(f"round {server_round}: no client succeeded: " + _reasons(failures))
        self.attendance.prepared(replies, {})
        self.last_round |= dict.fromkeys(replies, server_round)
        seconds = time.perf_counter() - started
        return _Round(replies=replies, failures=dict(sorted(failures.items())), traffic=traffic, seconds=seconds)

    def _read(self, content: RecordDict, client: int, point: Checkpoint) -> Reply | str:
        """Return a client's answer, its model restored, or why it cannot be used."""
        try:
            reply = Reply.from_record(content)
        except (KeyError, TypeError, ValueError):
            return "its answer cannot be read"
        if {name: a.shape for name, a in reply.arrays.items()} != {name: a.shape for name, a in point.arrays.items()}:
            return "its model has other arrays than the global one"
        vectors = {} if reply.embeddings is None else {"P": reply.embeddings}
        reply = replace(reply, arrays=restore(reply.arrays, point.arrays, precision=self.config.transport.precision))
        update = update_of(reply, self.roles[client])
        numbers = math.isfinite(reply.loss) and math.isfinite(reply.seconds)
        if not (numbers and all(map(all_finite, (reply.arrays, vectors, update.extra)))):
            return "its model or its loss is not finite"
        if lacks_arrays(update, point.method_state):
            return f"it did not send the arrays of its method, {update.method}"
        return reply

    def _tune(self, point: Checkpoint) -> tuple[Arrays | None, float]:
        """Return the tuned model, or None in a round that has none, and the seconds that it took."""
        started, config = time.perf_counter(), self.config
        if not config.server_tuning.due(point.server_round, last=config.num_server_rounds):
            return None, 0.0
        return tune(point.arrays, config, self.parts, server_round=point.server_round), time.perf_counter() - started

    def _record(self, result: _Round, point: Checkpoint, *, tuned: Arrays | None = None, untuned: Arrays | None = None) -> None:
        """Evaluate on the whole test set (or validation part), and write one line of metrics and one of timings.

        `accuracy` is of the tuned model where there is one, else of the point's.
        """
        started = time.perf_counter()
        _check_finite(point)
        evaluation = self._evaluate(tuned or point.arrays)
        others = {"averaged": point.method_state.get(AVERAGE), "untuned": untuned if tuned is not None else None}
        scores = {kind: self._evaluate(arrays) for kind, arrays in others.items() if arrays is not None}
        worst = max([evaluation.loss, *(score.loss for score in scores.values())], key=lambda loss: (math.isnan(loss), loss))
        if not worst < _DIVERGED:
            found = f"{worst:.3g}" if math.isfinite(worst) else "not finite"
            raise RunFailed(f"round {point.server_round}: the loss is {found}: {_HOW_TO_CONVERGE}")
        replies = result.replies.values()
        num_examples = sum(r.num_examples for r in replies)
        row: dict[str, Any] = {"round": point.server_round, "accuracy": evaluation.accuracy, "loss": evaluation.loss}
        for kind, score in scores.items():
            row |= {f"{kind}_accuracy": score.accuracy, f"{kind}_loss": score.loss}
        line = f"Round {point.server_round}/{self.config.num_server_rounds}: accuracy {100 * evaluation.accuracy:.2f} %"
        if replies:
            row |= {
                "train_loss": sum(r.loss * r.num_examples for r in replies) / num_examples if num_examples else None,
                "num_examples": num_examples,
                "num_real": sum(r.num_real for r in replies),
                "clients": list(result.replies),
                "left_out": {str(client): reason for client, reason in result.failures.items()},
                "bytes_to_clients": sum(result.traffic.sent.values()),
                "bytes_from_clients": sum(result.traffic.received.values()),
            }
            loss = f"training loss {row['train_loss']:.3f}" if num_examples else "no client of this round has an image"
            line += f", {loss}, {len(replies)} clients, {result.seconds:.1f} s"
        self.run_dir.append("metrics.jsonl", row)
        computing = {client: reply.seconds for client, reply in result.replies.items()}
        self.run_dir.append(
            "timings.jsonl",
            {
                "round": point.server_round,
                "clients_seconds": result.seconds,
                "tuning_seconds": result.tuning_seconds,
                "evaluate_seconds": time.perf_counter() - started,
                "client_seconds": computing,
                "waiting_seconds": result.traffic.waiting(computing),
                "bytes_to_client": result.traffic.sent,
                "bytes_from_client": result.traffic.received,
            },
        )
        log(INFO, "%s", line)

    def _evaluate(self, arrays: Arrays) -> Evaluation:
        info = self.parts.info
        model = load_classifier(arrays, self.config, channels=info.channels, num_classes=info.num_classes, device=self.device)
        images = scored_part(self.config.data, self.parts).to(self.device)
        return evaluate(model, images)

    def _finish(self, point: Checkpoint, model: Arrays, prepare_seconds: float, seconds: float) -> None:
        self.run_dir.write_model(model)
        if AVERAGE in point.method_state:
            self.run_dir.write_model(point.method_state[AVERAGE], "averaged.safetensors")
        rows = self.run_dir.read_rows("metrics.jsonl")
        left_out = {str(row["round"]): row["left_out"] for row in rows if row.get("left_out")}
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


def _check_finite(point: Checkpoint) -> None:
    """Refuse a global model, or what the server keeps for a method, that is not finite; raises `RunFailed`."""
    kept = [point.arrays, *point.method_state.values(), {} if point.embeddings is None else {"P": point.embeddings}]
    if not all(map(all_finite, kept)):
        raise RunFailed(
            f"round {point.server_round}: the new global model, or what the server keeps for a method, is not finite: {_HOW_TO_CONVERGE}"
        )


def choose_clients(
    config: RunConfig, clients: list[int], server_round: int, *, unprepared: Set[int] = frozenset()
) -> list[int]:
    """Choose the clients of a round: ceil(fraction-train * all) of them, uniformly, from the run's seed alone.

    Those that are not prepared are chosen too, since what keeps them may have been mended; a draw of nobody else is made again, as long as
    somebody else is there: a run is not to end, in the same round again when it is resumed, for a client that cannot take part.
    """
    number = max(1, rounded_up(config.fraction_train, len(clients)))
    rng = numpy_stream(config.seed, "clients", server_round)
    while True:
        chosen = sorted(rng.choice(np.array(clients), size=number, replace=False).tolist())
        if not set(chosen) <= unprepared or set(clients) <= unprepared:
            return chosen


def _reasons(failures: dict[int, str]) -> str:
    return "; ".join(f"client {client}: {reason}" for client, reason in sorted(failures.items())) or "nobody answered"
