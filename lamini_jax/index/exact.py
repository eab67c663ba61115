"""Flat keys, searched exactly: the k best keys without sorting N.

They are in the k blocks of keys with the best maxima, and only those blocks are scored again.
"""

import functools

import jax
import jax.numpy as jnp

from lamini_jax.index import _blocks, _flat, _scores
from lamini_jax.index._flat import check, init, reference, restore, save, spec  # noqa: F401 (the keys are flat)

QUERY_PARTS = 1
ALWAYS_FINDS_THE_SAME = True

# If there are more than _WIDE maxima, the best of every _FAN of them are chosen from first.
_WIDE, _FAN = 2048, 32


def find(keys_NC, query_BC, k: int, num_keys: int):
    """expert_ids_BK and scores_BK. Fastest if a block's size divides N, because then no key has to be moved."""
    return _flat.find(best_keys, keys_NC, query_BC, k, num_keys)


def best_keys(keys_NC, query_BC, k: int, count):
    """ids_BK and scores_BK among the first `count` keys of one device."""
    size = _blocks.SIZE
    if keys_NC.shape[0] <= size * k:
        best_BK, ids_BK = jax.lax.top_k(_scores.mask(_scores.scores(keys_NC, query_BC), count), k)
        return _scores.refuse(query_BC, ids_BK, best_BK, count)
    winners_BK = _best_places(_scores.mask(_blocks.maxima(keys_NC, query_BC), -(-count // size)), k)
    ids_BX = _members(winners_BK, size)
    scores_BX = jax.lax.platform_dependent(keys_NC, query_BC, ids_BX, cpu=_score_in_turn, default=_score_at_once)
    # Candidates are in the order of their ids, so that top_k, which prefers the first of equals, prefers the lowest id.
    best_BK, places_BK = jax.lax.top_k(jnp.where(ids_BX < count, scores_BX, -jnp.inf), k)
    return _scores.refuse(query_BC, jnp.take_along_axis(ids_BX, places_BK, axis=1), best_BK, count)


def _best_places(values_BN, k: int):
    """The indices of the k best, ascending; of equal values the first."""
    batch, width = values_BN.shape
    if width <= max(_WIDE, _FAN * k):
        return jnp.sort(jax.lax.top_k(values_BN, k)[1], axis=-1)
    values_BN = jnp.pad(values_BN, ((0, 0), (0, -width % _FAN)), constant_values=-jnp.inf)
    values_BLJ = values_BN.reshape(batch, -1, _FAN)
    winners_BK = _best_places(values_BLJ.max(axis=-1), k)
    candidates_BX = jnp.take_along_axis(values_BLJ, winners_BK[:, :, None], axis=1).reshape(batch, -1)
    places_BK = jnp.sort(jax.lax.top_k(candidates_BX, k)[1], axis=-1)
    return jnp.take_along_axis(_members(winners_BK, _FAN), places_BK, axis=1)


def _members(blocks_BK, size: int):
    """The ids of all members of some blocks."""
    return (blocks_BK[:, :, None] * size + jnp.arange(size)[None, None]).reshape(blocks_BK.shape[0], -1)


def _score_at_once(keys_NC, query_BC, ids_BX):
    candidates_BXC = jnp.take(keys_NC, ids_BX, axis=0, mode="clip")
    return jnp.einsum("BXC,BC->BX", candidates_BXC, query_BC, **_scores.FULL)


def _score_in_turn(keys_NC, query_BC, ids_BX):
    """A few queries at a time, because a CPU's cache holds their candidates, but not those of all."""
    return _blocks.in_groups(functools.partial(_score_at_once, keys_NC), 4, query_BC, ids_BX)
