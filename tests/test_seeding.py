"""Named random streams."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fbl_flower.seeding import derive, numpy_stream, torch_generator, torch_stream

NAMES = st.lists(st.one_of(st.integers(0, 50), st.text("abc", min_size=1, max_size=3)), max_size=3)


def test_derived_seeds_never_change() -> None:
    """First eight bytes of sha256("0") and of sha256("3/str:train/int:2/int:7"), big-endian, halved: `sha256sum` agrees."""
    assert derive(0) == 0x5FECEB66FFC86F38 >> 1
    assert derive(3, "train", 2, 7) == 0xC34B9D61F7BDA84B >> 1


@given(st.integers(0, 2**62), NAMES)
def test_derived_seeds_are_within_63_bits_and_repeatable(seed: int, name: list[int | str]) -> None:
    assert 0 <= derive(seed, *name) < 2**63
    assert derive(seed, *name) == derive(seed, *name)


@given(st.integers(0, 5), NAMES, st.integers(0, 5), NAMES)
def test_another_name_is_another_stream(seed: int, name: list[int | str], other_seed: int, other: list[int | str]) -> None:
    assert (derive(seed, *name) == derive(other_seed, *other)) == ((seed, name) == (other_seed, other))


@pytest.mark.parametrize(("one", "two"), [((1,), ("1",)), ((1, 2), (12,)), (("a", "b"), ("ab",)), (("a", 1, 2), ("a", 2, 1))])
def test_names_that_look_alike_are_kept_apart(one: tuple[int | str, ...], two: tuple[int | str, ...]) -> None:
    assert derive(0, *one) != derive(0, *two)


def test_streams_repeat_and_differ_by_name() -> None:
    assert numpy_stream(0, "a").integers(2**60, size=5).tolist() == numpy_stream(0, "a").integers(2**60, size=5).tolist()
    assert numpy_stream(0, "a").integers(2**60) != numpy_stream(0, "b").integers(2**60)
    assert torch.equal(torch.rand(5, generator=torch_stream(0, "a", 1)), torch.rand(5, generator=torch_stream(0, "a", 1)))
    assert not torch.equal(torch.rand(5, generator=torch_stream(0, "a", 1)), torch.rand(5, generator=torch_stream(0, "a", 2)))


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    numpy_stream(0, "x").random(3)
    torch.rand(3, generator=torch_stream(0, "x"))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]


@given(st.integers(0, 2**63 - 1), st.integers(0, 62))
def test_every_bit_of_a_seed_counts(seed: int, bit: int) -> None:
    one, other = torch_generator(seed), torch_generator(seed ^ (1 << bit))
    assert not torch.equal(torch.randn(8, generator=one), torch.randn(8, generator=other))


def test_torchs_generator_draws_what_numpys_twister_draws() -> None:
    """The state is numpy's, word by word: the first 1,000 uniform numbers of 24 bits agree."""
    twister = np.random.MT19937()
    key = np.random.SeedSequence(123).generate_state(624)
    twister.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": 624}}
    expected = (twister.random_raw(1000) % 2**24) / 2**24
    assert torch.rand(1000, generator=torch_generator(123)).tolist() == expected.tolist()


def test_the_same_seed_gives_the_same_numbers() -> None:
    assert torch.equal(
        torch.randn(9, generator=torch_generator(2**62 + 1)), torch.randn(9, generator=torch_generator(2**62 + 1))
    )
