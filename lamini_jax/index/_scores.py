"""Scores of keys, and which keys may be found at all: what all lookups have in common."""

import jax
import jax.numpy as jnp

# Summed in full float32, because a trained selection must be found again.
FULL = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}


def scores(keys_NC, query_BC):
    """Inner products scores_BN."""
    return jnp.einsum("NC,BC->BN", keys_NC, query_BC, **FULL)


def mask(scores_BN, count):
    """The scores with only the first `count` left; the others are minus infinity."""
    if isinstance(count, int) and count >= scores_BN.shape[1]:
        return scores_BN  # without a pass over them
    return jnp.where(jnp.arange(scores_BN.shape[1])[None] < count, scores_BN, -jnp.inf)


def refuse(query_BC, ids_BK, best_BK, num_keys):
    """The ids and scores that were found; but for queries that are not finite, ids that no expert has, and NaN."""
    refused_B1 = ~jnp.isfinite(query_BC).all(axis=1, keepdims=True)
    return jnp.where(refused_B1, num_keys, ids_BK), jnp.where(refused_B1, jnp.nan, best_BK)
