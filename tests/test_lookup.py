"""The lookups find exactly the best keys, the lowest id first where keys are equally good; one says that it may not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamini_jax import config, lookup, lookup_kernel

jit = functools.partial(jax.jit, static_argnums=2)
exact, exact_reference = jit(lookup.exact), jit(lookup.exact_reference)
product, product_reference = jit(lookup.product), jit(lookup.product_reference)
approximate = jit(lookup.approximate)

# One block and many of them, full ones and not, fewer and more than K; numbers that nothing divides.
SIZES = [(1, 1), (7, 7), (256, 256), (1009, 1), (1009, 1009), (2048, 8), (2304, 8), (4099, 5), (70_001, 32)]
HALVES = [(1, 1), (3, 9), (10, 37), (10, 100), (64, 1), (64, 32), (301, 7)]


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
    np.testing.assert_allclose(scores_BK, reference_scores_BK, rtol=0, atol=1e-5)
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


@pytest.mark.parametrize("num_keys", [2304, 4099, 4099 + 59])
def test_needles_at_the_edges_of_blocks(num_keys):
    """All other keys score below zero, so that whatever fills up the last block would win if it counted."""
    last = (num_keys - 1) // lookup.BLOCK * lookup.BLOCK
    needles = [0, lookup.BLOCK - 1, lookup.BLOCK, 2 * lookup.BLOCK - 1, last - 1, last, num_keys - 2, num_keys - 1]
    assert len(set(needles)) == len(needles)
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


@pytest.mark.parametrize("batch", [1, 300])
def test_scores_are_never_written(batch):
    """Nothing of size B x N is in what a CPU runs."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2**17, 16), (batch, 16))]
    memory = exact.lower(*shapes, 4).compile().memory_analysis()
    assert memory.temp_size_in_bytes < (0.25 if batch > 1 else 1.25) * 4 * batch * 2**17


