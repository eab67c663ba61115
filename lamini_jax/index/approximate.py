"""Flat keys, of which most of the k best are found, fast on TPUs: `jax.lax.approx_max_k` (Chern et al. 2022).

It finds RECALL of a query's k experts on average, so that only RECALL^k of all queries, a fifth for k = 32, get all of
theirs. That can be enough for answering, but not for tuning: a trained selection must be found again. Other
devices, which have no such instruction, search exactly: XLA would sort all scores there.
"""

import functools

import jax
import jax.numpy as jnp

from lamini_jax.index import _flat, _scores, exact
from lamini_jax.index._flat import check, init, reference, restore, save, spec  # noqa: F401 (the keys are flat)

QUERY_PARTS = 1
ALWAYS_FINDS_THE_SAME = False

RECALL = 0.95  # the share of a query's true k that approx_max_k is to find
_BIN = 1024


def find(keys_NC, query_BC, k: int, num_keys: int):
    """expert_ids_BK and scores_BK, most of them those of `reference`."""
    return _flat.find(best_keys, keys_NC, query_BC, k, num_keys)


def best_keys(keys_NC, query_BC, k: int, count):
    """ids_BK and scores_BK among the first `count` keys of one device."""
    ways = {"tpu": _best_of_bins, "default": exact.best_keys}
    ways = {device: functools.partial(way, k=k, count=count) for device, way in ways.items()}
    return jax.lax.platform_dependent(keys_NC, query_BC, **ways)


def _best_of_bins(keys_NC, query_BC, k: int, count):
    # Padded to a whole number of bins: approx_max_k may miss keys in a last bin that is not full.
    padding = -keys_NC.shape[0] % _BIN
    scores_BN = jnp.pad(_scores.scores(keys_NC, query_BC), ((0, 0), (0, padding)))
    best_BK, ids_BK = jax.lax.approx_max_k(_scores.mask(scores_BN, count), k, recall_target=RECALL)
    return _scores.refuse(query_BC, ids_BK, best_BK, count)
