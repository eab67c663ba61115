"""Held-out questions of the generated world: the kinds in `world.FACT_KINDS` in turn."""

import itertools
import pathlib
from collections.abc import Iterator

from lamini_jax.data import world
from lamini_jax.data.datasets import digest

SIZE = None  # some kinds have fewer questions than others
ANSWERS_ARE_RANDOM = False

MOST = 4096


def fingerprint(seed: int, directory: str = "") -> str:
    """The seed and the rules of the world."""
    return f"seed{seed}-{digest(pathlib.Path(world.__file__).read_bytes())}"


def pairs(seed: int, directory: str = "") -> Iterator[tuple[str, str]]:
    """The questions with their true answers; kinds that have no more drop out."""
    per_kind = -(-MOST // len(world.FACT_KINDS))
    columns = [world.held_out(kind, per_kind, seed) for kind in world.FACT_KINDS]
    in_turn = (qa for row in itertools.zip_longest(*columns) for qa in row if qa is not None)
    for qa in itertools.islice(in_turn, MOST):
        yield qa.question, qa.answer
