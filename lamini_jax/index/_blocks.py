"""The best score of every block of keys, without ever writing scores of size B x N.

Letters: L blocks of J keys each, M keys in several blocks, C width of a key, B queries, G of them at a time.
"""

import functools
import math

import jax
import jax.numpy as jnp

from lamini_jax.index import _kernel, _scores

# Keys in a block. With larger blocks there are fewer maxima to choose from, and more keys to score again.
SIZE = 32

# Blocks, and multiplications, in one product of a CPU's batch, at most: with more multiplications, XLA does not fuse it
# with its maxima, and with more blocks it computes wrong ones in a batch of one (jax 0.10.2).
_BLOCKS, _MULTIPLICATIONS = 16, 2**22


def maxima(keys_NC, query_BC):
    """maxima_BL, the best score in every block of SIZE keys (the last block may be smaller).

    There are three ways to the same numbers, each the fastest that was found for its kind of device.
    """
    unit, ways = SIZE, {"cpu": _maxima_on_cpu, "default": _maxima_by_matmul}
    if keys_NC.dtype == jnp.bfloat16:  # with float32, the products take longest, not writing the scores
        unit = _kernel.TILE_N
        ways |= {"tpu": _kernel.block_maxima}
        if keys_NC.shape[1] in _kernel.GPU_WIDTHS:
            ways |= {"cuda": functools.partial(_kernel.block_maxima, gpu=True)}
    whole = keys_NC.shape[0] // unit * unit
    parts = []
    if whole:
        keys_LJC = keys_NC[:whole].reshape(-1, SIZE, keys_NC.shape[1])
        parts.append(jax.lax.platform_dependent(keys_LJC, query_BC.astype(keys_NC.dtype), **ways))
    for first in range(whole, keys_NC.shape[0], SIZE):
        parts.append(_scores.scores(keys_NC[first : first + SIZE], query_BC).max(axis=1, keepdims=True))
    return jnp.concatenate(parts, axis=1)


def _maxima_on_cpu(keys_LJC, query_BC):
    """As a batch of small products, which XLA's CPU backend fuses with their maxima: that is twice as fast."""
    num_blocks, _, key_dim = keys_LJC.shape
    if query_BC.shape[0] == 1:  # reading the keys takes longest, and here they are read once
        return jnp.einsum("LJC,BC->LJB", keys_LJC, query_BC, **_scores.FULL).max(axis=1).T

    def maxima_of(query_GC):
        # Several blocks in each product, because the queries are copied for every one; a power of two that divides L.
        most = max(min(_MULTIPLICATIONS // (SIZE * query_GC.size), _BLOCKS), 1)
        keys_LMC = keys_LJC.reshape(-1, SIZE * math.gcd(num_blocks, 1 << most.bit_length() - 1), key_dim)
        # Transposed first: for the product "LMC,LGC->LMG" jax 0.10.2 computes wrong maxima, for this one right ones.
        query_LCG = jnp.broadcast_to(query_GC.T[None], (keys_LMC.shape[0], *query_GC.T.shape))
        scores_LMG = jnp.einsum("LMC,LCG->LMG", keys_LMC, query_LCG, **_scores.FULL)
        window = (1, SIZE, 1)  # with a reshape and a maximum instead, they would not be fused
        maxima_LMG = jax.lax.reduce_window(scores_LMG, -jnp.inf, jax.lax.max, window, window, "VALID")
        return maxima_LMG.reshape(num_blocks, -1).T

    return in_groups(maxima_of, 256, query_BC)


def _maxima_by_matmul(keys_LJC, query_BC):
    """Writes the scores of a few queries at a time, about 1 GB."""

    def maxima_of(query_GC):
        return jnp.einsum("LJC,GC->GLJ", keys_LJC, query_GC, **_scores.FULL).max(axis=2)

    return in_groups(maxima_of, max(2**28 // (keys_LJC.shape[0] * SIZE), 1), query_BC)


def in_groups(function, largest: int, *arrays):
    """`function` of at most `largest` queries at a time; the first axis of all arrays is the batch."""
    batch = arrays[0].shape[0]
    groups = -(-batch // largest)
    padded = [jnp.pad(x, ((0, -batch % groups), (0, 0))).reshape(groups, -1, x.shape[1]) for x in arrays]
    results = jax.lax.map(lambda group: function(*group), tuple(padded))
    return results.reshape(-1, results.shape[-1])[:batch]
