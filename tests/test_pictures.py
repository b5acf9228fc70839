"""The pictures hold what they should, and distances are right by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fbl_flower.data.examples import Examples
from fbl_flower.reporting.alignment_picture import alignment_picture, class_alignments
from fbl_flower.reporting.pictures import accuracy_curve, class_colour, class_counts, gallery, partition_picture


def pixels(path: Path) -> np.ndarray:
    """Return uint8 [H, W, 3]."""
    return np.asarray(Image.open(path).convert("RGB"))


def has_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((np.abs(picture.astype(int) - colour).max(axis=2) <= 2).any())


def solid(number: int, colour: tuple[int, ...], label: int) -> Examples:
    """Return `number` images of 6 x 6 pixels of one colour."""
    images = torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].expand(number, -1, 6, 6).contiguous()
    return Examples.real(images, torch.full((number,), label))


def test_accuracy_curve_is_a_picture_of_readable_size(tmp_path: Path) -> None:
    rows = [{"round": r, "accuracy": 0.1 + 0.04 * r, "loss": 2.3 / (1 + r)} for r in range(21)]
    accuracy_curve(rows, tmp_path / "deep" / "curve.png")
    picture = pixels(tmp_path / "deep" / "curve.png")
    assert picture.shape == (650, 910, 3)  # 7 x 5 inches at 130 dots
    assert has_colour(picture, (31, 78, 121)) and has_colour(picture, (217, 130, 43))  # both curves


def test_accuracy_curve_of_one_row_and_of_a_diverged_run(tmp_path: Path) -> None:
    accuracy_curve([{"round": 0, "accuracy": 0.1, "loss": float("nan")}], tmp_path / "one.png")
    assert pixels(tmp_path / "one.png").std() > 5


def test_accuracy_curve_needs_a_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got no rows"):
        accuracy_curve([], tmp_path / "none.png")


def test_gallery_shows_rgb_and_grey_and_lacking_classes(tmp_path: Path) -> None:
    real, synthetic = solid(3, (200, 30, 40), 0), solid(1, (90,), 1)
    gallery(real, synthetic, ["cat", "dog"], tmp_path / "gallery.png")
    picture = pixels(tmp_path / "gallery.png")
    middle = picture.shape[1] // 2
    assert has_colour(picture[:, :middle], (200, 30, 40)) and not has_colour(picture[:, middle:], (200, 30, 40))
    assert has_colour(picture[:, middle:], (90, 90, 90))


def test_gallery_of_nothing_synthetic(tmp_path: Path) -> None:
    real = solid(9, (10, 200, 10), 0)
    gallery(real, real.take(torch.arange(0)), ["cat"], tmp_path / "gallery.png")
    assert has_colour(pixels(tmp_path / "gallery.png"), (10, 200, 10))


def test_class_counts_shows_real_and_synthetic(tmp_path: Path) -> None:
    before = np.array([[10, 0], [0, 0], [4, 6]])
    class_counts(
        before, np.array([[5, 0], [0, 0], [4, 5]]), np.array([[0, 5], [0, 0], [1, 0]]), ["cat", "dog"], tmp_path / "c.png"
    )
    picture = pixels(tmp_path / "c.png")
    assert picture.shape[0] == 780 and has_colour(picture, (31, 119, 180)) and has_colour(picture, (255, 127, 14))


def test_class_counts_refuses_other_shapes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted the same"):
        class_counts(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 2)), ["a", "b", "c"], tmp_path / "c.png")


def test_alignment_distances_by_hand(tmp_path: Path) -> None:
    # class a: real mean (0, 0); synthetic mean (3, 4), 5 away; P = (-3, -4) on both brings it to 0
    # class b: real mean (1, 1); synthetic (1, 3), 2 away; P = (0, 1) takes it to 3 away; class c has no synthetic image
    real = np.array([[-1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [7.0, 7.0]])
    synthetic = np.array([[2.0, 4.0], [4.0, 4.0], [1.0, 3.0]])
    offsets = np.array([[-3.0, -4.0], [-3.0, -4.0], [0.0, 1.0]])
    rows = alignment_picture(
        real, np.array([0, 0, 1, 2]), synthetic, np.array([0, 0, 1]), offsets, ["a", "b", "c"], tmp_path / "alignment.png"
    )
    assert [(row.name, row.num_real, row.num_synthetic) for row in rows] == [("a", 2, 2), ("b", 1, 1)]
    assert [row.before for row in rows] == pytest.approx([5.0, 2.0])
    assert [row.after for row in rows] == pytest.approx([0.0, 3.0])
    picture = pixels(tmp_path / "alignment.png")
    assert has_colour(picture, (217, 130, 43)) and has_colour(picture, (46, 139, 87))


def test_alignment_without_a_common_class(tmp_path: Path) -> None:
    none, no_labels = np.zeros((0, 2)), np.zeros(0, dtype=int)
    assert alignment_picture(np.ones((2, 2)), np.array([0, 0]), none, no_labels, none, ["a"], tmp_path / "a.png") == []
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_alignment_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"wanted \[N, D\], \[M, D\], \[M, D\]"):
        class_alignments(np.ones((2, 3)), np.zeros(2), np.ones((2, 3)), np.zeros(2), np.ones((2, 4)), ["a"])


@pytest.mark.parametrize("num_classes", [3, 30])
def test_partition_picture_shows_clients_and_classes(tmp_path: Path, num_classes: int) -> None:
    """Client 1 has nothing; with three classes each has its colour in the picture."""
    counts = np.zeros((4, num_classes), dtype=int)
    counts[0, 0], counts[2, 1], counts[3] = 40, 30, 5
    partition_picture(counts, [f"c{i}" for i in range(num_classes)], "somebody's partition", tmp_path / "p.png")
    picture = pixels(tmp_path / "p.png")
    assert picture.shape[1] > picture.shape[0] > 400
    for label in (0, 1, num_classes - 1):
        red, green, blue = (round(255 * x) for x in class_colour(label, num_classes)[:3])
        assert has_colour(picture, (red, green, blue))


def test_partition_picture_needs_a_name_for_each_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"counts: got \(2, 3\); wanted \[clients, 2\]"):
        partition_picture(np.zeros((2, 3), dtype=int), ["a", "b"], "title", tmp_path / "p.png")
