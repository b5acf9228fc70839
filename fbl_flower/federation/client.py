"""The ClientApp: four handlers. What goes wrong is told to the server without a word about the client's data."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fbl_flower.balancing.old_state import remove_old_runs
from fbl_flower.balancing.state import StateStore
from fbl_flower.config import RunConfig, Value, parse_config
from fbl_flower.device import pick_device
from fbl_flower.errors import ConfigError, DataError, FBLError, StateError
from fbl_flower.federation.generator_supply import with_generator
from fbl_flower.federation.node import describe_node, keep_state_days
from fbl_flower.federation.node import trains_generator as told_to_train
from fbl_flower.federation.transport import shrink
from fbl_flower.federation.wire import Reply, Request
from fbl_flower.generation.federated import local_stream, train_locally
from fbl_flower.methods.base import State
from fbl_flower.methods.choice import local_method
from fbl_flower.params import Arrays, all_finite
from fbl_flower.roundstore import Record, RoundStore
from fbl_flower.training.attack import sent_model
from fbl_flower.training.filtering import filter_row
from fbl_flower.training.prepare import ClientData, client_images, forget_images, prepare_client
from fbl_flower.training.readiness import Readiness, check_unchanged, explained
from fbl_flower.training.roles import Role, role_of, settings_of
from fbl_flower.training.round import run_local_round
from fbl_flower.training.schedule import scheduled

app = ClientApp()
_log = logging.getLogger("fbl_flower.client")  # not Flower's logger, whose lines may reach the server
Handler = Callable[[Message, Context], Message]
_PROGRESS_EVERY_S = 15.0  # while a client generates; one that is faster says nothing, because the server counts the prepared
CLIENT_FAILED = 2  # the code that Flower itself sends when a ClientApp raises


def state_folder(state_dir: str | Path, run: str, client: int) -> Path:
    """Return the folder of one client's state for one run."""
    return Path(state_dir).expanduser() / "clients" / run / f"client-{client:04d}"


