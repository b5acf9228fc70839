"""FedGen's generator of features, G(y, noise) -> z, and how the server trains it on the clients' heads (Eq. 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from fbl_flower.config.methods import FedGenConfig
from fbl_flower.params import Arrays, to_arrays, to_state

Head = tuple[np.ndarray, np.ndarray]  # weight [C, D] and bias [C]
Tensors = Mapping[str, torch.Tensor]


def new_generator(config: FedGenConfig, *, num_classes: int, width: int, rng: torch.Generator) -> Arrays:
    """Return random weights of a network with one hidden layer, uniform in +- 1 / sqrt(inputs) as torch's linear layers have them.

    Args:
        config: Its `noise_width` and `hidden_width`.
        num_classes: Labels go in as one-hot vectors.
        width: D, the width of the features that come out.
        rng: CPU generator.
    """
    arrays: Arrays = {}
    inputs = num_classes + config.noise_width
    for layer, fan_in, fan_out in (("hidden", inputs, config.hidden_width), ("output", config.hidden_width, width)):
        bound = 1 / math.sqrt(fan_in)
        for name, shape in ((f"{layer}.weight", (fan_out, fan_in)), (f"{layer}.bias", (fan_out,))):
            arrays[name] = torch.empty(shape).uniform_(-bound, bound, generator=rng).numpy()
    return arrays


def generate_features(generator: Tensors, labels: torch.Tensor, noise: torch.Tensor, *, num_classes: int) -> torch.Tensor:
    """Return float [N, D], features of int64 labels [N] from noise float [N, M].

    Departure: without the batch normalisation of the authors' code, so that a feature does not depend on its batch.
    """
    inputs = torch.cat([F.one_hot(labels, num_classes).float(), noise], dim=1)
    hidden = F.relu(F.linear(inputs, generator["hidden.weight"], generator["hidden.bias"]))
    return F.linear(hidden, generator["output.weight"], generator["output.bias"])


def label_prior(counts: np.ndarray) -> np.ndarray:
    """Return float32 [C], p(y), the share of each label among all clients' images.

    Args:
        counts: int [K, C], each client's images of each label, at least one image altogether.
    """
    return (counts.sum(0) / counts.sum()).astype(np.float32)


def train_generator(
    arrays: Arrays, heads: Sequence[Head], counts: np.ndarray, *, config: FedGenConfig, rng: torch.Generator
) -> Arrays:
    """Return the generator after `config.steps` steps of Adam on Eq. 4, with the diversity loss beside it.

    min_w E_{y ~ p(y), z ~ G_w(.|y)} [CE(sum_k a_k^y g_k(z), y)], g_k the logits of client k's head. Reading: the mean over clients is
    weighted by label, a_k^y = n_k^y / sum_j n_j^y, as in the authors' code; the paper's text has 1 / K. Reading: Adam starts afresh
    in each round.

    Args:
        arrays: The generator's weights.
        heads: Of the clients of a round.
        counts: int [K, C], their images of each label.
        config: Its `steps`, `batch_size`, `learning_rate` and `diversity`.
        rng: CPU generator of labels and noise.
    """
    generator = {name: tensor.requires_grad_(True) for name, tensor in to_state(arrays).items()}
    weights = torch.stack([torch.tensor(weight) for weight, _ in heads]).float()  # [K, C, D]
    biases = torch.stack([torch.tensor(bias) for _, bias in heads]).float()  # [K, C]
    shares = torch.tensor(counts / np.maximum(counts.sum(0), 1), dtype=torch.float32)  # a, [K, C]
    prior = torch.tensor(label_prior(counts))
    optimizer = torch.optim.Adam(generator.values(), lr=config.learning_rate)
    for _ in range(config.steps):
        labels = torch.multinomial(prior, config.batch_size, replacement=True, generator=rng)
        noise = torch.randn(config.batch_size, config.noise_width, generator=rng)
        features = generate_features(generator, labels, noise, num_classes=len(prior))
        logits = torch.einsum("kcd,nd->nkc", weights, features) + biases
        ensemble = torch.einsum("nkc,kn->nc", logits, shares[:, labels])
        loss = F.cross_entropy(ensemble, labels) + config.diversity * diversity_loss(features, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return to_arrays(generator)


def diversity_loss(features: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return exp(-mean over pairs (i, j) of d(noise_i, noise_j) d(z_i, z_j)): small where unlike noise gives unlike features.

    After Mao et al. (arXiv 1903.05628), as in the authors' code: the mean squared distance for noise, the mean absolute one for features,
    and all pairs, also i = j.
    """
    between_noise = torch.cdist(noise, noise).square() / noise.shape[1]
    between_features = torch.cdist(features, features, p=1) / features.shape[1]
    return torch.exp(-(between_noise * between_features).mean())
