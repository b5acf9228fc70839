"""The choice of steps and guidance: the rule by hand, and the measuring against `quality`."""

from __future__ import annotations

import json

import pytest
from test_generation_quality import centroid_classifier
from test_generation_support import digits, two_class_parts

from fbl_flower.errors import GeneratorError
from fbl_flower.generation.public import PublicImages
from fbl_flower.generation.quality import measure_quality
from fbl_flower.generation.sampling_defaults import Sampling
from fbl_flower.generation.tuning import Candidate, Tuning, tune_sampling


def tuning(*rows: tuple[int, float, tuple[float, ...]]) -> Tuning:
    candidates = tuple(
        Candidate(sampling=Sampling(steps=steps, guidance=guidance), accuracies=accuracies, agreement=0.5, seconds=1.0)
        for steps, guidance, accuracies in rows
    )
    seeds = tuple(range(len(rows[0][2])))
    return Tuning(candidates=candidates, judge_accuracy=0.9, num_images=4, num_validation=5, seeds=seeds)


def test_the_cheapest_within_one_standard_error_is_chosen() -> None:
    """Variances 0.0002 and 0.0018, mean 0.001, so a standard error of sqrt(0.001 / 2) = 0.0224; the best has 0.63."""
    near = tuning((4, 2.0, (0.60, 0.62)), (16, 1.5, (0.60, 0.66)))
    assert near.standard_error == pytest.approx(0.0005**0.5)
    assert near.best.sampling.steps == 16 and near.chosen.sampling.steps == 4
    far = tuning((4, 2.0, (0.59, 0.61)), (16, 1.5, (0.60, 0.66)))
    assert far.chosen.sampling.steps == 16


def test_guidance_counts_twice_and_a_tie_goes_to_the_more_accurate() -> None:
    """8 steps without guidance cost 8 evaluations, as 4 with it do."""
    rows = ((8, 1.0, (0.50, 0.60)), (4, 2.0, (0.51, 0.61)), (8, 1.5, (0.52, 0.62)), (16, 1.5, (0.53, 0.63)))
    chosen = tuning(*rows).chosen.sampling
    assert (chosen.steps, chosen.guidance, chosen.evaluations) == (4, 2.0, 8)


def test_with_one_seed_the_most_accurate_is_chosen() -> None:
    one = tuning((4, 2.0, (0.60,)), (16, 1.5, (0.601,)), (8, 1.0, (0.601,)))
    assert one.standard_error == 0 and one.chosen.sampling == Sampling(steps=8, guidance=1.0)


def test_the_table_and_the_json() -> None:
    found = tuning((4, 1.5, (0.25, 0.75)), (8, 1.0, (0.0, 0.0)))
    assert found.as_markdown().splitlines()[2:] == [
        "| **4** | **1.5** | **0.500** | **0.500** | **1.00** |",
        "| 8 | 1 | 0.000 | 0.500 | 1.00 |",
    ]
    written = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert written["judge_accuracy"] == 0.9 and written["seeds"] == [0, 1] and written["num_images"] == 4
    assert written["candidates"][0] == {
        "steps": 4, "guidance": 1.5, "accuracy": 0.5, "accuracies": [0.25, 0.75], "agreement": 0.5, "seconds": 1.0,
    }  # fmt: skip


def test_accuracies_are_those_of_quality_on_validation() -> None:
    parts, lines = digits(), []
    candidates = [Sampling(steps=steps, guidance=1.0) for steps in (1, 2)]
    found = tune_sampling(
        lambda _: PublicImages(parts),
        candidates,
        parts,
        train_classifier=centroid_classifier,
        seeds=(0, 5),
        progress=lines.append,
    )
    quality = measure_quality(
        PublicImages(parts), parts, train_classifier=centroid_classifier, seeds=(0, 5), evaluate_on="validation"
    )
    for one in found.candidates:
        assert list(one.accuracies) == quality.values("synthetic_accuracy")
        assert one.agreement == pytest.approx(quality.mean("agreement"))
    assert found.judge_accuracy == quality.judge_accuracy and found.num_images == 300
    assert len(lines) == 3 and lines[2].startswith("2 steps, guidance 1: accuracy ")


def test_nothing_to_measure_is_refused() -> None:
    parts = digits()
    with pytest.raises(GeneratorError, match="expected at least 1 candidate, seed and validation image, got 0, 2 and 100"):
        tune_sampling(lambda _: PublicImages(parts), [], parts, train_classifier=centroid_classifier)


def test_the_test_part_is_not_read() -> None:
    import dataclasses

    parts = two_class_parts()  # its test part raises when read
    parts = dataclasses.replace(parts, validation=parts.public)
    one = [Sampling(steps=1, guidance=1.0)]
    found = tune_sampling(lambda _: PublicImages(parts), one, parts, train_classifier=centroid_classifier, num_images=11)
    assert found.chosen.accuracy == 1 and found.num_images == 11
