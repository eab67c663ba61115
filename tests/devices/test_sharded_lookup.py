"""A lookup over sharded keys finds what it finds over the same keys on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamini_jax import lookup, sharding
from lamini_jax.config import MeshConfig

MESHES = [(8, 1), (2, 4), (1, 8)]


def find(mesh, keys_NC, query_BC, k, name="exact"):
    """Over shards of equal size, what fills up the last one being the last key again."""
    num_keys = keys_NC.shape[0]
    with sharding.use(MeshConfig(*mesh)):
        padded_NC = np.pad(keys_NC, ((0, -num_keys % 8), (0, 0)), mode="edge")
        keys_NC = sharding.put(padded_NC, "keys", None)
        return jax.jit(lambda keys, query: lookup.find(name, keys, query, k, num_keys))(keys_NC, query_BC)


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("num_keys, k", [(8, 8), (9, 3), (4099, 5), (4099, 600), (20_011, 32), (20_011, 1)])
def test_same_experts(shape, num_keys, k):
    keys_NC, query_BC = normal(0, (num_keys, 16)), normal(1, (5, 16))
    keys_NC[-1] = -4 * query_BC[0]  # which its repetitions in the last shard would be too
    query_BC[1] = -query_BC[0]
    ids_BK, scores_BK = find(shape, keys_NC, query_BC, k)
    expected_ids_BK, expected_scores_BK = lookup.exact_reference(keys_NC, query_BC, k)
    np.testing.assert_array_equal(ids_BK, expected_ids_BK)
    np.testing.assert_allclose(scores_BK, expected_scores_BK, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shape", MESHES)
def test_equals_in_the_order_of_their_ids(shape):
    rng = np.random.default_rng(0)
    keys_NC = rng.integers(-1, 2, size=(4099, 3)).astype(np.float32)
    query_BC = rng.integers(-2, 3, size=(5, 3)).astype(np.float32)
    query_BC[0] = 0
    np.testing.assert_array_equal(
        find(shape, keys_NC, query_BC, 40)[0], lookup.exact_reference(keys_NC, query_BC, 40)[0]
    )


@pytest.mark.parametrize("num_keys", [16_384, 20_003])
def test_needles_at_the_edges_of_shards(num_keys):
    shard = -(-num_keys // 8)
    needles = sorted({i for first in range(0, num_keys, shard) for i in (first, first - 1) if i >= 0} | {num_keys - 1})
    keys_NC = np.full((num_keys, 1), -1, np.float32)
    keys_NC[needles, 0] = -1 / np.arange(2, 2 + len(needles))
    ids_BK, _ = find((2, 4), keys_NC, np.ones((1, 1), np.float32), len(needles))
    np.testing.assert_array_equal(ids_BK, [needles[::-1]])


def test_nan_is_refused():
    keys_NC, query_BC = normal(0, (4099, 16)), normal(1, (3, 16))
    query_BC[1, 0] = np.nan
    ids_BK, scores_BK = find((2, 4), keys_NC, query_BC, 5)
    assert (np.isnan(scores_BK).all(axis=1) == [False, True, False]).all()
    assert ((np.asarray(ids_BK) == 4099).all(axis=1) == [False, True, False]).all()


def test_only_candidates_travel():
    """All that crosses devices is k candidates from each, whatever N."""
    with sharding.use(MeshConfig(2, 4)):
        keys = jax.ShapeDtypeStruct((2**17, 16), jnp.float32, sharding=sharding.layout(("keys",), (2**17, 16)))
        run = jax.jit(lambda keys, query: lookup.find("exact", keys, query, 32, 2**17))
        text = run.lower(keys, jax.ShapeDtypeStruct((4, 16), jnp.float32)).compile().as_text()
    travels = [line for line in text.splitlines() if "all-gather(" in line or "all-gather-start(" in line]
    assert travels and not any(word in text for word in ("all-reduce(", "all-to-all(", "collective-permute("))
    assert all("[4,256]" in line.split("all-gather")[0] for line in travels), travels


def test_approximate():
    keys_NC, query_BC = normal(0, (20_011, 16)), normal(1, (8, 16))
    ids_BK = np.asarray(find((8, 1), keys_NC, query_BC, 8, "approximate")[0])
    expected_BK = np.asarray(lookup.exact_reference(keys_NC, query_BC, 8)[0])
    assert np.mean([np.isin(expected, ids).mean() for ids, expected in zip(ids_BK, expected_BK, strict=True)]) > 0.9


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("batch", [1, 5, 16])
def test_product_keys(mesh, batch):
    """Their queries are shared out, whatever their number."""
    half_keys_2SC, query_BC = normal(0, (2, 61, 8)), normal(1, (batch, 16))
    with sharding.use(MeshConfig(*mesh)):
        ids_BK, scores_BK = jax.jit(lambda keys, query: lookup.find("product", keys, query, 7, 61**2))(
            sharding.put(half_keys_2SC), query_BC
        )
    expected_ids_BK, expected_scores_BK = lookup.product_reference(half_keys_2SC, query_BC, 7)
    np.testing.assert_array_equal(ids_BK, expected_ids_BK)
    np.testing.assert_allclose(scores_BK, expected_scores_BK, rtol=1e-6, atol=1e-5)
