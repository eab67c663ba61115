"""Flat keys, one for each expert: what the lookups over them have in common.

On a mesh, keys_NC are in shards of equal size: N keys, and a few more that fill up the last shard and are never found.
Each device finds its own k best, and only those, B * K from each, are sent.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lamini_jax.index import _keys, _scores
from lamini_jax.runtime import sharded_tables, sharding


def check(num_experts: int, key_dim: int) -> None:
    """Accepts everything: there can be any number of flat keys, of any width."""


def spec(num_experts: int, key_dim: int) -> tuple[jax.ShapeDtypeStruct, sharding.Names]:
    """What `init` returns, and the names of its axes."""
    return jax.ShapeDtypeStruct((sharding.round_up(num_experts, "keys"), key_dim), jnp.float32), ("keys", None)


def init(seed: int, num_experts: int, key_dim: int):
    """keys_NC, random signs of unit length."""
    return _keys.random_signs(seed, *spec(num_experts, key_dim))


def save(keys_NC, num_experts: int) -> dict[str, str]:
    """A hash, by which `restore` checks that it made the same keys."""
    return _keys.fingerprint(keys_NC, num_experts)


def restore(seed: int, num_experts: int, key_dim: int, saved: Mapping[str, Any]):
    """The keys that were saved, made again. Raises UserError if they differ."""
    keys_NC = init(seed, num_experts, key_dim)
    _keys.verify(save(keys_NC, num_experts), saved)
    return keys_NC


def reference(keys_NC, query_BC, k: int, num_keys: int):
    """The k best of the first `num_keys` keys, by sorting."""
    best_BK, ids_BK = jax.lax.top_k(_scores.scores(keys_NC[:num_keys], query_BC), k)
    return ids_BK, best_BK


def find(best_keys: Callable, keys_NC, query_BC, k: int, num_keys: int):
    """The k best of the first `num_keys` keys, on whichever devices they are.

    `best_keys(keys_NC, query_BC, k, count)` finds those of one device, among its first `count` keys (a traced number).
    """
    if sharding.current_mesh() is None:
        return best_keys(keys_NC, query_BC, k, num_keys)
    axes = sharding.AXES

    def local(_, keys_NC, query_BC):
        first = jax.lax.axis_index(axes) * keys_NC.shape[0]
        count = jnp.clip(num_keys - first, 0, keys_NC.shape[0])
        ids_BK, best_BK = best_keys(keys_NC, query_BC, min(k, keys_NC.shape[0]), count)
        gather = functools.partial(jax.lax.all_gather, axis_name=axes, axis=1, tiled=True)
        ids_BX, best_BX = gather(ids_BK + first), gather(best_BK)
        best_BK, places_BK = jax.lax.top_k(best_BX, k)
        return _scores.refuse(query_BC, jnp.take_along_axis(ids_BX, places_BK, axis=1), best_BK, num_keys)

    return sharded_tables.on_shards(local, (("keys", None), ()), ())(keys_NC, query_BC)
