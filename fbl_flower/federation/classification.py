"""What the federation is for: training the classifier together, round by round."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from logging import INFO, WARNING
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict
from flwr.common.logger import log

from fbl_flower.config import NOT_PRIVATE, NOT_ROBUST, RunConfig
from fbl_flower.data.datasets import DataParts, scored_part
from fbl_flower.device import pick_device
from fbl_flower.errors import RunFailed
from fbl_flower.federation.attendance import Attendance
from fbl_flower.federation.cost import Traffic
from fbl_flower.federation.gate import Expected
from fbl_flower.federation.generator_supply import GeneratorSupply
from fbl_flower.federation.global_model import next_point, with_average
from fbl_flower.federation.method_rounds import announce, packed_state, roles_of
from fbl_flower.federation.privacy import PrivacyLedger
from fbl_flower.federation.rounds import Round, choose_clients
from fbl_flower.federation.usable import is_finite, loss_problem, spoilers
from fbl_flower.federation.wire import TRAIN, Reply, Request, array_record
from fbl_flower.methods.server import arrays_to_send, with_clients
from fbl_flower.methods.server_step import AVERAGE
from fbl_flower.models import as_received, empty_classifier, fitted, new_classifier
from fbl_flower.params import Arrays, to_arrays
from fbl_flower.reporting.rundir import Checkpoint, RunDirectory
from fbl_flower.training.central import warm_start_model
from fbl_flower.training.evaluation import Evaluation, evaluate
from fbl_flower.training.roles import Role
from fbl_flower.training.round import load_classifier
from fbl_flower.training.server_tuning import tune

_HOW_TO_CONVERGE = "the training has diverged. Lower train.learning-rate (or the server's)."


class Classification:
    """The task of the rounds (`rounds.Task`).

    Args:
        config: The run's, with the generator's name settled.
        run_dir: Where metrics, timings and checkpoints go.
        parts: The data set.
        attendance: Who is there; told who is prepared.
        roles: Of every client.
        supply: Of the generator, for clients that do not have it.

    Attributes:
        tuned: The model that the server tuned in the last round, if it did.
    """

    title, message_type = "Round", TRAIN

    def __init__(
        self,
        config: RunConfig,
        run_dir: RunDirectory,
        parts: DataParts,
        attendance: Attendance,
        roles: dict[int, Role],
        *,
        supply: GeneratorSupply,
    ) -> None:
        self.rounds = config.num_server_rounds
        self.tuned: Arrays | None = None
        self._config, self._run_dir, self._parts, self._attendance, self._roles = config, run_dir, parts, attendance, roles
        self._supply, self._ledger = supply, PrivacyLedger(config, run_dir)
        self._device = pick_device(config)
        self._network = fitted(config.model, image_size=parts.image_size, device=self._device)
        self._evaluated: list[tuple[Arrays, Evaluation]] = []  # models of this round; nobody changes them
        self._evaluate_seconds = 0.0
        self._last_round: dict[int, int] = {}  # the last round in which a client succeeded
        for row in run_dir.read_rows("metrics.jsonl"):
            self._last_round |= dict.fromkeys(row.get("clients", ()), row["round"])

    def first_point(self, started: float) -> Checkpoint:
        """Make the initial model, and record how good it is as round 0; its time is all since `started`: preparation, warm start."""
        config, info = self._config, self._parts.info
        if config.warm_start.enabled:
            log(INFO, "Warm start: training the initial model on %s images", config.warm_start.images)
            model = warm_start_model(config)
        else:
            model = new_classifier(self._network, channels=info.channels, num_classes=info.num_classes, seed=config.seed)
        embeddings = None
        if config.balancing.enabled and config.balancing.average_embeddings:
            embeddings = np.zeros((info.num_classes, model.width), dtype=np.float32)
        point = Checkpoint(server_round=0, arrays=to_arrays(model.state_dict()), embeddings=embeddings)
        point = with_average(point, config)
        traffic, seconds = Traffic(sent={}, received={}, elapsed={}), time.perf_counter() - started
        self._record(Round(replies={}, failures={}, traffic=traffic, seconds=seconds), point)
        self.save(point)
        return point

    def go_on_from(self, point: Checkpoint) -> None:
        """Take the network as the checkpoint has it: another machine may choose another width."""
        self._network = as_received(self._config.model, point.arrays)

    def begin(self, point: Checkpoint) -> Checkpoint:
        before, self._roles = self._roles, roles_of(self._config, self._attendance.roster)
        if {role.method for role in self._roles.values()} - {role.method for role in before.values()}:
            announce(self._roles, balancing=self._config.balancing.enabled)  # a node came late, with a method that nobody had
        methods = [role.method for role in self._roles.values()]
        return replace(point, method_state=with_clients(point.method_state, methods, self._parameters))

    def choose(self, clients: list[int], server_round: int) -> list[int]:
        config = self._config
        unprepared = self._attendance.unprepared()
        return choose_clients(config.fraction_train, clients, server_round, seed=config.seed, unprepared=unprepared)

    def requests(self, chosen: list[int], point: Checkpoint, server_round: int, checkpoint_round: int) -> dict[int, RecordDict]:
        packed, packed_extras = array_record(point.arrays), packed_state(point.method_state)
        return {
            client: Request(
                run=self._run_dir.identity,
                client=client,
                server_round=server_round,
                checkpoint_round=checkpoint_round,
                last_round=self._last_round.get(client, 0),
                arrays=point.arrays,
                embeddings=point.embeddings,
                **self._supply.for_client(client),
            ).to_record(packed, packed_extras.get(self._roles[client].method))
            for client in chosen
        }

    def expected(self, client: int, point: Checkpoint) -> Expected:
        method = self._roles[client].method
        extra = arrays_to_send(method, point.method_state, point.arrays)
        refusal = ""
        if self._config.privacy.clip_norm and method in NOT_PRIVATE:
            refusal = f"its method, {method}, does not work with privacy.clip-norm"
        if self._config.aggregation.rule != "mean" and method in NOT_ROBUST:
            refusal = f"its method, {method}, does not work with aggregation.rule = {self._config.aggregation.rule!r}"
        return Expected(
            arrays=point.arrays,
            precision=self._config.transport.precision,
            embeddings=point.embeddings,
            extras={method: extra} if extra else {},
            counts_real=self._config.aggregation.weight_by != "balanced",
            refusal=refusal,
        )

    def advance(self, point: Checkpoint, result: Round, server_round: int) -> Checkpoint:
        config = self._config
        self._ledger.add(result.chosen)
        untuned, result = self._next_usable(point, result, server_round)
        for client, reply in result.replies.items():
            self._tell(client, reply, server_round)
        self._attendance.prepared(result.replies, {})
        self._supply.delivered(result.replies)
        self._supply.lost(result.failures)
        self._last_round |= dict.fromkeys(result.replies, server_round)
        self.tuned, tuning_seconds = self.tune(untuned)
        goes_on = replace(untuned, arrays=self.tuned) if self.tuned and config.server_tuning.every else untuned
        point = with_average(goes_on, config)
        self._record(result, point, tuned=self.tuned, untuned=untuned.arrays, tuning_seconds=tuning_seconds)
        return point

    def save(self, point: Checkpoint) -> None:
        self._run_dir.write_checkpoint(replace(point, data=self._parts.identity))

    def tune(self, point: Checkpoint) -> tuple[Arrays | None, float]:
        """Return the tuned model, or None in a round that has none, and the seconds that it took."""
        started, config = time.perf_counter(), self._config
        if not config.server_tuning.due(point.server_round, last=config.num_server_rounds):
            return None, 0.0
        tuned = tune(point.arrays, config, self._parts, server_round=point.server_round)
        return tuned, time.perf_counter() - started

    def _next_usable(self, point: Checkpoint, result: Round, server_round: int) -> tuple[Checkpoint, Round]:
        """Return the state after the round and the round, without the clients that alone make the new model unusable (`spoilers`)."""

        def after(replies: Mapping[int, Reply]) -> Checkpoint:
            return next_point(
                point, replies, self._roles, config=self._config, server_round=server_round, parameters=self._parameters
            )

        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is checked
            untuned = after(result.replies)
            if not self._problem(untuned):
                return untuned, result
            if self._config.privacy.clip_norm:  # no update is large
                raise RunFailed(f"round {server_round}: {self._problem(untuned)}: {_HOW_TO_CONVERGE}")
            found = spoilers(result.replies, point.arrays, lambda arrays: not self._problem(replace(point, arrays=arrays)))
            others = {client: reply for client, reply in result.replies.items() if client not in found}
            if found and others and not self._problem(better := after(others)):
                for client, reason in found.items():
                    log(WARNING, "Round %d: client %d is left out: %s", server_round, client, reason)
                return better, replace(result, replies=others, failures=dict(sorted((result.failures | found).items())))
        raise RunFailed(f"round {server_round}: {self._problem(untuned)}: {_HOW_TO_CONVERGE}")

    def _problem(self, point: Checkpoint) -> str:
        """Say why a state cannot be gone on from; empty: it can."""
        if not is_finite(point):
            return "the new global model, or what the server keeps for a method, is not finite"
        return loss_problem(self._evaluate(point.arrays).loss)

    def _parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        info = self._parts.info
        return empty_classifier(self._network, channels=info.channels, num_classes=info.num_classes).named_parameters()

    def _tell(self, client: int, reply: Reply, server_round: int) -> None:
        if reply.forgot:
            log(WARNING, "Round %d: client %d finds nothing of this run on its disk and starts afresh", server_round, client)
        if reply.other_generator:
            log(
                WARNING,
                "Round %d: client %d has synthetic images of another generator than before: from here on, the results are not "
                "those of one unbroken run",
                server_round,
                client,
            )

    def _record(
        self,
        result: Round,
        point: Checkpoint,
        *,
        tuned: Arrays | None = None,
        untuned: Arrays | None = None,
        tuning_seconds: float = 0.0,
    ) -> None:
        """Evaluate on the whole test set (or validation part), and write one line of metrics and one of timings.

        `accuracy` is of the tuned model where there is one, else of the point's.
        """
        if not is_finite(point):
            raise RunFailed(f"round {point.server_round}: the global model is not finite: {_HOW_TO_CONVERGE}")
        evaluation = self._evaluate(tuned or point.arrays)
        others = {"averaged": point.method_state.get(AVERAGE), "untuned": untuned if tuned is not None else None}
        scores = {kind: self._evaluate(arrays) for kind, arrays in others.items() if arrays is not None}
        worst = max([evaluation.loss, *(score.loss for score in scores.values())], key=lambda loss: (math.isnan(loss), loss))
        if problem := loss_problem(worst):
            raise RunFailed(f"round {point.server_round}: {problem}: {_HOW_TO_CONVERGE}")
        row: dict[str, Any] = {"round": point.server_round, "accuracy": evaluation.accuracy, "loss": evaluation.loss}
        for kind, score in scores.items():
            row |= {f"{kind}_accuracy": score.accuracy, f"{kind}_loss": score.loss}
        line = f"Round {point.server_round}/{self.rounds}: accuracy {100 * evaluation.accuracy:.2f} %"
        if result.replies:
            row |= result.metrics()
            loss = "no client of this round has an image"
            if row["train_loss"] is not None:
                loss = f"training loss {row['train_loss']:.3f}"
            line += f", {loss}, {len(result.replies)} clients, {result.seconds:.1f} s"
        spent = self._ledger.spent()
        line += "".join(f", {name} {value:.3g}" for name, value in spent.items())
        self._run_dir.append("metrics.jsonl", row | spent)
        times = {
            "round": point.server_round,
            "clients_seconds": result.seconds,
            "tuning_seconds": tuning_seconds,
            "evaluate_seconds": self._evaluate_seconds,
        }
        self._run_dir.append("timings.jsonl", times | result.timings())
        self._evaluated, self._evaluate_seconds = [], 0.0
        log(INFO, "%s", line)

    def _evaluate(self, arrays: Arrays) -> Evaluation:
        """Evaluate a model, once a round."""
        for known, evaluation in self._evaluated:
            if known is arrays:
                return evaluation
        started, info = time.perf_counter(), self._parts.info
        model = load_classifier(arrays, self._config, channels=info.channels, num_classes=info.num_classes, device=self._device)
        evaluation = evaluate(model, scored_part(self._config.data, self._parts).to(self._device))
        self._evaluated.append((arrays, evaluation))
        self._evaluate_seconds += time.perf_counter() - started
        return evaluation
