"""Named arrays and their weighted mean."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fbl_flower.params import all_finite, to_arrays, to_state, weighted_mean


def test_weighted_mean_by_hand() -> None:
    """(1 * 1 + 3 * 5) / 4 = 4 and (1 * -2 + 3 * 2) / 4 = 1."""
    mean = weighted_mean([{"w": np.float32([1, -2])}, {"w": np.float32([5, 2])}], [1, 3])
    assert mean["w"].tolist() == [4.0, 1.0]
    assert mean["w"].dtype == np.float32


def test_whole_numbers_are_rounded_and_stay_whole() -> None:
    """BatchNorm's count of batches: (1 * 10 + 2 * 11) / 3 = 10.67 -> 11; a plain cast would give 10."""
    mean = weighted_mean([{"n": np.int64(10)[...]}, {"n": np.int64(11)[...]}], [1, 2])
    assert mean["n"] == 11
    assert isinstance(mean["n"], np.ndarray) and mean["n"].dtype == np.int64 and mean["n"].shape == ()


def test_every_dtype_is_kept_by_name() -> None:
    part = {"a": np.float64([0.1]), "b": np.float32([0.1]), "c": np.float16([0.1]), "d": np.int32([7])}
    mean = weighted_mean([part, part, part], [0.2, 0.3, 0.5])
    assert list(mean) == ["a", "b", "c", "d"]
    assert [mean[name].dtype for name in mean] == [part[name].dtype for name in part]
    assert [mean[name][0] for name in "bcd"] == [np.float32(0.1), np.float16(0.1), 7]


def test_order_of_names_in_a_part_does_not_matter() -> None:
    a = {"x": np.float32([1]), "y": np.float32([10])}
    b = {"y": np.float32([20]), "x": np.float32([3])}
    mean = weighted_mean([a, b], [1, 1])
    assert (mean["x"][0], mean["y"][0]) == (2.0, 15.0)


def test_sums_run_in_float64() -> None:
    """In float32, 2**24 + 1 is 2**24: three equal parts of it plus ones would lose the ones."""
    parts = [{"w": np.float32([2**24])}, {"w": np.float32([1])}, {"w": np.float32([1])}]
    assert weighted_mean(parts, [1, 1, 1])["w"][0] == np.float32((2**24 + 2) / 3)


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=5).flatmap(
        lambda values: st.tuples(st.just(values), st.lists(st.integers(1, 1000), min_size=len(values), max_size=len(values)))
    )
)
def test_a_mean_lies_between_and_a_common_factor_of_the_weights_does_nothing(case: tuple[list[float], list[int]]) -> None:
    values, weights = case
    parts = [{"w": np.float32([value])} for value in values]
    mean = weighted_mean(parts, weights)["w"][0]
    assert np.float32(min(values)) <= mean <= np.float32(max(values))
    assert weighted_mean(parts, [8 * w for w in weights])["w"][0] == mean


def test_a_part_of_weight_zero_does_not_count() -> None:
    assert weighted_mean([{"w": np.float32([1])}, {"w": np.float32([9])}], [2, 0])["w"][0] == 1.0


W = {"w": np.float32([1.0])}


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ([], [], "positive sum"),
        ([W, W], [0, 0], "positive sum"),
        ([W, W], [2, -1], r"got \[2, -1\]"),
        ([W, W], [1], "zip"),
        ([W, {"v": np.float32([1.0])}], [1, 1], "'w'"),
        ([W, {**W, "v": np.float32([1.0])}], [1, 1], "'w'"),
        ([W, {"w": np.float32([1.0, 2.0])}], [1, 1], "'w'"),
    ],
)
def test_what_cannot_be_averaged(parts: list[dict[str, np.ndarray]], weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_mean(parts, weights)


def test_arrays_and_state_are_inverse_and_copies() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    arrays = to_arrays(net.state_dict())
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        "0.weight": "float32", "0.bias": "float32", "1.weight": "float32", "1.bias": "float32",
        "1.running_mean": "float32", "1.running_var": "float32", "1.num_batches_tracked": "int64",
    }  # fmt: skip
    assert all(array.flags["C_CONTIGUOUS"] for array in arrays.values())
    state = to_state(arrays)
    for name, tensor in net.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor)
    old = arrays["0.weight"][0, 0, 0, 0].item()
    with torch.no_grad():
        net[0].weight.fill_(99.0)  # type: ignore[union-attr, operator]
    state["0.weight"].fill_(98.0)
    assert arrays["0.weight"][0, 0, 0, 0] == old


@pytest.mark.parametrize(("bad", "finite"), [(np.nan, False), (np.inf, False), (-np.inf, False), (3e38, True)])
def test_all_finite(bad: float, finite: bool) -> None:
    assert all_finite({"n": np.int64(3)[...], "w": np.float32([0.0, bad])}) is finite