def _discreet(handler: Handler) -> Handler:
    """Send only an error's public text to the server; the whole of it goes to a file on the client.

    The error is an answer, and not raised: Flower's simulation would put the traceback into what the server gets.
    """

    @functools.wraps(handler)
    def guarded(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as error:
            reason = error.public if isinstance(error, FBLError) else type(error).__name__
            if isinstance(error, OSError) and error.strerror:
                reason += f" ({error.strerror})"  # such as a full disk; never its path
            # A full or read-only disk, or a name that is not UTF-8, must not hide the reason from the server.
            with contextlib.suppress(Exception):
                reason += _noted(_state_dir(context) / "client-errors.log", traceback.format_exc())
            return Message(Error(CLIENT_FAILED, reason), reply_to=message)

    return guarded


def _noted(log_file: Path, text: str) -> str:
    """Add `text` to a file on the client, and return where it is."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
    return f"; the client's {log_file} has the details".encode(errors="backslashreplace").decode()


@app.query("describe")
@_discreet
def describe(message: Message, context: Context) -> Message:
    """Say which partition this node is, and which code it runs."""
    return Message(describe_node(context).to_record(), reply_to=message)


@app.train("generator")
@_discreet
def train_generator(message: Message, context: Context) -> Message:
    """Run one client's round of the generator that all train together."""
    started = time.perf_counter()
    config, request = _config(context), Request.from_record(message.content)
    if not told_to_train(context):
        problem = "this node does not train a generator (trains-generator)"
        raise ConfigError([problem])
    _check_hosted(request.client, context)
    folder = state_folder(_state_dir(context), request.run, request.client)
    with explained():
        parts, real = client_images(config, request.client, _own_folder(config, context))
    check_unchanged(folder / "images.json", real, client=request.client, num_classes=parts.info.num_classes)
    store = _tensor_store(folder / "federated-generator")
    kept = config.federated_generator.optimizer_state == "kept"
    result = train_locally(
        request.arrays,
        real,
        parts.info,
        config.federated_generator,
        server_round=request.server_round,
        stream=local_stream(config.seed, request.client, request.server_round),
        moments=store.load(before_round=request.server_round) if kept else None,
        device=pick_device(config).type,
        precision=config.train.precision,
    )
    if result.moments:
        store.save(result.moments, server_round=request.server_round, checkpoint_round=request.checkpoint_round)
    reply = Reply(
        arrays=_packed(result.arrays, config, request),
        num_examples=len(real),
        num_real=len(real),
        loss=result.loss,
        seconds=time.perf_counter() - started,
    )
    return Message(reply.to_record(), reply_to=message)


@app.train("prepare")
@_discreet
def prepare(message: Message, context: Context) -> Message:
    """Get one client's data ready: what is already on its disk is not generated again."""
    config, request = _config(context), Request.from_record(message.content)
    role = _role(config, request.client, context)
    _tidy(_state_dir(context) / "clients", keep_state_days(context), request.run)
    _client_data(_supplied(config, request, context, role), request, context, role.capability)
    _tell_what_is_sent(request.client, role.method)
    return Message(RecordDict(), reply_to=message)


@app.train()
@_discreet
def train(message: Message, context: Context) -> Message:
    """Run one client's round."""
    started = time.perf_counter()
    config, request = _config(context), Request.from_record(message.content)
    # Prepared at first contact, if it was not before.
    role, state_dir = _role(config, request.client, context), _state_dir(context)
    config = _supplied(config, request, context, role)
    data = _client_data(config, request, context, role.capability)
    _tell_what_is_sent(request.client, role.method)
    config = scheduled(settings_of(config, role), request.server_round)
    store = StateStore(state_folder(state_dir, request.run, request.client))
    method_store = _tensor_store(store.folder / role.method)
    # Both as after the last round whose result the server has: what came of a lost reply is no part of the server's own state.
    state = store.load(before_round=request.last_round + 1)
    method_state = method_store.load(before_round=request.last_round + 1)
    result = run_local_round(
        request.arrays,
        data,
        state,
        config=config,
        server_round=request.server_round,
        averaged_embeddings=request.embeddings,
        method=local_method(
            role.method,
            config,
            client=request.client,
            server_round=request.server_round,
            received=request.extras.get(role.method, {}),
            state=method_state,
        ),
    )
    finished = result.finished
    finite = all_finite(result.arrays) and all_finite(finished.sent)
    finite = finite and (result.state is None or bool(result.state.embeddings.isfinite().all()))
    if finite and finished.state is not None:
        method_store.save(finished.state, server_round=request.server_round, checkpoint_round=request.checkpoint_round)
    if finite and result.state is not None:
        store.save(result.state, server_round=request.server_round, checkpoint_round=request.checkpoint_round)
        note = functools.partial(_note, store.folder, request.server_round)  # for the client's own eyes
        if config.balancing.alignment:
            note("alignment.jsonl", result.state.alignment_row())
        if result.choice is not None:
            note("choices.jsonl", result.choice)
            if config.balancing.replay_ratio and result.choice["kept_again"] and not result.choice["replayed"]:
                _log.warning("client %d: this replay brought no image back; its kept set is small", request.client)
            if result.state.kept_fill is not None:
                note("filter.jsonl", filter_row(data, result.state.kept_fill))
    shares = config.balancing.average_embeddings and result.state is not None
    reply = Reply(
        arrays=_packed(result.arrays, config, request),
        num_examples=result.num_examples if config.aggregation.weight_by == "balanced" else result.num_real,
        num_real=result.num_real,
        loss=result.training.loss if result.training else 0.0,
        seconds=time.perf_counter() - started,
        forgot=request.last_round > 0
        and ((state is None and result.state is not None) or (method_state is None and finished.state is not None)),
        other_generator=state is not None and "" not in (state.generator, data.generator) and state.generator != data.generator,
        embeddings=result.state.embeddings.numpy() if shares and result.state is not None else None,
        extras={role.method: finished.sent} if finished.sent else {},
    )
    return Message(reply.to_record(), reply_to=message)


def _packed(trained: Arrays, config: RunConfig, request: Request) -> Arrays:
    """Return the client's model as it goes out; that of a client that plays an attacker is poisoned first."""
    model = sent_model(request.arrays, trained, config, client=request.client, server_round=request.server_round)
    return shrink(model, request.arrays, precision=config.transport.precision)


def _note(folder: Path, server_round: int, name: str, row: Mapping[str, Any]) -> None:
    """Add a line of JSON on a round to a file of the client's state."""
    with (folder / name).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"round": server_round} | dict(row), allow_nan=False) + "\n")


def _config(context: Context) -> RunConfig:
    """Return the run's configuration; `generator-path` of the node's own config comes before the run's `generator.path`."""
    settings = dict(context.run_config)
    if own := context.node_config.get("generator-path"):
        settings["generator.path"] = str(own)
    config = _parsed(tuple(settings.items()))
    if torch.get_num_threads() != config.num_threads:
        torch.set_num_threads(config.num_threads)
    return config


@functools.lru_cache(maxsize=4)
def _parsed(items: tuple[tuple[str, Value], ...]) -> RunConfig:
    return parse_config(dict(items))


def _state_dir(context: Context) -> Path:
    """Return the node's folder for cache and state: its own setting, else the run's."""
    return Path(str(context.node_config.get("state-dir", context.run_config.get("state-dir", "~/.fbl")))).expanduser()


def _role(config: RunConfig, client: int, context: Context) -> Role:
    """Return the client's role; `capability` and `method` of the node's own config come before what the seed draws."""
    node = context.node_config
    return role_of(config, client, capability=str(node.get("capability", "")), method=str(node.get("method", "")))


