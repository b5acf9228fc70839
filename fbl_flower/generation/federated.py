"""A generator that the clients of a federation train together, each on its own images: what one client does, and what comes out.

FedAvg (McMahan et al., arXiv 1602.05629) on the weights of the flow model of `flow`, with two differences to a classifier's training. The
vector that stands for a class is random and fixed: a learned one would move only where a client has the class, and so name the client's
classes. And a client's images are all used, unbalanced: there is nothing yet to fill with.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fbl_flower.config import DataConfig, FederatedGeneratorConfig
from fbl_flower.data.datasets import DataParts
from fbl_flower.data.examples import Examples
from fbl_flower.data.info import DataInfo
from fbl_flower.device import autocast, keep_freed_memory
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.augment import default_deformation
from fbl_flower.generation.flow import flow_loss, noised
from fbl_flower.generation.folder import write_generator
from fbl_flower.generation.network import build_network, network_config, new_network
from fbl_flower.generation.recipe import Augmentation, Federation, GeneratorInfo
from fbl_flower.params import Arrays, to_arrays, to_state
from fbl_flower.seeding import torch_stream

CLASS_CODES = "class_embedding.weight"  # float [classes + 1, 4 * first width]; the last stands for no class
_WIDTHS = (64, 96)
_LARGEST_SIDE = 16  # positions along a side at the resolution that has attention, whose cost grows with the fourth power of it
_CLIP_NORM, _WEIGHT_DECAY, _BETAS = 1.0, 0.01, (0.9, 0.99)
_LABEL_DROPOUT = 0.1
_LAST_RATE = 0.05  # of the first round's learning rate


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """What one client's round came to.

    Attributes:
        arrays: The trained weights.
        loss: Mean over its images, as it was while they were trained on; 0 without images.
        moments: AdamW's, by name; empty where they are not kept.
    """

    arrays: Arrays
    loss: float
    moments: dict[str, torch.Tensor]


def federated_network(info: DataInfo, image_size: int) -> dict[str, Any]:
    """Return the arguments of the network for these images: deeper where they are larger, as far as halving comes out even.

    Raises:
        GeneratorError: The image is too large, or its size cannot be halved often enough.
    """
    widths = list(_WIDTHS)
    side = image_size // (2 - image_size % 2) // 2
    while side > _LARGEST_SIDE:
        side, widths = side // 2, [*widths, widths[-1] + 32]
    try:
        return network_config(image_size=image_size, channels=info.channels, num_classes=info.num_classes, widths=tuple(widths))
    except GeneratorError as error:
        multiple = 2 ** len(widths)
        raise GeneratorError(
            f"data.image-size: {image_size} pixels cannot be halved {len(widths)} times, as a federated generator needs; "
            f"use a multiple of {multiple}, such as {max(multiple, image_size // multiple * multiple)}"
        ) from error


def initial_arrays(info: DataInfo, image_size: int, *, seed: int) -> Arrays:
    """Return the first global weights, which follow from the seed."""
    return to_arrays(new_network(federated_network(info, image_size), seed=seed).state_dict())


def learning_rate(config: FederatedGeneratorConfig, server_round: int) -> float:
    """Return the step size of a round, from 1: a cosine over the rounds from the first one's to a twentieth of it."""
    share = (1 + math.cos(math.pi * (server_round - 1) / config.rounds)) / 2
    return config.learning_rate * (_LAST_RATE + (1 - _LAST_RATE) * share)


