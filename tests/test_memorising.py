"""Whether a generator's images tell which images a client has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from test_federated_generator import FEW

from fbl_flower import cli
from fbl_flower.config import parse_config
from fbl_flower.data.datasets import load_parts
from fbl_flower.data.examples import Examples
from fbl_flower.generation.memorising import as_table, measure_memorising


class Copies:
    """Returns the images of one set, of the class that is asked for, in turn."""

    fingerprint, batch_size = "copies", 1

    def __init__(self, images: Examples) -> None:
        self._images = images

    def generate(self, labels: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        found = {label: self._images.images[self._images.labels == label] for label in set(labels)}
        return torch.stack([found[label][place % len(found[label])] for place, label in enumerate(labels)])


def parts_of_digits() -> tuple[Examples, Examples, Examples]:
    parts = load_parts(parse_config({"data.name": "digits"}).data)
    return parts.private.take(torch.arange(200)), parts.private.take(torch.arange(200, 400)), parts.test


def test_copies_of_a_client_are_told_and_images_of_strangers_are_not() -> None:
    copied, other, unseen = parts_of_digits()
    rows = {row.who: row for row in measure_memorising(Copies(copied), [copied, other], unseen, seed=0)}
    assert rows["client 0"].area > 0.99 and rows["client 0"].own < 0.01 < rows["client 0"].unseen
    assert rows["client 1"].area == pytest.approx(0.5, abs=0.06)
    assert rows["all clients"].area == pytest.approx((rows["client 0"].area + rows["client 1"].area) / 2, abs=0.01)
    assert rows["all clients"].num_images == 400
    assert "a client's only image of a class" not in rows


def test_single_images_of_a_class_have_a_row_of_their_own() -> None:
    copied, other, unseen = parts_of_digits()
    rare = Examples.real(other.images[other.labels == 3][:1], torch.tensor([3]))
    rows = {row.who: row for row in measure_memorising(Copies(copied), [copied, rare], unseen, seed=0)}
    assert rows["a client's only image of a class"].num_images == 1
    table = as_table(list(rows.values()))
    assert "| client 1 | 1 |" in table and table.count("\n") == len(rows) + 1


def test_a_client_without_images_has_no_row() -> None:
    copied, _, unseen = parts_of_digits()
    rows = measure_memorising(Copies(copied), [copied.take(torch.zeros(0, dtype=torch.int64)), copied], unseen, seed=0)
    assert [row.who for row in rows] == ["client 1", "all clients"]


@pytest.mark.usefixtures("quick_judge")
def test_the_quality_of_a_federated_generator_is_measured_against_the_clients_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "generator"
    assert cli.main(["generator", "train", "--federated", "--out", str(out), *FEW]) == 0
    capsys.readouterr()
    assert cli.main(["generator", "quality", str(out), "--seeds", "0", "--clients", *FEW]) == 0
    told = capsys.readouterr().out
    assert "| 90 images, against test | mean |" in told
    assert "| client 2 |" in told and "| all clients | 90 |" in told
