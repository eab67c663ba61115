"""Top-k over the keys of N experts: `find(keys, query_BC, k) -> expert_ids_BK, scores_BK`, the best first.

Scores are inner products, summed in float32. `exact` and `product` prefer the lowest id among equals, so that the
answer depends on the scores alone. They refuse a query with a NaN among the scores that decide: its ids are N, which
no expert has (a gather gives zeros for it), and its scores are NaN.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lamini_jax import lookup_kernel

# Keys that share one maximum. More of them are fewer maxima to choose from, and more keys to score again.
BLOCK = 64
# Scores that XLA may hold at once: 256 MB of them.
_SCORES = 2**26
# What `approximate` asks for: the share of a query's true K that it finds.
RECALL = 0.95


def scores(keys_NC, query_BC):
    """Inner products scores_BN, in full float32: a selection that was trained must be found again."""
    return jnp.einsum(
        "NC,BC->BN", keys_NC, query_BC, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def exact(keys_NC, query_BC, k: int, num_keys=None):
    """The k best keys without sorting N: they lie in the k blocks with the best maxima, which are scored again.

    `num_keys`, traced if need be, says how many keys count, should others follow them that only fill up a shard.
    """
    num_keys = keys_NC.shape[0] if num_keys is None else num_keys
    if keys_NC.shape[0] <= BLOCK * k:
        scores_BN = _mask(scores(keys_NC, query_BC), num_keys)
        best_BK, ids_BK = jax.lax.top_k(scores_BN, k)
        return _refuse_nan(ids_BK, best_BK, num_keys)
    maxima_BM = _mask(block_maxima(keys_NC, query_BC), -(-num_keys // BLOCK))
    # In order of their ids, so that top_k, which prefers the first of equals, prefers the lowest id.
    winners_BK = jnp.sort(jax.lax.top_k(maxima_BM, k)[1], axis=-1)
    ids_BX = (winners_BK[:, :, None] * BLOCK + jnp.arange(BLOCK)[None, None]).reshape(winners_BK.shape[0], -1)
    candidates_BXC = jnp.take(keys_NC, ids_BX, axis=0, mode="clip").astype(jnp.float32)
    scores_BX = jnp.sum(candidates_BXC * query_BC[:, None, :], axis=-1)
    best_BK, places_BK = jax.lax.top_k(jnp.where(ids_BX < num_keys, scores_BX, -jnp.inf), k)
    return _refuse_nan(jnp.take_along_axis(ids_BX, places_BK, axis=1), best_BK, num_keys)


def exact_reference(keys_NC, query_BC, k: int):
    """What `exact` computes, by sorting."""
    best_BK, ids_BK = jax.lax.top_k(scores(keys_NC, query_BC), k)
    return ids_BK, best_BK


def block_maxima(keys_NC, query_BC):
    """maxima_BM, the best score of every BLOCK keys (the last may be fewer), without ever holding all scores."""
    if keys_NC.dtype != jnp.bfloat16:  # full float32 is bound by its products, not by what it writes
        return _plain_maxima(keys_NC, query_BC)
    tiles = keys_NC.shape[0] // lookup_kernel.TILE_N * lookup_kernel.TILE_N
    maxima_BM = jax.lax.platform_dependent(
        keys_NC,
        query_BC.astype(keys_NC.dtype),
        tpu=functools.partial(lookup_kernel.block_maxima, block=BLOCK),
        cuda=functools.partial(lookup_kernel.block_maxima, block=BLOCK, gpu=True),
        default=lambda keys_NC, query_BC: _plain_maxima(keys_NC[:tiles], query_BC),
    )
    return jnp.concatenate([maxima_BM, _plain_maxima(keys_NC[tiles:], query_BC)], axis=1)


def _plain_maxima(keys_NC, query_BC):
    batch = query_BC.shape[0]
    chunk = max(_SCORES // batch // BLOCK, 1) * BLOCK
    maxima = [jnp.zeros((batch, 0))]
    for first in range(0, keys_NC.shape[0], chunk):
        scores_BN = scores(keys_NC[first : first + chunk], query_BC)
        scores_BN = jnp.where(jnp.isnan(scores_BN), jnp.inf, scores_BN)  # XLA's maxima may pass over NaN
        whole = scores_BN.shape[1] // BLOCK * BLOCK
        maxima.append(scores_BN[:, :whole].reshape(batch, -1, BLOCK).max(axis=-1))
        if whole < scores_BN.shape[1]:
            maxima.append(scores_BN[:, whole:].max(axis=-1, keepdims=True))
    return jnp.concatenate(maxima, axis=1)


def product(half_keys_2SC, query_BC, k: int):
    """The k best of the N = S^2 pairs of half-keys, pair (i, j) being expert i * S + j (Lample et al. 2019).

    A pair can be among the k best only if fewer than k pairs have both halves at least as good, so that of the halves'
    own k best a few pairs remain. Exact up to the rounding of the sum of two scores.
    """
    num_half, batch = half_keys_2SC.shape[1], query_BC.shape[0]
    query_2BC = jnp.moveaxis(query_BC.reshape(batch, 2, -1), 1, 0)
    halves = [jax.lax.top_k(scores(half_keys_2SC[i], query_2BC[i]), min(k, num_half)) for i in (0, 1)]
    (first_BK, first_ids_BK), (second_BK, second_ids_BK) = halves
    sums, pairs = [], []
    for first, last, seconds in _rectangles(k, min(k, num_half)):
        sums.append(first_BK[:, first:last, None] + second_BK[:, None, :seconds])
        pairs.append(first_ids_BK[:, first:last, None] * num_half + second_ids_BK[:, None, :seconds])
    sums, pairs = ([part.reshape(batch, -1) for part in parts] for parts in (sums, pairs))
    # Sorted by id first, so that the lowest of equals is preferred.
    pairs_BX, sums_BX = jax.lax.sort((jnp.concatenate(pairs, axis=1), jnp.concatenate(sums, axis=1)), num_keys=1)
    best_BK, places_BK = jax.lax.top_k(sums_BX, k)
    return _refuse_nan(jnp.take_along_axis(pairs_BX, places_BK, axis=1), best_BK, num_half**2)


def _rectangles(k: int, ranks: int):
    """(first, last, seconds): of the ranks first to last - 1 of one half, `seconds` ranks of the other may pair."""
    first = 0
    while first < ranks:
        last = min(max(2 * first, 1), ranks)
        yield first, last, min(k // (first + 1), ranks)
        first = last


def product_reference(half_keys_2SC, query_BC, k: int):
    """What `product` computes, from all pairs."""
    first_BC, second_BC = jnp.split(query_BC, 2, axis=1)
    sums_BSS = scores(half_keys_2SC[0], first_BC)[:, :, None] + scores(half_keys_2SC[1], second_BC)[:, None, :]
    best_BK, ids_BK = jax.lax.top_k(sums_BSS.reshape(query_BC.shape[0], -1), k)
    return ids_BK, best_BK


def approximate(keys_NC, query_BC, k: int, num_keys=None):
    """Most of the k best keys, fast on TPUs: `jax.lax.approx_max_k` (Chern et al. 2022).

    It finds RECALL of a query's k experts on average, so that RECALL^k of all queries, a fifth for 32, keep every one
    of theirs. To answer with, where that will do; a selection that is trained must be found again.
    """
    num_keys = keys_NC.shape[0] if num_keys is None else num_keys
    # Up to a whole number of its bins: it may miss what lies in a last one that is not full.
    padding = -keys_NC.shape[0] % 1024
    scores_BN = jnp.pad(scores(keys_NC, query_BC), ((0, 0), (0, padding)))
    best_BK, ids_BK = jax.lax.approx_max_k(_mask(scores_BN, num_keys), k, recall_target=RECALL)
    return _refuse_nan(ids_BK, best_BK, num_keys)


def sharded(mesh, find, keys_NC, query_BC, k: int, num_keys: int):
    """`find`, exact or approximate, over keys in equal shards on all devices of a mesh, in the order of its axes.

    Where the shards hold more than `num_keys`, the rest repeats the last key and is never found. Each device finds its
    own k best; only those, B * K from each, travel.
    """
    axes = mesh.axis_names

    def local(keys_NC, query_BC):
        first = jax.lax.axis_index(axes) * keys_NC.shape[0]
        count = jnp.clip(num_keys - first, 0, keys_NC.shape[0])
        ids_BK, best_BK = find(keys_NC, query_BC, min(k, keys_NC.shape[0]), count)
        gather = functools.partial(jax.lax.all_gather, axis_name=axes, axis=1, tiled=True)
        ids_BX, best_BX = gather(ids_BK + first), gather(best_BK)
        best_BK, places_BK = jax.lax.top_k(best_BX, k)
        return _refuse_nan(jnp.take_along_axis(ids_BX, places_BK, axis=1), best_BK, num_keys)

    everywhere = (P(axes), P())
    return jax.shard_map(local, mesh=mesh, in_specs=everywhere, out_specs=P(), check_vma=False)(keys_NC, query_BC)


FIND = {"exact": exact, "product": product, "approximate": approximate}


def _mask(scores_BN, count):
    """Only the first `count` may be found."""
    return jnp.where(jnp.arange(scores_BN.shape[1])[None] < count, scores_BN, -jnp.inf)


def _refuse_nan(ids_BK, best_BK, num_keys):
    refused_B1 = jnp.isnan(best_BK[:, :1])  # top_k takes NaN for the largest
    return jnp.where(refused_B1, num_keys, ids_BK), jnp.where(refused_B1, jnp.nan, best_BK)
