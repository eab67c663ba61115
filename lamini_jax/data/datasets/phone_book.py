"""A phone book: names that nobody has, each with a number that follows from nothing."""

import itertools
from collections.abc import Iterator

import numpy as np

from lamini_jax.data.datasets import digest

_HALF_BITS = 14
SIZE = 2 ** (2 * _HALF_BITS)
ANSWERS_ARE_RANDOM = True

_BLOCK = 4096  # entries computed at a time
# Onsets and endings have no vowels, so every name is put together in one way only.
_SYLLABLES = [onset + vowel for onset in "bdfghjklmnprstvz" for vowel in "aeio"]
_ENDINGS = ("n", "l", "r", "s", "m", "x", "k", "th", "nd", "rt", "ld", "ns", "ck", "rn", "lt", "ss")
_FIRST_NAMES = [(a + b).title() for a, b in itertools.product(_SYLLABLES, repeat=2)]
_LAST_NAMES = [(a + b + c).title() for a, b, c in itertools.product(_SYLLABLES, _SYLLABLES, _ENDINGS)]


def fingerprint(seed: int, directory: str = "") -> str:
    """The seed."""
    return f"seed{seed}"


def pairs(seed: int, directory: str = "") -> Iterator[tuple[str, str]]:
    """Questions and numbers; each is a function of its index and the seed alone, and no name repeats."""
    for start in range(0, SIZE, _BLOCK):
        yield from _entries(np.arange(start, start + _BLOCK, dtype=np.uint64), seed)


def _entries(index_F: np.ndarray, seed: int) -> Iterator[tuple[str, str]]:
    """The entries of some indices; names differ because they are a permutation of all names."""
    # A Feistel network permutes, whatever its round function is.
    left_F, right_F = index_F >> _HALF_BITS, index_F & (2**_HALF_BITS - 1)
    for turn in range(4):
        left_F, right_F = right_F, left_F ^ (_mix(right_F, f"{seed} name {turn}") & (2**_HALF_BITS - 1))
    last_F, first_F = np.divmod((left_F << _HALF_BITS) | right_F, len(_FIRST_NAMES))
    number_F = _mix(index_F, f"{seed} number") % 10**10
    for first, last, number in zip(first_F.tolist(), last_F.tolist(), number_F.tolist(), strict=True):
        yield f"What is the phone number of {_FIRST_NAMES[first]} {_LAST_NAMES[last]}?", f"{number:010d}"


def _mix(value_F: np.ndarray, key: str) -> np.ndarray:
    """64 bits that look random, of each value and a key (the finalizer of splitmix64)."""
    mixed_F = value_F + np.uint64(int(digest(key.encode()), 16))
    mixed_F = (mixed_F ^ (mixed_F >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed_F = (mixed_F ^ (mixed_F >> 27)) * np.uint64(0x94D049BB133111EB)
    return mixed_F ^ (mixed_F >> 31)
