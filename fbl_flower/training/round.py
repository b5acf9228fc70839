"""One client's round: choose which real images stay, train on the balanced set, remember."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from fbl_flower.balancing.sampling import Choice, choose_kept, replay_due
from fbl_flower.balancing.state import BalancingState
from fbl_flower.config import RunConfig
from fbl_flower.data.examples import concatenate
from fbl_flower.device import pick_device
from fbl_flower.methods.base import Finished, LocalMethod
from fbl_flower.methods.fedavg import FEDAVG
from fbl_flower.models import Classifier, as_received, empty_classifier
from fbl_flower.params import Arrays, to_arrays, to_state
from fbl_flower.seeding import numpy_stream, torch_stream
from fbl_flower.training.evaluation import per_image_losses
from fbl_flower.training.filtering import choose_fill, filtered
from fbl_flower.training.loop import TrainResult, train
from fbl_flower.training.prepare import ClientData


@dataclass(frozen=True, kw_only=True)
class LocalRoundResult:
    """What a client's round came to.

    Attributes:
        arrays: The trained model, by name; whole-number buffers as they were received.
        num_examples: Size of the set that was trained on.
        num_real: The client's real images, N_k, whether or not they were all used.
        training: The training's own measurements; None for a client without images.
        state: The client's memory after the round; None for a client that does not balance.
        choice: Counts of the choice of real images made in this round (`Choice.row`); None if the last one still holds.
        finished: What the local method remembers and sends.
    """

    arrays: Arrays
    num_examples: int
    num_real: int
    training: TrainResult | None
    state: BalancingState | None
    choice: dict[str, int | None] | None
    finished: Finished


def run_local_round(
    arrays: Mapping[str, np.ndarray],
    data: ClientData,
    state: BalancingState | None,
    *,
    config: RunConfig,
    server_round: int,
    averaged_embeddings: np.ndarray | None = None,
    method: LocalMethod = FEDAVG,
) -> LocalRoundResult:
    """Run one round of a client: a pure function of what it is given.

    Args:
        arrays: The model that the server sent, by name.
        data: The client's data; it may be empty, and then the model comes back as it was.
        state: What the client remembers, or None in its first round.
        config: The run's configuration.
        server_round: Number of the round, from 1; names the random streams.
        averaged_embeddings: float [C, D], in place of the client's own vectors, where the server averages them.
        method: The local objective of this client in this round.
    """
    device = pick_device(config)
    model = load_classifier(arrays, config, channels=data.real.images.shape[1], num_classes=data.num_classes, device=device)
    examples, choice = data.real, None
    if data.plan is not None:
        kept_before = None if state is None else state.kept.numpy()
        state, chosen = _balance(model, data, state, config=config, server_round=server_round)
        choice = None if chosen is None else chosen.row(data.real.labels.numpy(), kept_before)
        state = replace(state, generator=data.generator)
        if averaged_embeddings is not None:
            state = replace(state, embeddings=torch.tensor(averaged_embeddings))
        fill = filtered(data, state.kept_fill, seed=config.seed).fill
        examples = concatenate(data.real.take(state.kept.nonzero().flatten()), fill)
    if len(examples) == 0:
        method.begin(model, examples)
        return LocalRoundResult(
            arrays=dict(arrays),
            num_examples=0,
            num_real=len(data.real),
            training=None,
            state=state,
            choice=choice,
            finished=method.finish(model),
        )
    b = config.balancing
    embeddings = None
    if state is not None and b.alignment:
        embeddings = nn.Parameter(state.embeddings.to(device).clone())
    training = train(
        model,
        examples.to(device),
        config=config.train,
        augmentation=data.augmentation,
        rng=torch_stream(config.seed, "train", data.client, server_round),
        embeddings=embeddings,
        embedding_learning_rate=b.embedding_learning_rate,
        drop=b.drop,
        synthetic_weight=b.synthetic_weight,
        method=method,
    )
    if state is not None and embeddings is not None:
        state = replace(
            state,
            embeddings=embeddings.detach().cpu(),
            synthetic_accuracy=training.synthetic_accuracy,
            aligned_accuracy=training.aligned_accuracy,
        )
    return LocalRoundResult(
        arrays=to_arrays(model.state_dict()) | _whole_numbers(arrays),
        num_examples=len(examples),
        num_real=len(data.real),
        training=training,
        state=state,
        choice=choice,
        finished=method.finish(model),
    )


def load_classifier(
    arrays: Mapping[str, np.ndarray], config: RunConfig, *, channels: int, num_classes: int, device: torch.device
) -> Classifier:
    """Make a classifier that holds `arrays`, on `device`."""
    model = empty_classifier(as_received(config.model, arrays), channels=channels, num_classes=num_classes)
    model.load_state_dict(to_state(arrays, device), assign=True)
    return model.requires_grad_(True)


def _whole_numbers(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Return BatchNorm's counts of batches, which no computation uses: sent as they came, they do not tell the size of the client's set."""
    return {name: array for name, array in arrays.items() if np.issubdtype(array.dtype, np.integer)}


def _balance(
    model: Classifier, data: ClientData, state: BalancingState | None, *, config: RunConfig, server_round: int
) -> tuple[BalancingState, Choice | None]:
    """Choose real and synthetic images in the client's first round, when its plan has changed, or when a replay is due."""
    b = config.balancing
    real = data.real.to(next(model.parameters()).device)
    kept_before = None if state is None else state.kept.numpy()
    if state is not None and state.generator != data.generator:  # what the filter let pass were other images
        state = replace(state, kept_fill=None)
    plan = filtered(data, None if state is None else state.kept_fill, seed=config.seed).plan
    assert plan is not None
    if state is not None and kept_before is not None:
        kept_counts = np.bincount(data.real.labels.numpy()[kept_before], minlength=data.num_classes)
        due = replay_due(server_round=server_round, chosen_in=state.chosen_in, period=b.replay_period)
        if np.array_equal(kept_counts, plan.keep) and not due:
            return state, None
    kept_fill = choose_fill(model, real, data.fill.to(real.images.device), config=config, server_round=server_round)
    plan = filtered(data, kept_fill, seed=config.seed).plan
    assert plan is not None
    losses = per_image_losses(model, real) if b.sampling == "loss" else None
    choice = choose_kept(
        data.real.labels.numpy(),
        plan.keep,
        losses=None if losses is None else losses.cpu().numpy(),
        rng=numpy_stream(config.seed, "choice", data.client, server_round),
        kept_before=kept_before,
        replay_ratio=b.replay_ratio,
        replay=b.replay,
    )
    embeddings = torch.zeros(data.num_classes, model.width) if state is None else state.embeddings
    kept = torch.from_numpy(choice.kept)
    return BalancingState(kept=kept, chosen_in=server_round, embeddings=embeddings, kept_fill=kept_fill), choice
