"""Images per second of local training for networks that fit 32 pixels, each beside the first, in one run.

    python benchmarks/networks.py                    # one thread, about two minutes
    python benchmarks/networks.py --precision fp32

Candidates are measured in turn, several times over, and the best time of each counts: so what else the machine does touches all alike. Read the
ratios, not the seconds, and run nothing beside it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from fbl_flower.config import ModelConfig, RunConfig
from fbl_flower.data.examples import Examples
from fbl_flower.models import Classifier, new_classifier
from fbl_flower.seeding import torch_stream
from fbl_flower.training.loop import train

CANDIDATES = [
    ModelConfig(width=64, stem="imagenet", norm="group"),
    ModelConfig(width=64, stem="imagenet", norm="batch"),
    ModelConfig(width=16, stem="32x32", norm="group"),
    ModelConfig(width=16, stem="32x32", norm="batch"),
    ModelConfig(width=24, stem="32x32", norm="batch"),
    ModelConfig(width=32, stem="32x32", norm="batch"),
]


def seconds(model: Classifier, examples: Examples, config: RunConfig) -> float:
    """Train one epoch and return the time that it took."""
    started = time.perf_counter()
    train(model, examples, config=config.train, augmentation=None, rng=torch_stream(0, "benchmark"))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = replace(RunConfig().train, epochs=1, batch_size=options.batch_size, precision=options.precision)
    config = replace(RunConfig(), train=settings)
    stream = torch_stream(0, "images")
    images = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8, generator=stream)
    examples = Examples.real(images, torch.randint(0, 10, (options.images,), generator=stream))
    models = [new_classifier(candidate, channels=3, num_classes=10, seed=0) for candidate in CANDIDATES]
    for model in models:
        seconds(model, examples.take(torch.arange(options.batch_size)), config)  # compiles and allocates
    best = [seconds(model, examples, config) for model in models]
    for _ in range(options.repeats - 1):
        best = [min(before, seconds(model, examples, config)) for before, model in zip(best, models, strict=True)]
    print("| width, stem, norm | parameters | images/s | of the first |\n|---|---|---|---|")
    for candidate, model, took in zip(CANDIDATES, models, best, strict=True):
        name = f"{candidate.width}, {candidate.stem}, {candidate.norm}"
        number = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"| {name} | {number:.2f} M | {options.images / took:.0f} | {best[0] / took:.2f} |")


if __name__ == "__main__":
    main()
