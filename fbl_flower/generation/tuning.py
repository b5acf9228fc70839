"""Choose the steps and the guidance of a generator by what its images are worth on validation images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, variance
from typing import Any

import torch

from fbl_flower.data.datasets import DataParts
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.measures import Classifier, TrainClassifier, accuracy, check_judge
from fbl_flower.generation.protocol import ImageGenerator
from fbl_flower.generation.quality import make_images, sample
from fbl_flower.generation.sampling_defaults import Sampling
from fbl_flower.seeding import derive


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What one choice of steps and guidance is worth.

    Attributes:
        sampling: The choice.
        accuracies: On real validation images, of classifiers trained on the generator's images only; one for each seed.
        agreement: Share of the images that the judge gives their label, over all seeds.
        seconds: For 100 images, by the clock on the wall.
    """

    sampling: Sampling
    accuracies: tuple[float, ...]
    agreement: float
    seconds: float

    @property
    def accuracy(self) -> float:
        """The mean over the seeds."""
        return mean(self.accuracies)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What `tune_sampling` measured, and what follows from it.

    Attributes:
        candidates: In the order in which they were given.
        judge_accuracy: Share of the real validation images that the judge, trained on the public images, gives their label.
        num_images: Images of the generator for each candidate and seed.
        num_validation: Real images that they were measured on.
        seeds: Of the images and of the classifiers.
    """

    candidates: tuple[Candidate, ...]
    judge_accuracy: float
    num_images: int
    num_validation: int
    seeds: tuple[int, ...]

    @property
    def standard_error(self) -> float:
        """Of a candidate's mean: the root of the mean variance between seeds, by the root of their number; 0 with one seed."""
        if len(self.seeds) < 2:
            return 0.0
        return math.sqrt(mean(variance(one.accuracies) for one in self.candidates) / len(self.seeds))

    @property
    def best(self) -> Candidate:
        """The most accurate candidate."""
        return max(self.candidates, key=lambda one: one.accuracy)

    @property
    def chosen(self) -> Candidate:
        """Of those within one standard error of the best: fewest evaluations of the network, then the highest accuracy."""
        enough = self.best.accuracy - self.standard_error
        near = [one for one in self.candidates if one.accuracy >= enough]
        return min(near, key=lambda one: (one.sampling.evaluations, -one.accuracy))

    def as_json(self) -> dict[str, Any]:
        """Return all of it, for the entry `chosen_on` of a recipe."""
        rows = [
            {"steps": one.sampling.steps, "guidance": one.sampling.guidance, "accuracy": one.accuracy}
            | {name: value for name, value in asdict(one).items() if name != "sampling"}
            for one in self.candidates
        ]
        return {
            "evaluated_on": "validation",
            "num_validation": self.num_validation,
            "num_images": self.num_images,
            "seeds": list(self.seeds),
            "judge_accuracy": self.judge_accuracy,
            "standard_error": self.standard_error,
            "candidates": rows,
        }

    def as_markdown(self) -> str:
        """Return a table with a row for each candidate; the chosen one is bold."""
        rows = ["| steps | guidance | accuracy | agreement | seconds per 100 images |", "|---|---|---|---|---|"]
        for one in self.candidates:
            numbers = f"{one.accuracy:.3f}", f"{one.agreement:.3f}", f"{one.seconds:.2f}"
            cells = [str(one.sampling.steps), f"{one.sampling.guidance:g}", *numbers]
            rows.append("| " + " | ".join(f"**{cell}**" if one is self.chosen else cell for cell in cells) + " |")
        return "\n".join(rows)


def tune_sampling(
    load: Callable[[Sampling], ImageGenerator],
    candidates: Sequence[Sampling],
    parts: DataParts,
    *,
    train_classifier: TrainClassifier,
    seeds: Sequence[int] = (0, 1),
    num_images: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Tuning:
    """Measure candidates on validation images.

    Args:
        load: Gives the generator with the steps and the guidance of a candidate.
        candidates: At least one.
        parts: Its public images train the judge; its validation images are what everything is measured on.
        train_classifier: Trains the same network whatever the examples.
        seeds: One set of images and one classifier for each.
        num_images: For each candidate and seed, with labels of public images; 0: as many as there are public images.
        progress: Is given a line of text for each candidate.

    Raises:
        GeneratorError: No candidate, no seed, no validation image, or fewer public images than `num_images`.
        RunFailed: The judge has not learned.
    """
    real = parts.validation
    if not candidates or not seeds or not len(real):
        raise GeneratorError(
            f"tune: expected at least 1 candidate, seed and validation image, got {len(candidates)}, {len(seeds)} and {len(real)}. "
            "Raise data.num-validation."
        )
    labels = sample(parts.public, num_images).labels
    judge = train_classifier(parts.public, derive(seeds[0], "judge"))
    judge_accuracy = accuracy(judge, real.images, real.labels)
    check_judge(judge_accuracy, num_classes=parts.info.num_classes)
    progress(f"the judge is right on {100 * judge_accuracy:.1f} % of the {len(real)} real validation images")
    measured = []
    for sampling in candidates:
        one = _measure(load(sampling), sampling, labels, parts, judge=judge, train_classifier=train_classifier, seeds=seeds)
        progress(f"{sampling}: accuracy {one.accuracy:.3f}, {one.seconds:.2f} s per 100 images")
        measured.append(one)
    return Tuning(
        candidates=tuple(measured),
        judge_accuracy=judge_accuracy,
        num_images=len(labels),
        num_validation=len(real),
        seeds=tuple(seeds),
    )


def _measure(
    generator: ImageGenerator,
    sampling: Sampling,
    labels: torch.Tensor,
    parts: DataParts,
    *,
    judge: Classifier,
    train_classifier: TrainClassifier,
    seeds: Sequence[int],
) -> Candidate:
    real, accuracies, agreements, seconds = parts.validation, [], [], 0.0
    for seed in seeds:
        made = make_images(generator, labels, seed)
        accuracies.append(accuracy(train_classifier(made.examples, seed), real.images, real.labels))
        agreements.append(accuracy(judge, made.examples.images, labels))
        seconds += made.seconds
    return Candidate(
        sampling=sampling,
        accuracies=tuple(accuracies),
        agreement=mean(agreements),
        seconds=100 * seconds / (len(labels) * len(seeds)),
    )
