"""The balance plan (Eq. 3)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbl_flower.balancing.plan import BalancePlan, balance_targets, cap_filling, limit_filling, make_plan, make_rich_plan
from fbl_flower.seeding import numpy_stream


def plan_of(counts: list[int], *, client: int = 0, sampling: bool = True, filling: bool = True) -> BalancePlan:
    return make_plan(np.array(counts), tie_break=numpy_stream(0, "plan", client), sampling=sampling, filling=filling)


def test_a_whole_balance_point() -> None:
    """N = 7 + 2 + 0 = 9, B = 9 / 3 = 3. Class 0 is excessive (keep 3), class 1 scarce (add 1), class 2 missing (add 3)."""
    plan = plan_of([7, 2, 0])
    assert plan.keep.tolist() == [3, 2, 0]
    assert plan.fill.tolist() == [0, 1, 3]
    assert plan.num_balanced == 9


def test_a_broken_balance_point_gives_the_extra_ones_to_the_largest_classes() -> None:
    """N = 11, B = 11 / 3 = 3.67: floor 3, and 11 - 9 = 2 classes get one more, those with 10 and 1 real images. Targets 4, 4, 3."""
    plan = plan_of([10, 1, 0])
    assert plan.keep.tolist() == [4, 1, 0]
    assert plan.fill.tolist() == [0, 3, 3]


def test_a_one_class_client_becomes_nine_tenths_synthetic() -> None:
    """N = 20 in one of ten classes, B = 2: two images stay, nine classes get two each."""
    plan = plan_of([0] * 9 + [20])
    assert plan.keep.tolist() == [0] * 9 + [2]
    assert plan.fill.tolist() == [2] * 9 + [0]


def test_fewer_images_than_classes() -> None:
    """N = 3, B = 0.6: floor 0, three classes get one: the one with images first, then two of the four missing ones."""
    plan = plan_of([0, 3, 0, 0, 0])
    assert plan.keep.tolist() == [0, 1, 0, 0, 0]
    assert sorted(plan.fill.tolist()) == [0, 0, 0, 1, 1] and plan.fill[1] == 0


@pytest.mark.parametrize("counts", [[0, 0, 0], [5]])
def test_nothing_to_balance(counts: list[int]) -> None:
    plan = plan_of(counts)
    assert plan.keep.tolist() == counts
    assert plan.fill.tolist() == [0] * len(counts)


def test_ties_are_broken_by_each_client_for_itself() -> None:
    """Counts 5, 5, 0: B = 3.33, one extra image for class 0 or 1, never for 2. Of 400 clients about half favour each."""
    targets = np.array(
        [balance_targets(np.array([5, 5, 0]), tie_break=numpy_stream(0, "plan", client)) for client in range(400)]
    )
    assert set(map(tuple, targets.tolist())) == {(4, 3, 3), (3, 4, 3)}
    assert 150 < (targets[:, 0] == 4).sum() < 250  # 200 expected, standard deviation 10


def test_ties_of_one_client_are_repeatable() -> None:
    assert [plan_of([5, 5, 5, 0, 0, 0], client=7).fill.tolist() for _ in range(3)] == [
        plan_of([5, 5, 5, 0, 0, 0], client=7).fill.tolist()
    ] * 3


def test_without_sampling_the_excessive_classes_stay_whole() -> None:
    plan = plan_of([7, 2, 0], sampling=False)
    assert (plan.keep.tolist(), plan.fill.tolist(), plan.num_balanced) == ([7, 2, 0], [0, 1, 3], 13)


def test_without_filling_the_total_shrinks() -> None:
    plan = plan_of([7, 2, 0], filling=False)
    assert (plan.keep.tolist(), plan.fill.tolist(), plan.num_balanced) == ([3, 2, 0], [0, 0, 0], 5)


def test_without_both_the_data_is_as_it_was_and_not_shared() -> None:
    counts = np.array([7, 2, 0])
    plan = make_plan(counts, tie_break=numpy_stream(0, "plan"), sampling=False, filling=False)
    assert (plan.keep.tolist(), plan.fill.tolist()) == ([7, 2, 0], [0, 0, 0])
    counts[0] = 99
    assert plan.keep[0] == 7


COUNTS = st.lists(st.integers(0, 300), min_size=1, max_size=20)


@given(COUNTS, st.integers(0, 100))
def test_properties_of_every_plan(counts: list[int], client: int) -> None:
    n = np.array(counts)
    plan = plan_of(counts, client=client)
    balanced = plan.keep + plan.fill
    assert balanced.sum() == n.sum()
    assert balanced.max() - balanced.min() <= 1
    assert (plan.keep >= 0).all() and (plan.keep <= n).all() and (plan.fill >= 0).all()
    assert not ((plan.fill > 0) & (plan.keep < n)).any()  # no class is both filled and cut
    extra = balanced > n.sum() // len(n)
    if extra.any() and not extra.all():
        assert n[extra].min() >= n[~extra].max()  # the extra ones go to the classes with most real images


@given(st.integers(0, 50), st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 100))
def test_a_balanced_client_is_unchanged(base: int, one_more: list[bool], client: int) -> None:
    counts = [base + more for more in one_more]
    plan = plan_of(counts, client=client)
    assert plan.keep.tolist() == counts
    assert not plan.fill.any()


@pytest.mark.parametrize("counts", [np.array([3, -1]), np.array([[1, 2]])])
def test_counts_that_are_none(counts: np.ndarray) -> None:
    with pytest.raises(ValueError, match="one number >= 0 for each class"):
        balance_targets(counts, tie_break=numpy_stream(0, "plan"))


def limited(counts: list[int], available: list[int]) -> BalancePlan:
    return limit_filling(plan_of(counts), np.array(counts), np.array(available), tie_break=numpy_stream(0, "plan", 0))


def test_what_cannot_be_filled_is_kept_in_real_images() -> None:
    """Plan of [9, 3, 0]: keep [4, 3, 0], fill [0, 1, 4]. Without class 2, four more real ones: class 0 has five to spare, class 1 none."""
    plan = limited([9, 3, 0], [0, 1, 0])
    assert (plan.keep.tolist(), plan.fill.tolist()) == ([8, 3, 0], [0, 1, 0])


def test_the_smaller_class_is_topped_up_first() -> None:
    """N = 20, B = 20 / 4 = 5: keep [5, 5, 1, 0], fill [0, 0, 4, 5]. Four images fewer for class 2 leave it at 1 and room only in 0 and 1."""
    plan = limited([11, 8, 1, 0], [0, 0, 0, 5])
    assert (plan.keep.tolist(), plan.fill.tolist()) == ([7, 7, 1, 0], [0, 0, 0, 5])
    plan = limited([11, 8, 1, 0], [0, 0, 0, 0])  # nine fewer: class 1 gives its three, class 0 its six
    assert (plan.keep.tolist(), plan.fill.tolist()) == ([11, 8, 1, 0], [0, 0, 0, 0])


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=12), st.floats(0, 1))
def test_limits_keep_the_total_and_never_invent_an_image(classes: list[tuple[int, int]], share: float) -> None:
    counts, available = np.array([n for n, _ in classes]), np.array([a for _, a in classes])
    plan = plan_of(counts.tolist())
    less = limit_filling(plan, counts, available, tie_break=numpy_stream(0, "plan", 0))
    assert less.num_balanced == counts.sum()
    assert (less.keep <= counts).all() and (less.keep >= plan.keep).all()
    assert (less.fill == np.minimum(plan.fill, available)).all()
    fewer = capped(plan, counts, share)
    assert (fewer <= plan.fill).all() and (fewer >= 0).all()
    assert fewer.sum() == min(plan.fill.sum(), int(share * counts.sum() + 1e-9))


def capped(plan: BalancePlan, counts: np.ndarray, share: float, client: int = 0) -> np.ndarray:
    return cap_filling(plan, counts, share=share, tie_break=numpy_stream(0, "plan", client))


def test_a_cap_takes_the_same_part_of_every_class() -> None:
    """Plan of [20] + 9 x [0]: fill 18, two of each class. At most 9 of 20: one of each; 3 of 20: three classes, not the same for all clients."""
    counts = np.array([20] + [0] * 9)
    plan = plan_of(counts.tolist())
    assert capped(plan, counts, 0.45).tolist() == [0] + [1] * 9
    assert capped(plan, counts, 1.0).tolist() == plan.fill.tolist()
    chosen = {tuple(capped(plan, counts, 0.15, client).tolist()) for client in range(20)}
    assert all(sum(one) == 3 and max(one) == 1 and one[0] == 0 for one in chosen) and len(chosen) > 10


@pytest.mark.parametrize(
    ("share", "fill"),
    [(0.0, [0, 0, 0]), (0.25, [0, 2, 2]), (0.5, [0, 6, 6]), (0.6, [0, 9, 9]), (2 / 3, [0, 12, 12]), (1.0, [0, 12, 12])],
)
def test_a_cap_is_of_the_set_that_remains(share: float, fill: list[int]) -> None:
    """A rich client with [12, 0, 0] wants 24 more and has no other real image: of 12 + f, f may be half if f is 12."""
    counts = np.array([12, 0, 0])
    plan = make_rich_plan(counts)
    assert plan.fill.tolist() == [0, 12, 12]
    assert capped(plan, counts, share).tolist() == fill
    less = limit_filling(plan, counts, np.array(fill), tie_break=numpy_stream(0, "plan", 0))
    assert less.fill.sum() <= share * less.num_balanced + 1e-9
