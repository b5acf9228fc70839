"""Named random streams from one seed: "client 3, round 7". Nothing here touches a global generator."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch


def derive(seed: int, *name: str | int) -> int:
    """Return the seed, in 0 .. 2**63 - 1, of the stream `name` under the run's `seed`.

    The same arguments give the same number on every machine; any change gives an unrelated one.
    """
    if any("/" in part for part in name if isinstance(part, str)):
        raise ValueError(f"stream name: got {name!r}; a part may not contain '/', which separates them")
    parts = [f"str:{part}" if isinstance(part, str) else f"int:{int(part)}" for part in name]
    text = "/".join([str(int(seed)), *parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_stream(seed: int, *name: str | int) -> np.random.Generator:
    """Return numpy's generator for the stream `name`."""
    return np.random.default_rng(derive(seed, *name))


def torch_stream(seed: int, *name: str | int) -> torch.Generator:
    """Return torch's CPU generator for the stream `name`."""
    return torch_generator(derive(seed, *name))


def torch_generator(seed: int) -> torch.Generator:
    """Return torch's CPU generator with a state that follows from every bit of `seed`, any whole number >= 0.

    `torch.Generator.manual_seed` keeps 32 bits: 7 and 7 + 2**32 would give the same noise, and of 60,000 image seeds two would
    agree with a probability of one third. So the Mersenne Twister's 624 words are drawn from the seed by numpy.
    """
    _check_layout()
    return _filled(seed)


NOISE = (
    "numpy SeedSequence, 624 words of torch's Mersenne Twister"  # what an image seed becomes; part of generators' fingerprints
)
_WORDS = slice(24, 24 + 8 * 624)  # bytes of the twister's words, 64 bits for each, in what `get_state` returns


def _filled(seed: int) -> torch.Generator:
    generator = torch.Generator().manual_seed(seed & 0xFFFFFFFFFFFFFFFF)
    state = generator.get_state()
    state[_WORDS] = torch.from_numpy(_words(seed).astype(np.uint64).view(np.uint8))
    return generator.set_state(state)


def _words(seed: int) -> np.ndarray:
    return np.random.SeedSequence(seed).generate_state(624)


@functools.cache
def _check_layout() -> None:
    """Compare torch's first draws with numpy's twister: a torch that stores its state in another way must not pass unnoticed."""
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": _words(1), "pos": 624}}
    high, low = twister.random_raw((700, 2)).T.astype(np.int64)
    drawn = torch.randint(2**63 - 1, (700,), generator=_filled(1)).numpy()
    expected = ((high << 32 | low).view(np.uint64) % np.uint64(2**63 - 1)).view(np.int64)
    if (drawn != expected).any():
        raise RuntimeError(
            f"torch {torch.__version__} stores the state of its random generator in another way; report this version"
        )