def _supplied(config: RunConfig, request: Request, context: Context, role: Role) -> RunConfig:
    """Return the configuration with the run's generator, for a client that fills."""
    if role.capability == "none" or not config.clients_fill:
        return config
    return with_generator(
        config,
        name=request.generator,
        identity=request.generator_id,
        files=request.generator_files,
        folder=_state_dir(context) / "clients" / request.run / "generator",
        own_path=bool(context.node_config.get("generator-path")),
    )


def _tensor_store(folder: Path) -> RoundStore[State]:
    return RoundStore(folder, pack=lambda state: Record(tensors=state), unpack=lambda record: record.tensors)


def _own_folder(config: RunConfig, context: Context) -> Path | None:
    """Return the folder with the images of the node's one client (`data-path` of its node config), or None."""
    path = str(context.node_config.get("data-path", ""))
    if not path:
        return None
    if config.attack.kind != "none":
        problem = "attack.kind: this node has images of its own (data-path); attacks are simulated on the run's own data only"
        raise DataError(problem, public=problem)
    num_nodes = int(str(context.node_config.get("num-partitions", 1)))
    if config.num_clients > num_nodes:
        problem = (
            f"data-path: this node hosts several clients ({config.num_clients} on {num_nodes} nodes), and has one folder; "
            "start a node for each client, with its partition-id and num-partitions, or set num-clients to the number of nodes"
        )
        raise DataError(problem, public=problem)
    return Path(path).expanduser()


@functools.lru_cache(maxsize=1)  # once per run and process, however many clients it hosts
def _tidy(folder: Path, days: float, run: str) -> None:
    if removed := remove_old_runs(folder, days=days, keep=run):
        _log.info("removed the state of %d runs that were not touched for %g days", len(removed), days)


@functools.cache
def _tell_what_is_sent(client: int, method: str) -> None:
    """Warn on the node's own terminal, once per process, of a method that sends more than the promise allows."""
    if method == "fedgen":
        _log.warning("client %d: FedGen sends the label counts of this client to the server, as published", client)


def _client_data(config: RunConfig, request: Request, context: Context, capability: str) -> ClientData:
    """Prepare a client. Time for generating that ran out is not granted again in the same run: the plan stays as it is."""
    _check_hosted(request.client, context)
    spent = state_folder(_state_dir(context), request.run, request.client) / "time-budget-spent"
    may_generate = not (config.generator.time_budget and spent.exists())
    own_folder = _own_folder(config, context)
    data = _prepared(config, request.client, _state_dir(context), own_folder, capability, may_generate)
    check_unchanged(spent.with_name("images.json"), data.real, client=data.client, num_classes=data.num_classes)
    if data.unfilled > 0 and may_generate:
        spent.parent.mkdir(parents=True, exist_ok=True)
        spent.write_text(f"{data.unfilled:.4f} of the synthetic images are missing: generator.time-budget ran out\n")
    return data


def _check_hosted(client: int, context: Context) -> None:
    """Refuse a client of another node: the server may know this one by what it was before a restart."""
    node = describe_node(context)
    if client % node.num_partitions != node.partition_id:
        problem = f"this node does not host client {client}: it is partition {node.partition_id} of {node.num_partitions}"
        raise StateError(problem, public=problem)


def forget_clients() -> None:
    """Have this process prepare its clients again, from their files."""
    _prepared.cache_clear()
    forget_images()


@functools.lru_cache(maxsize=128)
def _prepared(
    config: RunConfig, client: int, state_dir: Path, own_folder: Path | None, capability: str, may_generate: bool
) -> ClientData:
    """Prepare a client, once per process and configuration; progress goes to the node's own terminal."""
    if not _log.handlers:
        _log.addHandler(logging.StreamHandler())
        _log.setLevel(logging.INFO)
        _log.propagate = False

    told, told_at = 0, time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told, told_at
        quarter = 4 * done // total
        if quarter > told and time.monotonic() - told_at >= _PROGRESS_EVERY_S:
            # Shares only: a simulation passes these lines on to the server.
            _log.info("client %d: %d %% of its synthetic images generated", client, 25 * quarter)
            told, told_at = quarter, time.monotonic()

    readiness = Readiness(config, client, state_dir=state_dir, own_folder=own_folder, capability=capability)
    with explained():
        data = prepare_client(
            config,
            client,
            cache_folder=state_dir / "cache",
            own_folder=own_folder,
            progress=progress,
            check=readiness.check,
            capability=capability,
            may_generate=may_generate,
        )
    if data.unfilled > 0 and may_generate:
        _log.warning(
            "client %d: %.0f %% of its synthetic images are missing: generator.time-budget ran out; real ones stay instead, and "
            "the next run goes on",
            client,
            100 * data.unfilled,
        )
    return data
