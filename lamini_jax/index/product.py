"""Product keys (Lample et al. 2019): the keys of N = H^2 experts are the pairs of two tables of H half-keys each.

Pair (i, j) is expert i * H + j, and its score is the sum of its halves' scores. Half-keys are few, so on a mesh every
device has all of them, and a part of the queries.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lamini_jax.errors import UserError
from lamini_jax.index import _keys, _scores, _top_k
from lamini_jax.runtime import sharded_tables, sharding

QUERY_PARTS = 2
ALWAYS_FINDS_THE_SAME = True


def check(num_experts: int, key_dim: int) -> None:
    """Raises UserError unless N is a square and keys can be halved."""
    if math.isqrt(num_experts) ** 2 != num_experts:
        raise UserError(f"--config.memory.num_experts={num_experts}: must be a square for product keys")
    if key_dim % 2:
        raise UserError(f"--config.router.key_dim={key_dim}: must be even for product keys")


def spec(num_experts: int, key_dim: int) -> tuple[jax.ShapeDtypeStruct, sharding.Names]:
    """What `init` returns, and the names of its axes."""
    return jax.ShapeDtypeStruct((2, math.isqrt(num_experts), key_dim // 2), jnp.float32), (None, None, None)


def init(seed: int, num_experts: int, key_dim: int):
    """half_keys_2HC, random signs of unit length."""
    return _keys.random_signs(seed, *spec(num_experts, key_dim))


def save(half_keys_2HC, num_experts: int) -> dict[str, str]:
    """A hash, by which `restore` checks that it made the same half-keys."""
    return _keys.fingerprint(half_keys_2HC, 2 * math.isqrt(num_experts))


def restore(seed: int, num_experts: int, key_dim: int, saved: Mapping[str, Any]):
    """The half-keys that were saved, made again. Raises UserError if they differ."""
    half_keys_2HC = init(seed, num_experts, key_dim)
    _keys.verify(save(half_keys_2HC, num_experts), saved)
    return half_keys_2HC


def reference(half_keys_2HC, query_BC, k: int, num_keys: int):
    """The k best of all pairs; `num_keys` is their number."""
    first_BC, second_BC = jnp.split(query_BC, 2, axis=1)
    first_BH, second_BH = _scores.scores(half_keys_2HC[0], first_BC), _scores.scores(half_keys_2HC[1], second_BC)
    sums_BN = (first_BH[:, :, None] + second_BH[:, None, :]).reshape(query_BC.shape[0], num_keys)
    best_BK, ids_BK = jax.lax.top_k(sums_BN, k)
    return ids_BK, best_BK


def find(half_keys_2HC, query_BC, k: int, num_keys: int):
    """expert_ids_BK and scores_BK, exact up to the rounding of the sum of two scores."""
    batch = query_BC.shape[0]
    query_BC = jnp.pad(query_BC, ((0, sharding.round_up(batch, "batch") - batch), (0, 0)))

    def local(_, half_keys_2HC, query_bC):
        return _best_pairs(half_keys_2HC, query_bC, k, num_keys)

    ids_BK, best_BK = sharded_tables.on_shards(local, ((), ("batch", None)), ("batch", None))(half_keys_2HC, query_BC)
    return sharding.constrain(ids_BK[:batch]), sharding.constrain(best_BK[:batch])


def _best_pairs(half_keys_2HC, query_BC, k: int, num_keys: int):
    """A pair can be among the k best only if fewer than k pairs have both halves at least as good.

    So only a few pairs of the k best of each half have to be compared.
    """
    num_half, batch = half_keys_2HC.shape[1], query_BC.shape[0]
    ranks = min(k, num_half)
    query_2BC = jnp.moveaxis(query_BC.reshape(batch, 2, -1), 1, 0)
    halves = [_top_k.top_k(_scores.scores(half_keys_2HC[i], query_2BC[i]), ranks) for i in (0, 1)]
    (first_BK, first_ids_BK), (second_BK, second_ids_BK) = halves
    sums, pairs = [], []
    for first, last, seconds in _rectangles(k, ranks):
        sums.append((first_BK[:, first:last, None] + second_BK[:, None, :seconds]).reshape(batch, -1))
        ids_BXY = first_ids_BK[:, first:last, None] * num_half + second_ids_BK[:, None, :seconds]
        pairs.append(ids_BXY.reshape(batch, -1))
    pairs_BX, sums_BX = jnp.concatenate(pairs, axis=1), jnp.concatenate(sums, axis=1)
    best_BK, ids_BK = _top_k.top_k_by_id(sums_BX, pairs_BX, k)
    return _scores.refuse(query_BC, ids_BK, best_BK, num_keys)


def _rectangles(k: int, ranks: int):
    """(first, last, seconds): ranks first to last - 1 of one half are paired with the first `seconds` of the other."""
    first = 0
    while first < ranks:
        last = min(max(2 * first, 1), ranks)
        yield first, last, min(k // (first + 1), ranks)
        first = last
