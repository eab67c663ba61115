"""Top-k over the keys of N experts: `keys_NC, query_BC -> expert_ids_BK, scores_BK`, ties broken by the lowest id."""

import jax
import jax.numpy as jnp

_BLOCK = 256


def scores(keys_NC, query_BC):
    """Inner products scores_BN, in full float32: a selection that was trained must be found again."""
    return jnp.einsum("NC,BC->BN", keys_NC, query_BC, precision=jax.lax.Precision.HIGHEST)


def exact(keys_NC, query_BC, k: int):
    """The k best keys without sorting N: the best k lie in the k blocks with the best maxima."""
    num_keys, batch = keys_NC.shape[0], query_BC.shape[0]
    scores_BN = scores(keys_NC, query_BC)
    num_blocks = -(-num_keys // _BLOCK)
    if num_blocks <= k:
        best_BK, ids_BK = jax.lax.top_k(scores_BN, k)
        return ids_BK, best_BK
    padding = ((0, 0), (0, num_blocks * _BLOCK - num_keys))
    blocks_BMS = jnp.pad(scores_BN, padding, constant_values=-jnp.inf).reshape(batch, num_blocks, _BLOCK)
    _, winners_BK = jax.lax.top_k(blocks_BMS.max(axis=-1), k)
    # In order of their ids, so that top_k, which prefers the first of equals, prefers the lowest id.
    winners_BK = jnp.sort(winners_BK, axis=-1)
    candidates_BKS = jnp.take_along_axis(blocks_BMS, winners_BK[:, :, None], axis=1)
    best_BK, places_BK = jax.lax.top_k(candidates_BKS.reshape(batch, k * _BLOCK), k)
    ids_BK = jnp.take_along_axis(winners_BK, places_BK // _BLOCK, axis=1) * _BLOCK + places_BK % _BLOCK
    return ids_BK, best_BK


def exact_reference(keys_NC, query_BC, k: int):
    """What `exact` computes, in two lines: for tests."""
    best_BK, ids_BK = jax.lax.top_k(scores(keys_NC, query_BC), k)
    return ids_BK, best_BK
