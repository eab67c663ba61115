"""Top-k over the keys of N experts: `find(keys, query_BC, k) -> expert_ids_BK, scores_BK`, the best first.

Scores are inner products, summed in float32. `exact` and `product` prefer the lowest id among equals, so that the
answer depends on the scores alone. A query with a NaN or an infinity in it is refused: its ids are N, which no expert
has (a gather gives zeros for it), and its scores are NaN. Keys are taken to be finite.
"""

import functools

import jax
import jax.numpy as jnp

from lamini_jax import lookup_kernel, sharding

# Keys that share one maximum. More of them are fewer maxima to choose from, and more keys to score again.
BLOCK = 32
# Maxima wider than this are first reduced themselves, by as many at a time.
_WIDE, _FAN = 2048, 32
# Summed in full float32: a selection that was trained must be found again.
FULL = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
# What `approximate` asks for: the share of a query's true K that it finds.
RECALL = 0.95


def scores(keys_NC, query_BC):
    """Inner products scores_BN."""
    return jnp.einsum("NC,BC->BN", keys_NC, query_BC, **FULL)


def exact(keys_NC, query_BC, k: int, num_keys=None):
    """The k best keys without sorting N: they lie in the k blocks with the best maxima, which are scored again.

    `num_keys`, traced if need be, says how many keys count, should others follow them that only fill up a shard.
    Fastest where BLOCK divides N, for then no key has to be moved.
    """
    num_keys = keys_NC.shape[0] if num_keys is None else num_keys
    if keys_NC.shape[0] <= BLOCK * k:
        best_BK, ids_BK = jax.lax.top_k(_mask(scores(keys_NC, query_BC), num_keys), k)
        return _refuse(query_BC, ids_BK, best_BK, num_keys)
    winners_BK = _best(_mask(block_maxima(keys_NC, query_BC), -(-num_keys // BLOCK)), k)
    ids_BX = _members(winners_BK, BLOCK)
    scores_BX = jax.lax.platform_dependent(keys_NC, query_BC, ids_BX, cpu=_score_in_turn, default=_score_at_once)
    # Candidates are in the order of their ids, so that top_k, which prefers the first of equals, prefers the lowest id.
    best_BK, places_BK = jax.lax.top_k(jnp.where(ids_BX < num_keys, scores_BX, -jnp.inf), k)
    return _refuse(query_BC, jnp.take_along_axis(ids_BX, places_BK, axis=1), best_BK, num_keys)


def exact_reference(keys_NC, query_BC, k: int):
    """What `exact` computes, by sorting."""
    best_BK, ids_BK = jax.lax.top_k(scores(keys_NC, query_BC), k)
    return ids_BK, best_BK


def block_maxima(keys_NC, query_BC):
    """maxima_BM, the best score of every BLOCK keys (the last may be fewer); scores of size B x N are never written.

    Three ways to the same numbers, each the fastest that was found for its kind of device.
    """
    unit, ways = BLOCK, {"cpu": _maxima_on_cpu, "default": _maxima_by_matmul}
    if keys_NC.dtype == jnp.bfloat16:  # full float32 is bound by its products, not by what it writes
        unit = lookup_kernel.TILE_N
        ways |= {"tpu": lookup_kernel.block_maxima, "cuda": functools.partial(lookup_kernel.block_maxima, gpu=True)}
    whole = keys_NC.shape[0] // unit * unit
    maxima = []
    if whole:
        blocks_MSC = keys_NC[:whole].reshape(-1, BLOCK, keys_NC.shape[1])
        maxima.append(jax.lax.platform_dependent(blocks_MSC, query_BC.astype(keys_NC.dtype), **ways))
    for first in range(whole, keys_NC.shape[0], BLOCK):
        maxima.append(scores(keys_NC[first : first + BLOCK], query_BC).max(axis=1, keepdims=True))
    return jnp.concatenate(maxima, axis=1)


def _maxima_on_cpu(blocks_MSC, query_BC):
    """As a batch of small products: XLA's CPU backend fuses their maxima with them, which is twice as fast."""
    if query_BC.shape[0] == 1:  # bound by reading the keys, once
        return jnp.einsum("MSC,BC->MSB", blocks_MSC, query_BC, **FULL).max(axis=1).T

    def maxima(query_GC):
        # Transposed first: of the product "MSC,MGC->MSG" jax 0.10.2 computes wrong maxima, of this one right ones.
        query_MCG = jnp.broadcast_to(query_GC.T[None], (blocks_MSC.shape[0], *query_GC.T.shape))
        return jnp.einsum("MSC,MCG->MSG", blocks_MSC, query_MCG, **FULL).max(axis=1).T

    return _in_groups(maxima, 256, query_BC)


def _maxima_by_matmul(blocks_MSC, query_BC):
    """Writes the scores of some queries at a time, 1 GB of them."""

    def maxima(query_GC):
        return jnp.einsum("MSC,GC->GMS", blocks_MSC, query_GC, **FULL).max(axis=2)

    return _in_groups(maxima, max(2**28 // (blocks_MSC.shape[0] * BLOCK), 1), query_BC)


def _in_groups(function, largest: int, *arrays):
    """`function` of at most so many queries at a time; the first axis of all arrays is the batch."""
    batch = arrays[0].shape[0]
    groups = -(-batch // largest)
    padded = [jnp.pad(x, ((0, -batch % groups), (0, 0))).reshape(groups, -1, x.shape[1]) for x in arrays]
    results = jax.lax.map(lambda group: function(*group), tuple(padded))
    return results.reshape(-1, results.shape[-1])[:batch]


def _best(values_BN, k: int):
    """The places of the k best, ascending; of equals the first."""
    batch, width = values_BN.shape
    if width <= max(_WIDE, _FAN * k):
        return jnp.sort(jax.lax.top_k(values_BN, k)[1], axis=-1)
    values_BN = jnp.pad(values_BN, ((0, 0), (0, -width % _FAN)), constant_values=-jnp.inf)
    values_BMS = values_BN.reshape(batch, -1, _FAN)
    winners_BK = _best(values_BMS.max(axis=-1), k)
    candidates_BX = jnp.take_along_axis(values_BMS, winners_BK[:, :, None], axis=1).reshape(batch, -1)
    places_BK = jnp.sort(jax.lax.top_k(candidates_BX, k)[1], axis=-1)
    return jnp.take_along_axis(_members(winners_BK, _FAN), places_BK, axis=1)


def _members(blocks_BK, size: int):
    """The ids of all members of some blocks."""
    return (blocks_BK[:, :, None] * size + jnp.arange(size)[None, None]).reshape(blocks_BK.shape[0], -1)


def _score_at_once(keys_NC, query_BC, ids_BX):
    candidates_BXC = jnp.take(keys_NC, ids_BX, axis=0, mode="clip")
    return jnp.einsum("BXC,BC->BX", candidates_BXC, query_BC, **FULL)


def _score_in_turn(keys_NC, query_BC, ids_BX):
    """A few queries at a time: a CPU's cache holds their candidates, and not those of all."""
    return _in_groups(functools.partial(_score_at_once, keys_NC), 4, query_BC, ids_BX)


def product(half_keys_2SC, query_BC, k: int):
    """The k best of the N = S^2 pairs of half-keys, pair (i, j) being expert i * S + j (Lample et al. 2019).

    A pair can be among the k best only if fewer than k pairs have both halves at least as good, so that of the halves'
    own k best a few pairs remain. Exact up to the rounding of the sum of two scores.
    """
    num_half, batch = half_keys_2SC.shape[1], query_BC.shape[0]
    ranks = min(k, num_half)
    query_2BC = jnp.moveaxis(query_BC.reshape(batch, 2, -1), 1, 0)
    halves = [_top_k(scores(half_keys_2SC[i], query_2BC[i]), ranks) for i in (0, 1)]
    (first_BK, first_ids_BK), (second_BK, second_ids_BK) = halves
    sums, pairs = [], []
    for first, last, seconds in _rectangles(k, ranks):
        sums.append((first_BK[:, first:last, None] + second_BK[:, None, :seconds]).reshape(batch, -1))
        ids_BXY = first_ids_BK[:, first:last, None] * num_half + second_ids_BK[:, None, :seconds]
        pairs.append(ids_BXY.reshape(batch, -1))
    pairs_BX, sums_BX = jnp.concatenate(pairs, axis=1), jnp.concatenate(sums, axis=1)
    best_BK, places_BK = _top_k(sums_BX, k)
    crowded = jnp.any(jnp.sum(sums_BX >= best_BK[:, -1:], axis=1) > k)

    def by_id():
        """Among equals at the k-th place the lowest id: sorted by id first, which takes as long as all else."""
        sorted_BX, sums_by_id_BX = jax.lax.sort((pairs_BX, sums_BX), num_keys=1)
        return jnp.take_along_axis(sorted_BX, jax.lax.top_k(sums_by_id_BX, k)[1], axis=1)

    ids_BK = jax.lax.cond(crowded, by_id, lambda: jnp.take_along_axis(pairs_BX, places_BK, axis=1))
    _, ids_BK = jax.lax.sort((-best_BK, ids_BK), num_keys=2)
    return _refuse(query_BC, ids_BK, best_BK, num_half**2)


def _top_k(scores_BN, k: int):
    """`top_k` whose results may be sliced: without the barrier, XLA would slice a sort instead, five times slower."""
    # A barrier for each result: of one for both, XLA's partitioner dies (jax 0.10.2).
    return tuple(map(jax.lax.optimization_barrier, jax.lax.top_k(scores_BN, k)))


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
    return _refuse(query_BC, ids_BK, best_BK, num_keys)


def find(name: str, keys, query_BC, k: int, num_keys: int):
    """The lookup of this name, over keys that lie where `sharding` puts them: the same experts on any mesh.

    Keys in shards are `num_keys` and a few more that fill up the last one and are never found. Each device finds its
    own k best; only those, B * K from each, travel. Half-keys are few: every device has them all, and a part of B.
    """
    if sharding.active() is None:
        return product(keys, query_BC, k) if name == "product" else _FIND[name](keys, query_BC, k, num_keys)
    if name == "product":
        return _product_sharded(keys, query_BC, k)
    axes = sharding.AXES

    def local(_, keys_NC, query_BC):
        first = jax.lax.axis_index(axes) * keys_NC.shape[0]
        count = jnp.clip(num_keys - first, 0, keys_NC.shape[0])
        ids_BK, best_BK = _FIND[name](keys_NC, query_BC, min(k, keys_NC.shape[0]), count)
        gather = functools.partial(jax.lax.all_gather, axis_name=axes, axis=1, tiled=True)
        ids_BX, best_BX = gather(ids_BK + first), gather(best_BK)
        best_BK, places_BK = jax.lax.top_k(best_BX, k)
        return _refuse(query_BC, jnp.take_along_axis(ids_BX, places_BK, axis=1), best_BK, num_keys)

    return sharding.owned(local, (("keys", None), ()), ())(keys, query_BC)


def _product_sharded(half_keys_2SC, query_BC, k: int):
    batch = query_BC.shape[0]
    query_BC = jnp.pad(query_BC, ((0, sharding.padded(batch, "batch") - batch), (0, 0)))

    def local(_, half_keys_2SC, query_bC):
        return product(half_keys_2SC, query_bC, k)

    ids_BK, best_BK = sharding.owned(local, ((), ("batch", None)), ("batch", None))(half_keys_2SC, query_BC)
    return sharding.constrain(ids_BK[:batch]), sharding.constrain(best_BK[:batch])


NAMES = ("exact", "product", "approximate")
_FIND = {"exact": exact, "approximate": approximate}


def _mask(scores_BN, count):
    """Only the first `count` may be found."""
    return jnp.where(jnp.arange(scores_BN.shape[1])[None] < count, scores_BN, -jnp.inf)


def _refuse(query_BC, ids_BK, best_BK, num_keys):
    refused_B1 = ~jnp.isfinite(query_BC).all(axis=1, keepdims=True)
    return jnp.where(refused_B1, num_keys, ids_BK), jnp.where(refused_B1, jnp.nan, best_BK)
