"""Knowledge sampling and replay (Sec. IV.C)."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbl_flower.balancing.sampling import choose_kept, replay_due
from fbl_flower.seeding import numpy_stream


def stream(*name: str | int) -> np.random.Generator:
    return numpy_stream(0, "choice", *name)


def kept(*args: object, **options: object) -> np.ndarray:
    return choose_kept(*args, **options).kept  # type: ignore[arg-type]


def test_the_highest_losses_of_each_class_stay() -> None:
    """Class 0 keeps two of losses .1 .9 .5 .7: the second and the fourth. Class 1 keeps both of its two, class 2 one of .3 .2."""
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    losses = np.array([0.1, 0.9, 0.5, 0.7, 0.0, 0.0, 0.3, 0.2], dtype=np.float32)
    choice = choose_kept(labels, np.array([2, 2, 1]), losses=losses, rng=stream())
    assert choice.kept.tolist() == [False, True, False, True, True, True, True, False]
    assert not choice.replayed.any()
    assert choice.row(labels, None) == {"kept": 3, "kept_again": None, "replayed": 0}  # classes 0 and 2 were cut down


def test_of_equal_losses_the_first_images_stay() -> None:
    assert kept(np.zeros(4, int), np.array([2]), losses=np.ones(4), rng=stream()).tolist() == [True, True, False, False]


def test_a_class_of_which_nothing_is_to_be_kept() -> None:
    assert not kept(np.zeros(4, int), np.array([0]), losses=np.ones(4), rng=stream()).any()


def test_no_images() -> None:
    assert kept(np.zeros(0, int), np.array([0, 0]), losses=np.zeros(0), rng=stream()).shape == (0,)


def replay(num_images: int, keep: int, ratio: float, *, name: int = 0, how: str = "rank") -> tuple[np.ndarray, np.ndarray]:
    """Replay in one class whose image i has loss i; return what the first choice kept and what the replay keeps."""
    labels, losses = np.zeros(num_images, int), np.arange(num_images, dtype=float)
    before = kept(labels, np.array([keep]), losses=losses, rng=stream("first"))
    after = choose_kept(
        labels, np.array([keep]), losses=losses, rng=stream(name), kept_before=before, replay_ratio=ratio, replay=how
    )
    assert (after.replayed == (after.kept & ~before)).all()
    row = after.row(labels, before)
    assert row == {"kept": keep, "kept_again": keep - after.replayed.sum(), "replayed": after.replayed.sum()}
    return before, after.kept


@pytest.mark.parametrize("how", ["rank", "swap"])
@pytest.mark.parametrize(
    ("num_images", "keep", "ratio", "num_replayed"),
    [
        (30, 10, 0.1, 1),  # 0.1 * 10
        (90, 30, 0.1, 3),  # 0.1 * 30
        (30, 8, 0.25, 2),  # 0.25 * 8
        (30, 10, 0.0, 0),
        (30, 10, 1.0, 10),  # only images that were not kept
        (10, 8, 1.0, 2),  # only two were not kept: both come back, and the six highest losses stay
    ],
)
def test_a_replay_brings_back_a_share_of_what_was_discarded(
    num_images: int, keep: int, ratio: float, num_replayed: int, how: str
) -> None:
    before, after = replay(num_images, keep, ratio, how=how)
    assert np.flatnonzero(before).tolist() == list(range(num_images - keep, num_images))
    assert after.sum() == keep
    assert (after & ~before).sum() == num_replayed
    highest = list(range(num_images - (keep - num_replayed), num_images))
    assert np.flatnonzero(after & before).tolist() == highest


@pytest.mark.parametrize(("keep", "ratio"), [(1, 0.1), (2, 0.1), (4, 0.1), (5, 0.1), (3, 0.3), (7, 0.05)])
def test_a_small_share_is_replayed_in_the_mean(keep: int, ratio: float) -> None:
    """gamma B below 1/2 is not zero: over 2,000 replays its mean is gamma B (standard deviation of the mean at most 0.0112)."""
    numbers = [int((after & ~before).sum()) for before, after in (replay(30, keep, ratio, name=i) for i in range(2000))]
    assert abs(np.mean(numbers) - ratio * keep) < 0.05
    assert set(numbers) == {int(ratio * keep), int(ratio * keep) + 1}


def test_the_number_replayed_in_all_classes_is_the_share_of_all_kept() -> None:
    """40 classes that keep 3 of 6: gamma 0.1 replays 12 of the 120 in every replay, and none of a class that is whole."""
    labels = np.concatenate([np.repeat(np.arange(40), 6), np.full(5, 40)])
    keep = np.array([3] * 40 + [5])
    before = kept(labels, keep, losses=np.ones(len(labels)), rng=stream())
    for name in range(50):
        choice = choose_kept(labels, keep, losses=np.ones(len(labels)), rng=stream(name), kept_before=before, replay_ratio=0.1)
        assert choice.replayed.sum() == 12
        assert np.bincount(labels[choice.kept]).tolist() == keep.tolist()


def test_a_swap_leaves_the_rest_of_the_kept_images_alone() -> None:
    """Losses have turned round. "rank" with gamma 0 takes the other end, "swap" nothing; with gamma 1/2 it gives up the lower loss."""
    labels, before = np.zeros(4, int), np.array([False, False, True, True])
    losses = np.array([4.0, 3.0, 2.0, 1.0])
    ask = {"losses": losses, "rng": stream(), "kept_before": before}
    assert kept(labels, np.array([2]), **ask, replay="rank").tolist() == [True, True, False, False]
    assert kept(labels, np.array([2]), **ask, replay="swap").tolist() == before.tolist()
    swapped = kept(labels, np.array([2]), **ask, replay="swap", replay_ratio=0.5)
    assert swapped[2] and not swapped[3] and swapped[:2].sum() == 1


def test_replayed_images_are_drawn_uniformly_from_the_discarded() -> None:
    """12 images, 4 kept, gamma 1/2: 2 of the 8 discarded return, each with probability 1/4."""
    times = sum(replay(12, 4, 0.5, name=name)[1].astype(int) for name in range(2000))
    assert times[10:].tolist() == [2000, 2000]  # the two highest losses always stay
    assert times[8:10].tolist() == [0, 0]  # kept before, not among the highest now, and never drawn
    assert np.abs(times[:8] - 500).max() < 100  # standard deviation 19


def test_a_replay_ranks_by_the_current_losses() -> None:
    """Losses have turned round: without replayed images (gamma = 0) the other end is kept, though it was discarded before."""
    before = np.array([False, False, True, True])
    now = kept(np.zeros(4, int), np.array([2]), losses=np.array([4.0, 3, 2, 1]), rng=stream(), kept_before=before)
    assert now.tolist() == [True, True, False, False]


def test_random_sampling_is_uniform() -> None:
    """Two of four: each image stays in half of 2,000 draws (standard deviation 22)."""
    draws = [kept(np.zeros(4, int), np.array([2]), losses=None, rng=stream(i)) for i in range(2000)]
    assert all(draw.sum() == 2 for draw in draws)
    assert np.abs(sum(draw.astype(int) for draw in draws) - 1000).max() < 120


def slow_choice(
    labels: list[int],
    keep: list[int],
    losses: list[float],
    rng: np.random.Generator,
    before: list[bool] | None,
    ratio: float,
    how: str,
) -> list[bool]:
    """Choose one image after the other, from the definition."""
    kept: set[int] = set()
    offset = 0.0 if before is None else rng.random()
    total = 0.0  # gamma times the kept images of the classes so far
    for label, number in enumerate(keep):
        candidates = [i for i in range(len(labels)) if labels[i] == label]
        if len(candidates) <= number:
            kept.update(candidates)
            continue
        chosen: list[int] = []
        if before is not None:
            discarded = [i for i in candidates if not before[i]]
            quota = math.floor(round(total + ratio * number, 9) + offset) - math.floor(round(total, 9) + offset)
            total += ratio * number
            chosen = rng.choice(discarded, size=min(quota, len(discarded)), replace=False).tolist()

        def worth(i: int) -> tuple[bool, float]:
            return (how == "swap" and before is not None and before[i], losses[i])

        while len(chosen) < number:
            best = None
            for i in candidates:
                if i not in chosen and (best is None or worth(i) > worth(best)):
                    best = i
            assert best is not None
            chosen.append(best)
        kept.update(chosen)
    return [i in kept for i in range(len(labels))]


@given(st.data())
def test_equals_the_slow_version(data: st.DataObject) -> None:
    num_images = data.draw(st.integers(0, 40))
    labels = data.draw(st.lists(st.integers(0, 3), min_size=num_images, max_size=num_images))
    losses = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 7.0]), min_size=num_images, max_size=num_images))
    keep = [data.draw(st.integers(0, labels.count(label))) for label in range(4)]
    ratio = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    how = data.draw(st.sampled_from(["rank", "swap"]))
    before = None
    if data.draw(st.booleans()):
        before = kept(np.array(labels, dtype=int), np.array(keep), losses=None, rng=stream("before")).tolist()
    now = kept(
        np.array(labels, dtype=int), np.array(keep), losses=np.array(losses), rng=stream("now"),
        kept_before=None if before is None else np.array(before, dtype=bool), replay_ratio=ratio, replay=how,
    )  # fmt: skip
    assert now.tolist() == slow_choice(labels, keep, losses, stream("now"), before, ratio, how)
    assert [int((now & (np.array(labels, dtype=int) == label)).sum()) for label in range(4)] == keep


@pytest.mark.parametrize(
    ("server_round", "chosen_in", "period", "due"),
    [(5, 1, 5, False), (6, 1, 5, True), (9, 1, 5, True), (1, 1, 1, False), (2, 1, 1, True), (100, 1, 0, False)],
)
def test_replay_is_due_a_period_of_server_rounds_after_the_last_choice(
    server_round: int, chosen_in: int, period: int, due: bool
) -> None:
    assert replay_due(server_round=server_round, chosen_in=chosen_in, period=period) is due