def normal(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("find", [lookup.exact, lookup.exact_reference], ids=["exact", "reference"])
@pytest.mark.parametrize("num_keys", [100, 4099])
def test_infinite_scores(find, num_keys):
    keys_NC = normal(0, (num_keys, 1))
    keys_NC[:, 0] = -np.inf
    keys_NC[[num_keys - 1, 70], 0] = 1, np.inf
    ids_BK, scores_BK = find(keys_NC, np.ones((1, 1), np.float32), 4)
    np.testing.assert_array_equal(ids_BK, [[70, num_keys - 1, 0, 1]])
    np.testing.assert_array_equal(scores_BK, [[np.inf, 1, -np.inf, -np.inf]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("k", [1, 5])
def test_nan_is_refused(bad, k):
    """A query with one in it selects nobody, and leaves the others alone."""
    query_BC = normal(1, (3, 16))
    flat_NC, half_keys_2SC = normal(0, (4099, 16)), normal(2, (2, 20, 8))
    finds = [(exact, flat_NC), (exact, flat_NC[:50]), (product, half_keys_2SC), (approximate, flat_NC)]
    expected = [find(keys, query_BC, k) for find, keys in finds]
    query_BC[1, 3] = bad
    for (find, keys), (expected_ids_BK, expected_scores_BK) in zip(finds, expected, strict=True):
        num_keys = 400 if find is product else len(keys)
        ids_BK, scores_BK = find(keys, query_BC, k)
        np.testing.assert_array_equal(ids_BK, np.asarray(expected_ids_BK.at[1].set(num_keys)))
        np.testing.assert_array_equal(scores_BK, np.asarray(expected_scores_BK.at[1].set(np.nan)))


@pytest.mark.parametrize("num_half, k", HALVES)
def test_product_keys(num_half, k):
    half_keys_2SC, query_BC = normal(0, (2, num_half, 8)), normal(1, (5, 16))
    ids_BK, scores_BK = product(half_keys_2SC, query_BC, k)
    expected_ids_BK, expected_scores_BK = product_reference(half_keys_2SC, query_BC, k)
    np.testing.assert_array_equal(ids_BK, expected_ids_BK)
    np.testing.assert_allclose(scores_BK, expected_scores_BK, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_half, k", HALVES)
def test_equal_product_keys_in_the_order_of_their_ids(num_half, k):
    rng = np.random.default_rng(num_half)
    half_keys_2SC = rng.integers(-1, 2, size=(2, num_half, 3)).astype(np.float32)
    query_BC = rng.integers(-2, 3, size=(5, 6)).astype(np.float32)
    query_BC[0] = 0
    np.testing.assert_array_equal(
        product(half_keys_2SC, query_BC, k)[0], product_reference(half_keys_2SC, query_BC, k)[0]
    )


def test_product_keys_are_the_sums_of_their_halves():
    """Flat keys made of all pairs find the same experts under the same ids."""
    half_keys_2SC, query_BC = normal(0, (2, 40, 8)), normal(1, (5, 16))
    pairs = [np.repeat(half_keys_2SC[0], 40, axis=0), np.tile(half_keys_2SC[1], (40, 1))]
    flat_ids_BK, _ = exact(np.concatenate(pairs, axis=1), query_BC, 16)
    np.testing.assert_array_equal(product(half_keys_2SC, query_BC, 16)[0], flat_ids_BK)


@pytest.mark.parametrize("num_keys", [40, 4099, 20_000])
def test_approximate_finds_most(num_keys):
    keys_NC, query_BC = normal(0, (num_keys, 16)), normal(1, (32, 16))
    keys_NC[-1] = 10 * query_BC[0]  # in the last bin
    ids_BK, expected_BK = approximate(keys_NC, query_BC, 8)[0], exact(keys_NC, query_BC, 8)[0]
    found = [
        len(set(ids) & set(expected)) / 8 for ids, expected in zip(ids_BK.tolist(), expected_BK.tolist(), strict=True)
    ]
    assert np.mean(found) >= lookup.RECALL - 0.05
    assert ids_BK[0, 0] == num_keys - 1


def test_training_has_the_lookups_that_find_all():
    assert set(config.LOOKUPS) == set(lookup.NAMES) - {"approximate"}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("num_keys, batch", [(1024, 1), (2048, 130), (3072, 64)])
def test_kernel(num_keys, batch, gpu):
    """The accelerators' kernel, interpreted."""
    keys_NC, query_BC = normal(0, (num_keys, 32), jnp.bfloat16), normal(1, (batch, 32), jnp.bfloat16)
    blocks_MSC = keys_NC.reshape(-1, lookup.BLOCK, 32)
    maxima_BM = lookup_kernel.block_maxima(blocks_MSC, query_BC, gpu, interpret=True)
    expected_BM = np.asarray(lookup.scores(keys_NC, query_BC)).reshape(batch, -1, lookup.BLOCK).max(axis=-1)
    np.testing.assert_allclose(maxima_BM, expected_BM, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["tpu", "cuda", "default"])
def test_lookup_on_other_devices(way, monkeypatch):
    """On top of every way to the maxima, `exact` finds what the reference finds."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arguments, **ways: ways.get(way, ways["default"])(*arguments)
    )
    kernel = functools.partial(lookup_kernel.block_maxima, interpret=True)
    monkeypatch.setattr(lookup_kernel, "block_maxima", kernel)
    keys_NC, query_BC = normal(0, (5003, 32), jnp.bfloat16), normal(1, (5, 32), jnp.bfloat16)
    np.testing.assert_array_equal(
        lookup.exact(keys_NC, query_BC, 32)[0], lookup.exact_reference(keys_NC, query_BC, 32)[0]
    )


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_kernel_is_what_accelerators_compile(platform):
    """Lowered for a device that is not here: no scores of size B x N among what it would run."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2**20, 256), (1024, 256))]
    text = exact.trace(*shapes, 32).lower(lowering_platforms=(platform,)).as_text()
    assert "custom_call" in text and "1024x1048576" not in text and "1048576x1024" not in text
