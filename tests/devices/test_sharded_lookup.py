"""A lookup over sharded keys finds what it finds over the same keys on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamini_jax.config import MeshConfig
from lamini_jax.index import LOOKUPS, _keys
from lamini_jax.runtime import sharding

MESHES = [(8, 1), (2, 4), (1, 8)]
jit = functools.partial(jax.jit, static_argnums=(2, 3))


def find(mesh, keys_NC, query_BC, k, name="exact"):
    """Over shards of equal size, what fills up the last one being the last key again."""
    num_keys = keys_NC.shape[0]
    with sharding.set_mesh(MeshConfig(*mesh)):
        padded_NC = np.pad(keys_NC, ((0, -num_keys % 8), (0, 0)), mode="edge")
        keys_NC = sharding.put(padded_NC, "keys", None)
        return jit(LOOKUPS[name].find)(keys_NC, query_BC, k, num_keys)


def reference(keys_NC, query_BC, k):
    """By sorting, on one device."""
    return jit(LOOKUPS["exact"].reference)(keys_NC, query_BC, k, keys_NC.shape[0])


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("num_keys, k", [(8, 8), (9, 3), (4099, 5), (4099, 600), (20_011, 32), (20_011, 1)])
def test_same_experts(shape, num_keys, k):
    keys_NC, query_BC = normal(0, (num_keys, 16)), normal(1, (5, 16))
    keys_NC[-1] = -4 * query_BC[0]  # which its repetitions in the last shard would be too
    query_BC[1] = -query_BC[0]
    ids_BK, scores_BK = find(shape, keys_NC, query_BC, k)
    expected_ids_BK, expected_scores_BK = reference(keys_NC, query_BC, k)
    np.testing.assert_array_equal(ids_BK, expected_ids_BK)
    np.testing.assert_allclose(scores_BK, expected_scores_BK, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shape", MESHES)
def test_equals_in_the_order_of_their_ids(shape):
    rng = np.random.default_rng(0)
    keys_NC = rng.integers(-1, 2, size=(4099, 3)).astype(np.float32)
    query_BC = rng.integers(-2, 3, size=(5, 3)).astype(np.float32)
    query_BC[0] = 0
    np.testing.assert_array_equal(find(shape, keys_NC, query_BC, 40)[0], reference(keys_NC, query_BC, 40)[0])


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
    with sharding.set_mesh(MeshConfig(2, 4)):
        keys = jax.ShapeDtypeStruct((2**17, 16), jnp.float32, sharding=sharding.sharding_of(("keys",), (2**17, 16)))
        query = jax.ShapeDtypeStruct((4, 16), jnp.float32)
        text = jit(LOOKUPS["exact"].find).lower(keys, query, 32, 2**17).compile().as_text()
    travels = [line for line in text.splitlines() if "all-gather(" in line or "all-gather-start(" in line]
    assert travels and not any(word in text for word in ("all-reduce(", "all-to-all(", "collective-permute("))
    assert all("[4,256]" in line.split("all-gather")[0] for line in travels), travels


def test_approximate():
    keys_NC, query_BC = normal(0, (20_011, 16)), normal(1, (8, 16))
    ids_BK = np.asarray(find((8, 1), keys_NC, query_BC, 8, "approximate")[0])
    expected_BK = np.asarray(reference(keys_NC, query_BC, 8)[0])
    assert np.mean([np.isin(expected, ids).mean() for ids, expected in zip(ids_BK, expected_BK, strict=True)]) > 0.9


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("batch", [1, 5, 16])
def test_product_keys(mesh, batch):
    """Their queries are shared out, whatever their number."""
    half_keys_2HC, query_BC = normal(0, (2, 61, 8)), normal(1, (batch, 16))
    with sharding.set_mesh(MeshConfig(*mesh)):
        ids_BK, scores_BK = jit(LOOKUPS["product"].find)(sharding.put(half_keys_2HC), query_BC, 7, 61**2)
    expected_ids_BK, expected_scores_BK = LOOKUPS["product"].reference(half_keys_2HC, query_BC, 7, 61**2)
    np.testing.assert_array_equal(ids_BK, expected_ids_BK)
    np.testing.assert_allclose(scores_BK, expected_scores_BK, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", LOOKUPS.names())
@pytest.mark.parametrize("num_experts", [67**2, 64**2, 300**2])
def test_same_keys(name, num_experts):
    """A file that was written on one mesh is good on any other: the same keys, and the same hash of them."""
    lookup = LOOKUPS[name]
    alone = lookup.init(7, num_experts, 18)
    saved = lookup.save(alone, num_experts)
    for mesh in MESHES:
        with sharding.set_mesh(MeshConfig(*mesh)):
            struct, axes = lookup.spec(num_experts, 18)
            keys = lookup.init(7, num_experts, 18)
            assert (keys.shape, keys.dtype) == (struct.shape, struct.dtype)
            assert keys.sharding.is_equivalent_to(sharding.sharding_of(axes, struct.shape), keys.ndim)
            assert lookup.save(keys, num_experts) == saved
            restored = lookup.restore(7, num_experts, 18, saved)
            np.testing.assert_array_equal(np.asarray(restored)[: alone.shape[0]], alone)


def test_only_a_sample_of_the_keys_travels():
    """Saving shows that the keys are the same without collecting them."""
    with sharding.set_mesh(MeshConfig(2, 4)):
        struct, axes = LOOKUPS["exact"].spec(2**20, 16)
        keys = jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding.sharding_of(axes, struct.shape))
        compiled = _keys.sample.lower(keys, jax.ShapeDtypeStruct((4096,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20 * 16 * 4 / 8
    assert "all-gather" not in compiled.as_text() and "[1048576,16]" not in compiled.as_text()
