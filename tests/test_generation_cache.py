"""The image cache: whole entries or none, whoever writes, and nothing is made twice."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

import pytest
import torch

from fbl_flower.errors import GeneratorError
from fbl_flower.generation.cache import ImageCache, generate_cached

A, B = "a" * 64, "a" * 63 + "b"


def picture(label: int, seed: int) -> torch.Tensor:
    return ((torch.arange(2 * 3 * 5) * 7 + label * 31 + seed * 13) % 256).to(torch.uint8).view(2, 3, 5)


class Counting:
    """A generator that counts what it makes, and may give up after some batches."""

    batch_size = 4

    def __init__(self, fingerprint: str = A, fail_after: int | None = None) -> None:
        self.fingerprint, self.fail_after = fingerprint, fail_after
        self.batches: list[int] = []

    def generate(self, labels, seeds):
        if self.fail_after is not None and len(self.batches) >= self.fail_after:
            raise KeyboardInterrupt
        if not labels:
            return torch.empty(0, 2, 3, 5, dtype=torch.uint8)
        self.batches.append(len(labels))
        return torch.stack([picture(label, seed) for label, seed in zip(labels, seeds, strict=True)])


def expected(labels, seeds):
    return torch.stack([picture(label, seed) for label, seed in zip(labels, seeds, strict=True)])


def test_what_was_put_comes_back(tmp_path):
    cache = ImageCache(tmp_path / "not" / "yet")
    assert cache.get(A, 1, 2) is None
    cache.put(A, 1, 2, picture(1, 2))
    assert torch.equal(ImageCache(cache.folder).get(A, 1, 2), picture(1, 2))


@pytest.mark.parametrize("key", [(B, 1, 12), (A, 2, 12), (A, 1, 13), (A, 11, 2)])
def test_every_ingredient_of_the_key_counts(tmp_path, key):
    cache = ImageCache(tmp_path)
    cache.put(A, 1, 12, picture(1, 12))
    assert cache.get(*key) is None
    cache.path(*key).parent.mkdir(exist_ok=True)
    os.replace(cache.path(A, 1, 12), cache.path(*key))
    assert cache.get(*key) is None  # not even where its file got into the other's place


def test_entries_differ_where_only_the_shape_does(tmp_path):
    cache = ImageCache(tmp_path)
    cache.put(A, 0, 0, picture(0, 0).view(1, 6, 5))
    assert cache.get(A, 0, 0).shape == (1, 6, 5)


def test_any_damage_makes_an_entry_absent(tmp_path):
    cache = ImageCache(tmp_path)
    cache.put(A, 1, 2, picture(1, 2))
    file = cache.path(A, 1, 2)
    whole = file.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))] + [whole + b"\0"]
    damaged += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    for blob in damaged:
        file.write_bytes(blob)
        assert cache.get(A, 1, 2) is None
    assert generate_cached(Counting(), cache, [1], [2]).num_generated == 1
    assert file.read_bytes() == whole


def test_hits_are_loaded_and_misses_made_in_batches(tmp_path):
    cache, generator, calls = ImageCache(tmp_path), Counting(), []
    labels, seeds = [0, 1, 2] * 3, list(range(9))
    first = generate_cached(generator, cache, labels, seeds, progress=lambda done, total: calls.append((done, total)))
    assert (first.num_generated, generator.batches, calls) == (9, [4, 4, 1], [(4, 9), (8, 9), (9, 9)])
    assert torch.equal(first.images, expected(labels, seeds))
    more = generate_cached(generator, cache, [5, *labels[::-1]], [99, *seeds[::-1]])
    assert (more.num_generated, generator.batches) == (1, [4, 4, 1, 1])
    assert torch.equal(more.images, expected([5, *labels[::-1]], [99, *seeds[::-1]]))
    assert generate_cached(Counting(B), cache, labels, seeds).num_generated == 9


def test_a_pair_that_comes_twice_is_made_once(tmp_path):
    result = generate_cached(Counting(), ImageCache(tmp_path), [1, 2, 1, 1], [3, 3, 3, 4])
    assert result.num_generated == 3
    assert torch.equal(result.images, expected([1, 2, 1, 1], [3, 3, 3, 4]))


def test_nothing_asked_for_is_nothing_made(tmp_path):
    result = generate_cached(Counting(), ImageCache(tmp_path), [], [])
    assert (tuple(result.images.shape), result.num_generated) == ((0, 2, 3, 5), 0)
    with pytest.raises(GeneratorError, match="got 1 labels and 2 seeds"):
        generate_cached(Counting(), ImageCache(tmp_path), [1], [1, 2])


def test_images_are_stored_in_the_batches_that_are_really_made(tmp_path):
    """Where memory becomes short, batches shrink: from then on fewer images at a time are asked for and stored."""

    class Shrinking(Counting):
        @property
        def batch_size(self):
            return 4 if len(self.batches) < 2 else 1

    generator = Shrinking(fail_after=4)
    labels, seeds = [0] * 12, list(range(12))
    with pytest.raises(KeyboardInterrupt):
        generate_cached(generator, ImageCache(tmp_path), labels, seeds)
    assert generator.batches == [4, 4, 1, 1]
    again = Shrinking()
    assert generate_cached(again, ImageCache(tmp_path), labels, seeds).num_generated == 2 and again.batches == [2]


class Timed(Counting):
    """Moves a clock of its own: by `loading` when its batch size is first asked for, and by a second for each batch."""

    def __init__(self, monkeypatch, *, loading):
        super().__init__()
        self.now, self._loading = 0, loading
        monkeypatch.setattr("fbl_flower.generation.cache.time.monotonic", lambda: self.now)

    @property
    def batch_size(self):
        self.now, self._loading = self.now + self._loading, 0
        return 4

    def generate(self, labels, seeds):
        self.now += bool(labels)
        return super().generate(labels, seeds)


def test_after_the_deadline_no_batch_is_begun(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("fbl_flower.generation.cache.time.monotonic", lambda: next(clock))
    cache, labels, seeds = ImageCache(tmp_path), [0] * 10, list(range(10))
    generate_cached(Counting(), cache, [0], [9], deadline=50)  # on disk before: it is there although time runs out
    clock = iter(range(100))
    result = generate_cached(Counting(), cache, labels, seeds, deadline=1)
    assert (result.num_generated, result.present.tolist()) == (4, [True] * 4 + [False] * 5 + [True])
    assert torch.equal(result.images, expected([0] * 5, [0, 1, 2, 3, 9]))
    assert generate_cached(Counting(), cache, labels, seeds).num_generated == 5
    nothing = generate_cached(Counting(), ImageCache(tmp_path / "other"), labels, seeds, deadline=-1)
    assert (tuple(nothing.images.shape), nothing.present.any().item()) == ((0, 2, 3, 5), False)


@pytest.mark.parametrize(("deadline", "made"), [(1, 4), (2, 8), (3, 10)])
def test_a_batch_that_would_end_too_late_is_not_begun(tmp_path, monkeypatch, deadline, made):
    """Each batch of 4 takes a second: after n of them the clock says n, and another would end at n + 1."""
    generator = Timed(monkeypatch, loading=0)
    assert generate_cached(generator, ImageCache(tmp_path), [0] * 10, list(range(10)), deadline=deadline).num_generated == made


@pytest.mark.parametrize(("loading", "deadline", "made"), [(5, 2, 4), (5, 6, 4), (5, 7, 8), (5, 0, 0)])
def test_loading_that_takes_all_the_time_leaves_a_batch_and_is_not_done_without_time(
    tmp_path, monkeypatch, loading, deadline, made
):
    """Loading takes 5 seconds and a batch of 4 one. A budget that is shorter makes a batch in each run; one that is spent loads nothing."""
    generator = Timed(monkeypatch, loading=loading)
    found = generate_cached(generator, ImageCache(tmp_path), [0] * 10, list(range(10)), deadline=deadline)
    assert found.num_generated == made and generator.now == (loading + made // 4 if made else 0)


def test_a_kill_loses_one_batch_at_most(tmp_path):
    cache = ImageCache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        generate_cached(Counting(fail_after=2), cache, [0] * 10, list(range(10)))
    assert [cache.get(A, 0, seed) is not None for seed in range(10)] == [True] * 8 + [False] * 2
    assert generate_cached(Counting(), cache, [0] * 10, list(range(10))).num_generated == 2


def test_an_entry_appears_whole(tmp_path, monkeypatch):
    cache, replace, seen = ImageCache(tmp_path), os.replace, []

    def watch(source, target):
        seen.append((cache.path(A, 1, 2).exists(), os.path.getsize(source), os.path.dirname(source) == os.path.dirname(target)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    cache.put(A, 1, 2, picture(1, 2))
    assert seen == [(False, cache.path(A, 1, 2).stat().st_size, True)]


def test_a_failed_write_leaves_nothing_and_says_where(tmp_path, monkeypatch):
    cache = ImageCache(tmp_path)

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(GeneratorError, match=f"{tmp_path}.*No space left.*state-dir"):
        cache.put(A, 1, 2, picture(1, 2))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def hammer(folder: str, offset: int) -> int:
    """Write and read the same entries as everybody else; return how many reads were wrong."""
    cache, wrong = ImageCache(Path(folder)), 0
    for i in range(300):
        label, seed = (i + offset) % 10, (i * 7 + offset) % 30
        cache.put(A, label, seed, picture(label, seed))
        image = cache.get(A, (label + 3) % 10, seed)
        wrong += image is not None and not torch.equal(image, picture((label + 3) % 10, seed))
        wrong += cache.get(A, label, seed) is None
    return wrong


def test_threads_and_processes_write_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap_async(hammer, [(str(tmp_path), 0), (str(tmp_path), 5)])
        wrong: list[int] = []
        threads = [threading.Thread(target=lambda k=k: wrong.append(hammer(str(tmp_path), k))) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results.get(timeout=60) == [0, 0]
    assert wrong == [0, 0]
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]  # no temporary file is left