def train_locally(
    arrays: Mapping[str, np.ndarray],
    images: Examples,
    info: DataInfo,
    config: FederatedGeneratorConfig,
    *,
    server_round: int,
    stream: torch.Generator,
    moments: Mapping[str, torch.Tensor] | None = None,
    device: str = "cpu",
    precision: str = "auto",
) -> LocalTraining:
    """Train the global weights on a client's images for some epochs.

    Args:
        arrays: The global weights.
        images: All real images of the client; may be none, and then the weights come back as they were.
        info: Of the data set.
        config: Its epochs, batch size, learning rate, proximal weight; whether to keep the moments.
        server_round: From 1.
        stream: Source of every draw.
        moments: AdamW's after the client's last round, where they are kept.
        device: "cpu" or "cuda". Every draw is made on the CPU.
        precision: auto, fp32 or bf16, of the network's passes, as `train.precision`.

    Raises:
        GeneratorError: The training diverged. The text says nothing of the images.
    """
    keep_freed_memory()
    if not len(images):
        return LocalTraining(arrays=dict(arrays), loss=0.0, moments=dict(moments or {}))
    place = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        network = build_network(federated_network(info, images.images.shape[-1]))
    network.load_state_dict(to_state(arrays))
    network.to(place).get_parameter(CLASS_CODES).requires_grad_(False)
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()} if config.proximal else {}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=learning_rate(config, server_round), betas=_BETAS, weight_decay=_WEIGHT_DECAY
    )
    if moments:
        _restore(optimizer, list(trained), moments)
    augmentation = Augmentation().scaled(default_deformation(info))
    total = 0.0
    for _ in range(config.epochs):
        for index in torch.randperm(len(images), generator=stream).split(config.batch_size):
            drawn = noised(images.take(index), info, augmentation=augmentation, label_dropout=_LABEL_DROPOUT, stream=stream)
            with autocast(precision, place):
                loss = flow_loss(network, drawn.to(place))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for name, parameter in trained.items() if config.proximal else ():  # FedProx's gradient, mu (w - w_global)
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - start[name], alpha=config.proximal)
            norm = nn.utils.clip_grad_norm_(trained.values(), _CLIP_NORM)
            if not bool(loss.isfinite() and norm.isfinite()):
                text = f"the training of the generator has diverged; lower federated-generator.learning-rate ({config.learning_rate:g})"
                raise GeneratorError(text, public=text)
            optimizer.step()
            total += loss.item() * len(index)
    return LocalTraining(
        arrays=to_arrays(network.state_dict()),
        loss=total / (config.epochs * len(images)),
        moments=_moments(optimizer, list(trained)) if config.optimizer_state == "kept" else {},
    )


def _moments(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{names[place]}/{key}": value.cpu() for place, values in state.items() for key, value in values.items()}


def _restore(optimizer: torch.optim.Optimizer, names: list[str], moments: Mapping[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in moments.items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(names.index(parameter), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def local_stream(seed: int, client: int, server_round: int) -> torch.Generator:
    """Return the source of every draw of one client in one round."""
    return torch_stream(seed, "federated generator", client, server_round)


def federation_identity(config: DataConfig, parts: DataParts) -> str:
    """Identify the images that the clients of a federation have, and those that they must not have seen, as far as the server reads them.

    A generator that one federation trained serves others with the same images, however they are spread over clients.
    """
    read = dict(parts.identity) | {"noise": config.noise, "wrong-labels": config.wrong_labels}
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def write_federated(
    arrays: Mapping[str, np.ndarray],
    parts: DataParts,
    data: DataConfig,
    config: FederatedGeneratorConfig,
    *,
    num_clients: int,
    num_images: int,
    seed: int,
    seconds: float,
    out: Path,
) -> GeneratorInfo:
    """Store the federation's generator in 4 bits as the folder `out`, whole or not at all.

    Args:
        arrays: The average over rounds.
        parts: The server's.
        data, config: The run's.
        num_clients: Clients that took part.
        num_images: Images that they have together, as they stated; 0: not told.
        seed: The run's.
        seconds: That the rounds took.
        out: Must not exist.

    Raises:
        GeneratorError: A weight is not finite, or the folder cannot be written.
    """
    network = build_network(federated_network(parts.info, parts.image_size))
    network.load_state_dict(to_state(arrays))
    info = GeneratorInfo(
        data_name=parts.info.name,
        image_size=parts.image_size,
        channels=parts.info.channels,
        class_names=parts.info.class_names,
        public_sha256="",
        num_images=num_images,
        federation=Federation(
            identity=federation_identity(data, parts), num_clients=num_clients, seed=seed, settings=asdict(config)
        ),
        wall_seconds=round(seconds, 1),
        cpu_seconds=0.0,
        num_threads=torch.get_num_threads(),
        versions={name: importlib.metadata.version(name) for name in ("torch", "diffusers", "optimum-quanto")},
    )
    return write_generator(network, info, out=out, weights="4bit")
