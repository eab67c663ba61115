"""The lookup finds exactly the best keys, the lowest id first where keys are equally good."""

import functools

import jax
import numpy as np
import pytest

from lamini_jax import lookup

exact = functools.partial(jax.jit, static_argnums=2)(lookup.exact)
exact_reference = functools.partial(jax.jit, static_argnums=2)(lookup.exact_reference)

# Blocks are of 256 keys: one and many of them, full ones and not, fewer and more than K.
SIZES = [(1, 1), (7, 7), (256, 256), (1009, 1), (1009, 1009), (2048, 8), (2304, 8), (4099, 5), (70_001, 32)]


def by_sorting(keys_NC, query_BC, k):
    scores_BN = query_BC @ keys_NC.T
    ids_BK = np.argsort(-scores_BN, axis=1, kind="stable")[:, :k]
    return ids_BK, np.take_along_axis(scores_BN, ids_BK, axis=1)


@pytest.mark.parametrize("num_keys, k", SIZES)
def test_random_keys(num_keys, k):
    rng = np.random.default_rng(num_keys)
    keys_NC = rng.normal(size=(num_keys, 16)).astype(np.float32)
    query_BC = rng.normal(size=(5, 16)).astype(np.float32)
    ids_BK, scores_BK = exact(keys_NC, query_BC, k)
    reference_ids_BK, reference_scores_BK = exact_reference(keys_NC, query_BC, k)
    np.testing.assert_array_equal(ids_BK, reference_ids_BK)
    np.testing.assert_array_equal(scores_BK, reference_scores_BK)
    sorted_scores_BK = by_sorting(keys_NC.astype(np.float64), query_BC.astype(np.float64), k)[1]
    np.testing.assert_allclose(scores_BK, sorted_scores_BK, rtol=0, atol=1e-5)
    assert all(len(set(ids_K)) == k for ids_K in np.asarray(ids_BK).tolist())


@pytest.mark.parametrize("num_keys, k", SIZES)
def test_equal_keys_in_the_order_of_their_ids(num_keys, k):
    rng = np.random.default_rng(num_keys)
    keys_NC = rng.integers(-1, 2, size=(num_keys, 4)).astype(np.float32)  # at most 81 different ones
    query_BC = rng.integers(-2, 3, size=(5, 4)).astype(np.float32)
    query_BC[0] = 0  # to which all keys are equal
    ids_BK, scores_BK = exact(keys_NC, query_BC, k)
    expected_ids_BK, expected_scores_BK = by_sorting(keys_NC, query_BC, k)
    np.testing.assert_array_equal(ids_BK, expected_ids_BK)
    np.testing.assert_array_equal(scores_BK, expected_scores_BK)
    np.testing.assert_array_equal(exact_reference(keys_NC, query_BC, k)[0], expected_ids_BK)


@pytest.mark.parametrize("num_keys", [2304, 4099])
def test_needles_at_the_edges_of_blocks(num_keys):
    """All other keys score below zero, so that whatever fills up the last block would win if it counted."""
    needles = [0, 255, 256, 511, 512, num_keys - 257, num_keys - 2, num_keys - 1]
    keys_NC = np.full((num_keys, 1), -1, np.float32)
    keys_NC[needles, 0] = -1 / np.arange(2, 2 + len(needles))
    for k in (len(needles), len(needles) - 1, 3, 1):
        ids_BK, _ = exact(keys_NC, np.ones((1, 1), np.float32), k)
        np.testing.assert_array_equal(ids_BK, [needles[::-1][:k]])


def test_equal_keys_in_blocks_of_different_maxima():
    """Neither the best block nor the first one decides about equals in both: their ids do."""
    keys_NC = np.zeros((2304, 1), np.float32)
    keys_NC[[2000, 300], 0] = 3, 2
    keys_NC[[2001, 301, 302, 700], 0] = 1
    for k, expected in ((6, [2000, 300, 301, 302, 700, 2001]), (8, [2000, 300, 301, 302, 700, 2001, 0, 1])):
        np.testing.assert_array_equal(exact(keys_NC, np.ones((1, 1), np.float32), k)[0], [expected])


def test_all_of_the_best_in_one_block():
    keys_NC = np.linspace(1, 0, 4099, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(exact(keys_NC, np.ones((1, 1), np.float32), 9)[0], [np.arange(9)])
    np.testing.assert_array_equal(exact(keys_NC, -np.ones((1, 1), np.float32), 9)[0], [4098 - np.arange(9)])
