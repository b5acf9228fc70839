"""From the clients' models of a round to the next global model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch

from fbl_flower.config import RunConfig
from fbl_flower.federation.method_rounds import update_of
from fbl_flower.federation.privacy import cohort_size, private_model
from fbl_flower.federation.wire import Reply
from fbl_flower.methods.robust import aggregate
from fbl_flower.methods.server import corrected, model_to_average, next_state
from fbl_flower.methods.server_step import AVERAGE, next_average, server_step
from fbl_flower.params import Arrays, capped, weighted_mean
from fbl_flower.reporting.rundir import Checkpoint
from fbl_flower.training.roles import Role

Parameters = Callable[[], Iterable[tuple[str, torch.Tensor]]]


def next_point(
    point: Checkpoint,
    replies: Mapping[int, Reply],
    roles: Mapping[int, Role],
    *,
    config: RunConfig,
    server_round: int,
    parameters: Parameters,
) -> Checkpoint:
    """Return the state of the run after a round: the mean of the clients' models, then what the server makes of it.

    The mean is weighted as `aggregation.weight-by` says, up to `aggregation.largest-share`, or is what `aggregation.rule` puts in its place. Clients without images weigh nothing. With `privacy.clip-norm`, the sum of clipped
    updates, with noise, takes its place; sizes and whatever else a client sent are not looked at.

    Args:
        point: Before the round.
        replies: By client, in ascending order.
        roles: Of every client.
        config: The run's.
        server_round: From 1.
        parameters: Asked for the model's, if they are needed.
    """
    if config.privacy.clip_norm:
        models = [reply.arrays for reply in replies.values()]
        cohort = cohort_size(config.fraction_train, config.num_clients)
        private = replace(
            point, server_round=server_round, arrays=private_model(point.arrays, models, config.privacy, cohort=cohort)
        )
        return _stepped(private, point.arrays, config, parameters)
    by = config.aggregation.weight_by
    sizes = [r.num_real if by == "real" else r.num_examples for r in replies.values()]
    weights = [float(size > 0 if by == "equal" else size) for size in sizes]
    weights = capped(weights, largest_share=config.aggregation.largest_share)
    if sum(weights) == 0:  # only clients without images: nothing was learned
        return replace(point, server_round=server_round)
    embeddings = point.embeddings
    shared = [(r.embeddings, w) for r, w in zip(replies.values(), weights, strict=True) if r.embeddings is not None and w > 0]
    if embeddings is not None and shared:
        embeddings = weighted_mean([{"P": e} for e, _ in shared], [w for _, w in shared])["P"]
    updates = [update_of(reply, roles[client]) for client, reply in replies.items()]
    models = [model_to_average(u, point.arrays, config) for u in updates]
    arrays = aggregate(point.arrays, models, weights, config.aggregation)
    state = next_state(point.method_state, updates, config=config, server_round=server_round)
    arrays, state = corrected(arrays, point.arrays, state, updates, config=config)
    mean = replace(point, server_round=server_round, arrays=arrays, embeddings=embeddings, method_state=state)
    return _stepped(mean, point.arrays, config, parameters)


def _stepped(mean: Checkpoint, before: Arrays, config: RunConfig, parameters: Parameters) -> Checkpoint:
    """Return the state of the run after the step of the server's optimizer from `before` towards the mean."""
    if config.server.optimizer == "none":
        return mean
    names = [name for name, _ in parameters()]
    arrays, moved = server_step(before, mean.arrays, mean.method_state, config=config.server, parameters=names)
    return replace(mean, arrays=arrays, method_state=mean.method_state | moved)


def with_average(point: Checkpoint, config: RunConfig) -> Checkpoint:
    """Return the state of the run with its global model taken into the average, if `server.average` is set; the first model starts it."""
    if not config.server.average:
        return point
    average = point.method_state.get(AVERAGE)
    if average is None:
        average = point.arrays
    else:
        average = next_average(average, point.arrays, decay=config.server.average, server_round=point.server_round)
    return replace(point, method_state=point.method_state | {AVERAGE: average})


def server_in_words(config: RunConfig) -> str:
    """Say what the server does beside averaging; empty: nothing."""
    server, tuning, privacy, parts = config.server, config.server_tuning, config.privacy, []
    if privacy.clip_norm:
        noise = (
            f"noise multiplier {privacy.noise_multiplier:g}"
            if privacy.noise_multiplier
            else "without noise, so without privacy"
        )
        parts.append(f"clips updates to a norm of {privacy.clip_norm:g}, {noise}")
    if config.aggregation.rule != "mean":
        parts.append(f"aggregation by {config.aggregation.rule}")
    if server.optimizer != "none":
        parts.append(f"optimizer {server.optimizer}, learning rate {server.learning_rate:g}")
    if server.average:
        parts.append(f"an average over rounds, decay {server.average:g}")
    if tuning.generates:
        when = f"every {tuning.every} rounds" if tuning.every else "after the last round"
        parts.append(f"tunes its {tuning.part} on {tuning.num_images} images of its generator {when}")
    return "; ".join(parts)
