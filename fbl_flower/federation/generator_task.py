"""The rounds before the classifier's: the clients train a generator together."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from logging import INFO

from flwr.app import RecordDict
from flwr.common.logger import log

from fbl_flower.config import RunConfig
from fbl_flower.data.datasets import DataParts
from fbl_flower.errors import RunFailed
from fbl_flower.federation.attendance import Attendance
from fbl_flower.federation.gate import Expected
from fbl_flower.federation.privacy import PrivacyLedger, cohort_size, private_model
from fbl_flower.federation.rounds import Round, choose_clients
from fbl_flower.federation.wire import TRAIN_GENERATOR, Request, array_record
from fbl_flower.generation.federated import CLASS_CODES, initial_arrays, write_federated
from fbl_flower.methods.robust import aggregate
from fbl_flower.methods.server_step import AVERAGE, next_average
from fbl_flower.params import all_finite, capped
from fbl_flower.reporting.rundir import Checkpoint, RunDirectory

_LARGEST_WEIGHT = (
    1e4  # AdamW moves a weight by about its learning rate a step; nobody measures the generator between the rounds
)


class GeneratorTask:
    """The task of these rounds (`rounds.Task`): FedAvg on the generator's weights, and their average over rounds.

    Args:
        config: The run's.
        run_dir: The run's; what these rounds leave lies in its `generator-rounds`.
        parts: The server's data set.
        attendance: Who is there, and who trains a generator.
    """

    title, message_type = "Generator round", TRAIN_GENERATOR

    def __init__(self, config: RunConfig, run_dir: RunDirectory, parts: DataParts, attendance: Attendance) -> None:
        self.rounds = config.federated_generator.rounds
        self._config, self._settings, self._parts = config, config.federated_generator, parts
        self._attendance = attendance
        self._run, self._own = run_dir, run_dir.generator_rounds
        self._seconds: list[float] = []  # of the rounds since the start
        self._ledger = PrivacyLedger(config, run_dir)
        self._images: dict[int, int] = {}  # that each client has, as it said last

    def start(self) -> Checkpoint:
        """Return where to begin: the last checkpoint of a killed run, else the first weights, which follow from the seed."""
        if self._own.has_checkpoint():
            point = self._own.read_checkpoint()
            self._own.cut_rows(point.server_round)
            for row in self._own.read_rows("metrics.jsonl"):
                self._images |= {int(client): images for client, images in row["images"].items()}
            return point
        self._own.path.mkdir(exist_ok=True)
        arrays = initial_arrays(self._parts.info, self._parts.image_size, seed=self._config.seed)
        point = Checkpoint(server_round=0, arrays=arrays, embeddings=None, method_state={AVERAGE: arrays})
        self._own.cut_rows(0)
        self.save(point)
        return point

    def begin(self, point: Checkpoint) -> Checkpoint:
        return point

    def choose(self, clients: list[int], server_round: int) -> list[int]:
        able = [client for client in clients if self._attendance.trains_generator(client)]
        if not able:
            raise RunFailed(f"generator round {server_round}: no node that is connected trains a generator (trains-generator)")
        fraction, seed = self._settings.fraction_train, self._config.seed
        return choose_clients(fraction, able, server_round, seed=seed, stream="generator clients")

    def requests(self, chosen: list[int], point: Checkpoint, server_round: int, checkpoint_round: int) -> dict[int, RecordDict]:
        packed = array_record(point.arrays)
        return {
            client: Request(
                run=self._run.identity,
                client=client,
                server_round=server_round,
                checkpoint_round=checkpoint_round,
                arrays=point.arrays,
            ).to_record(packed)
            for client in chosen
        }

    def expected(self, client: int, point: Checkpoint) -> Expected:
        precision = self._config.transport.precision
        return Expected(arrays=point.arrays, precision=precision, counts_real=True, largest=_LARGEST_WEIGHT)

    def advance(self, point: Checkpoint, result: Round, server_round: int) -> Checkpoint:
        sizes = {client: reply.num_real for client, reply in result.replies.items()}
        self._images |= sizes
        self._ledger.add(result.chosen)
        arrays, privacy = point.arrays, self._config.privacy
        replies = [reply.arrays for reply in result.replies.values()]
        if privacy.clip_norm:
            cohort = cohort_size(self._settings.fraction_train, self._config.num_clients)
            arrays = private_model(arrays, replies, privacy, cohort=cohort, fixed={CLASS_CODES})
        elif any(sizes.values()):
            weights = capped([float(size) for size in sizes.values()], largest_share=self._config.aggregation.largest_share)
            arrays = aggregate(arrays, replies, weights, self._config.aggregation)
            arrays[CLASS_CODES] = point.arrays[CLASS_CODES]  # which no client may move
        if not all_finite(arrays):
            raise RunFailed(
                f"generator round {server_round}: the generator's weights are not finite: its training has diverged. "
                "Lower federated-generator.learning-rate."
            )
        average = next_average(point.method_state[AVERAGE], arrays, decay=self._settings.average, server_round=server_round)
        row = {"round": server_round} | result.metrics() | {"images": {str(client): n for client, n in sizes.items()}}
        self._own.append("metrics.jsonl", row | self._ledger.spent())
        times = {"round": server_round, "clients_seconds": result.seconds}
        self._own.append("timings.jsonl", times | result.timings())
        loss = "no client of this round has an image" if row["train_loss"] is None else f"loss {row['train_loss']:.4f}"
        self._seconds.append(result.seconds)
        left = (self.rounds - server_round) * sum(self._seconds) / len(self._seconds)
        line = f"{self.title} {server_round}/{self.rounds}: {loss}, {len(result.replies)} clients, {result.seconds:.1f} s"
        log(INFO, "%s, about %.0f min left", line, left / 60)
        return replace(point, server_round=server_round, arrays=arrays, method_state={AVERAGE: average})

    def save(self, point: Checkpoint) -> None:
        self._own.write_checkpoint(replace(point, data=self._parts.identity))

    def finish(self, point: Checkpoint) -> None:
        """Store the average in 4 bits as the run's `generator` folder."""
        started = time.perf_counter()
        if not any(self._images.values()):
            raise RunFailed("the generator: no client that trained it has an image")
        rows = self._own.read_rows("timings.jsonl")
        seconds = sum(row["clients_seconds"] for row in rows)
        out, private = self._run.generator, self._config.privacy.clip_norm > 0
        shutil.rmtree(out, ignore_errors=True)
        write_federated(
            point.method_state[AVERAGE],
            self._parts,
            self._config.data,
            self._settings,
            num_clients=len(self._images) if private else sum(size > 0 for size in self._images.values()),
            num_images=0 if private else sum(self._images.values()),
            seed=self._config.seed,
            seconds=seconds,
            out=out,
        )
        size = sum(file.stat().st_size for file in out.iterdir())
        log(
            INFO,
            "The federation's generator: %d rounds in %.0f s, %.2f MB in 4 bits, stored in %.1f s: %s",
            point.server_round,
            seconds,
            size / 1e6,
            time.perf_counter() - started,
            out,
        )
