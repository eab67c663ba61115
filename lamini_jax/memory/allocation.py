"""Which experts a new fact gets: those that no fact has, as long as there are any.

A fact whose experts are its own can be added, changed and forgotten without any change to what another one has.
"""

import numpy as np

# A fact that does not hold gets so many times as many experts, in at most so many rounds.
MORE, ROUNDS = 4, 3


def give_out(loads_N: np.ndarray, count: int, top_k: int) -> np.ndarray:
    """expert_ids_FK for `count` new facts, given how many facts have each expert: the least loaded, lowest ids first.

    The experts of one fact are distinct; there are at least `top_k`.
    """
    loads_N = loads_N.copy()
    needed, given = count * top_k, []
    while needed > 0:
        # Of equally loaded experts all get one more fact before any of them gets two.
        least_X = np.flatnonzero(loads_N == loads_N.min())[:needed]
        loads_N[least_X] += 1
        given.append(least_X)
        needed -= least_X.size
    ids_FK = np.concatenate(given).astype(np.int32).reshape(count, top_k) if count else np.zeros((0, top_k), np.int32)
    return _distinct(ids_FK, loads_N.size)


def _distinct(ids_FK: np.ndarray, num_experts: int) -> np.ndarray:
    """The same with another expert in place of one that a fact has twice, which only a nearly full memory gives out."""
    for ids_K in ids_FK:
        seen: set[int] = set()
        for place, expert in enumerate(ids_K.tolist()):
            while expert in seen:
                expert = (expert + 1) % num_experts
            seen.add(expert)
            ids_K[place] = expert
    return ids_FK
