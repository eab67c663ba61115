"""The lookups find exactly the best keys, the lowest id first where keys are equally good; one says that it may not."""

import contextlib
import functools
import hashlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamini_jax.errors import UserError
from lamini_jax.index import LOOKUPS, _blocks, _kernel, _scores, _top_k
from lamini_jax.index import approximate as approximate_lookup
from lamini_jax.index import exact as exact_lookup
from lamini_jax.index import product as product_lookup

ARGUMENTS = {
    "check": ["num_experts", "key_dim"],
    "spec": ["num_experts", "key_dim"],
    "init": ["seed", "num_experts", "key_dim"],
    "save": ["keys", "num_experts"],
    "restore": ["seed", "num_experts", "key_dim", "saved"],
    "find": ["keys", "query_BC", "k", "num_keys"],
    "reference": ["keys", "query_BC", "k", "num_keys"],
}


def jit(find):
    """`find` over keys that all count, compiled."""
    compiled = jax.jit(find, static_argnums=(2, 3))
    return lambda keys, query_BC, k: compiled(keys, query_BC, k, number_of(keys))


def number_of(keys):
    """How many experts they are the keys of."""
    return len(keys) if keys.ndim == 2 else keys.shape[1] ** 2


exact, exact_reference = jit(exact_lookup.find), jit(exact_lookup.reference)
product, product_reference = jit(product_lookup.find), jit(product_lookup.reference)
approximate = jit(approximate_lookup.find)
bins = jit(approximate_lookup._best_of_bins)  # what TPUs run

# One block and many of them, full ones and not, fewer and more than K; numbers that nothing divides.
SIZES = [(1, 1), (7, 7), (256, 256), (1009, 1), (1009, 1009), (2048, 8), (2304, 8), (4099, 5), (70_001, 32)]
WIDTHS = [(1, 1), (37, 1), (100, 37), (301, 7), (64, 64), (1024, 32), (1027, 32), (200, 65)]
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
    last = (num_keys - 1) // _blocks.SIZE * _blocks.SIZE
    needles = [0, _blocks.SIZE - 1, _blocks.SIZE, 2 * _blocks.SIZE - 1, last - 1, last, num_keys - 2, num_keys - 1]
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
    memory = jax.jit(exact_lookup.find, static_argnums=(2, 3)).lower(*shapes, 4, 2**17).compile().memory_analysis()
    assert memory.temp_size_in_bytes < (0.25 if batch > 1 else 1.25) * 4 * batch * 2**17


def normal(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("find", [exact_lookup.find, exact_lookup.reference], ids=["find", "reference"])
@pytest.mark.parametrize("num_keys", [100, 4099])
def test_infinite_scores(find, num_keys):
    keys_NC = normal(0, (num_keys, 1))
    keys_NC[:, 0] = -np.inf
    keys_NC[[num_keys - 1, 70], 0] = 1, np.inf
    ids_BK, scores_BK = find(keys_NC, np.ones((1, 1), np.float32), 4, num_keys)
    np.testing.assert_array_equal(ids_BK, [[70, num_keys - 1, 0, 1]])
    np.testing.assert_array_equal(scores_BK, [[np.inf, 1, -np.inf, -np.inf]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("k", [1, 5])
def test_nan_is_refused(bad, k):
    """A query with one in it selects nobody, and leaves the others alone."""
    query_BC = normal(1, (3, 16))
    flat_NC, half_keys_2HC = normal(0, (4099, 16)), normal(2, (2, 20, 8))
    finds = [(exact, flat_NC), (exact, flat_NC[:50]), (product, half_keys_2HC), (approximate, flat_NC), (bins, flat_NC)]
    expected = [find(keys, query_BC, k) for find, keys in finds]
    query_BC[1, 3] = bad
    for (find, keys), (expected_ids_BK, expected_scores_BK) in zip(finds, expected, strict=True):
        ids_BK, scores_BK = find(keys, query_BC, k)
        np.testing.assert_array_equal(ids_BK, np.asarray(expected_ids_BK.at[1].set(number_of(keys))))
        np.testing.assert_array_equal(scores_BK, np.asarray(expected_scores_BK.at[1].set(np.nan)))


@pytest.mark.parametrize("num_half, k", HALVES)
def test_product_keys(num_half, k):
    half_keys_2HC, query_BC = normal(0, (2, num_half, 8)), normal(1, (5, 16))
    ids_BK, scores_BK = product(half_keys_2HC, query_BC, k)
    expected_ids_BK, expected_scores_BK = product_reference(half_keys_2HC, query_BC, k)
    np.testing.assert_array_equal(ids_BK, expected_ids_BK)
    np.testing.assert_allclose(scores_BK, expected_scores_BK, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_half, k", HALVES)
def test_equal_product_keys_in_the_order_of_their_ids(num_half, k):
    rng = np.random.default_rng(num_half)
    half_keys_2HC = rng.integers(-1, 2, size=(2, num_half, 3)).astype(np.float32)
    query_BC = rng.integers(-2, 3, size=(5, 6)).astype(np.float32)
    query_BC[0] = 0
    np.testing.assert_array_equal(
        product(half_keys_2HC, query_BC, k)[0], product_reference(half_keys_2HC, query_BC, k)[0]
    )


@pytest.mark.parametrize("way", ["cpu", "default"])
@pytest.mark.parametrize("kind", ["different", "equal", "special"])
@pytest.mark.parametrize("width, k", WIDTHS)
def test_top_k_is_the_first_of_a_stable_sort(width, k, kind, way, monkeypatch):
    """In the order of their places and in that of ids which are not in order, of whichever device's way."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arguments, **ways: ways.get(way, ways["default"])(*arguments)
    )
    rng = np.random.default_rng(width)
    values_BN = {
        "different": rng.permuted(np.tile(np.arange(width), (5, 1)), axis=1) * 1e-3 - 1,
        "equal": rng.integers(-2, 2, (5, width)),
        "special": rng.choice([-np.inf, -3e38, -1e-37, 0, 1e-37, 3e38, np.inf], (5, width)),
    }[kind].astype(np.float32)
    ids_BN = rng.permuted(np.tile(np.arange(width, dtype=np.int32), (5, 1)), axis=1)
    places_BK = np.argsort(-values_BN, axis=1, kind="stable")[:, :k]
    by_id_BK = np.take_along_axis(ids_BN, np.lexsort((ids_BN, -values_BN), axis=1)[:, :k], axis=1)
    found = jax.jit(lambda *arrays: (_top_k.top_k(arrays[0], k), _top_k.top_k_by_id(*arrays, k)))(values_BN, ids_BN)
    for (best_BK, found_BK), expected_BK in zip(found, (places_BK, by_id_BK), strict=True):
        np.testing.assert_array_equal(found_BK, expected_BK)
        np.testing.assert_array_equal(best_BK, np.take_along_axis(values_BN, places_BK, axis=1))


def test_zeros_of_either_sign_are_equal():
    zeros_BN = np.where(np.arange(100) % 3 == 1, 0, -0.0).astype(np.float32)[None]
    np.testing.assert_array_equal(_top_k.top_k(zeros_BN, 32)[1], np.arange(32)[None])


def test_product_keys_are_the_sums_of_their_halves():
    """Flat keys made of all pairs find the same experts under the same ids."""
    half_keys_2HC, query_BC = normal(0, (2, 40, 8)), normal(1, (5, 16))
    pairs = [np.repeat(half_keys_2HC[0], 40, axis=0), np.tile(half_keys_2HC[1], (40, 1))]
    flat_ids_BK, _ = exact(np.concatenate(pairs, axis=1), query_BC, 16)
    np.testing.assert_array_equal(product(half_keys_2HC, query_BC, 16)[0], flat_ids_BK)


@pytest.mark.parametrize("num_keys", [40, 4099, 20_000])
def test_approximate_finds_most(num_keys):
    keys_NC, query_BC = normal(0, (num_keys, 16)), normal(1, (32, 16))
    keys_NC[-1] = 10 * query_BC[0]  # in the last bin
    ids_BK, expected_BK = bins(keys_NC, query_BC, 8)[0], exact(keys_NC, query_BC, 8)[0]
    found = [
        len(set(ids) & set(expected)) / 8 for ids, expected in zip(ids_BK.tolist(), expected_BK.tolist(), strict=True)
    ]
    assert np.mean(found) >= approximate_lookup.RECALL - 0.05
    assert ids_BK[0, 0] == num_keys - 1


@pytest.mark.parametrize("key_dim, batch", [(16, 1), (16, 5), (128, 64), (128, 257), (300, 130)])
@pytest.mark.parametrize("num_keys", [32, 512, 4096, 4096 + 96, 4099])
def test_maxima(num_keys, key_dim, batch):
    """Of few blocks and of many, whatever they are fused with: as they are, and as integers."""
    keys_NC, query_BC = normal(0, (num_keys, key_dim)), normal(1, (batch, key_dim))
    padding = ((0, 0), (0, -num_keys % _blocks.SIZE))
    scores_BN = np.pad(query_BC @ keys_NC.T, padding, constant_values=-np.inf)
    expected_BL = scores_BN.reshape(batch, -1, _blocks.SIZE).max(axis=2)
    np.testing.assert_allclose(jax.jit(_blocks.maxima)(keys_NC, query_BC), expected_BL, rtol=0, atol=1e-4)
    bits_BL = jax.jit(lambda *arrays: jax.lax.bitcast_convert_type(_blocks.maxima(*arrays), jnp.int32))
    maxima_BL = np.asarray(bits_BL(keys_NC, query_BC)).view(np.float32)
    np.testing.assert_allclose(maxima_BL, expected_BL, rtol=0, atol=1e-4)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("num_keys, batch", [(1024, 1), (2048, 130), (3072, 64)])
def test_kernel(num_keys, batch, gpu):
    """The accelerators' kernel, interpreted."""
    keys_NC, query_BC = normal(0, (num_keys, 32), jnp.bfloat16), normal(1, (batch, 32), jnp.bfloat16)
    keys_LJC = keys_NC.reshape(-1, _blocks.SIZE, 32)
    maxima_BL = _kernel.block_maxima(keys_LJC, query_BC, gpu, interpret=True)
    expected_BL = np.asarray(_scores.scores(keys_NC, query_BC)).reshape(batch, -1, _blocks.SIZE).max(axis=-1)
    np.testing.assert_allclose(maxima_BL, expected_BL, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["tpu", "cuda", "default"])
def test_lookup_on_other_devices(way, monkeypatch):
    """On top of every way to the maxima, `exact` finds what the reference finds."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arguments, **ways: ways.get(way, ways["default"])(*arguments)
    )
    kernel = functools.partial(_kernel.block_maxima, interpret=True)
    monkeypatch.setattr(_kernel, "block_maxima", kernel)
    keys_NC, query_BC = normal(0, (5003, 32), jnp.bfloat16), normal(1, (5, 32), jnp.bfloat16)
    found_BK, expected_BK = (
        search(keys_NC, query_BC, 32, 5003)[0] for search in (exact_lookup.find, exact_lookup.reference)
    )
    np.testing.assert_array_equal(found_BK, expected_BK)


def one_of(platform):
    """A mesh of one H100: from 0.11 on, jax has to know for which GPU it lowers a kernel."""
    device = jax.sharding.AbstractDevice
    if platform != "cuda" or "platform" not in inspect.signature(device).parameters:
        return contextlib.nullcontext()
    h100 = device(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=h100)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_kernel_is_what_accelerators_compile(platform):
    """Lowered for a device that is not here: no scores of size B x N among what it would run."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2**20, 256), (1024, 256))]
    with one_of(platform):
        traced = jax.jit(exact_lookup.best_keys, static_argnums=(2, 3)).trace(*shapes, 32, 2**20)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "custom_call" in text and "1024x1048576" not in text and "1048576x1024" not in text


@pytest.mark.parametrize("lookup", [exact_lookup, approximate_lookup])
@pytest.mark.parametrize("dtype, key_dim", [("float32", 256), ("bfloat16", 256), ("bfloat16", 96)])
def test_no_gpu_sorts_all_scores(lookup, dtype, key_dim):
    """Lowered for one, whatever the keys' format and width."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((2**20, key_dim), (64, key_dim))]
    with one_of("cuda"):
        traced = jax.jit(lookup.best_keys, static_argnums=(2, 3)).trace(*shapes, 32, 2**20)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "top_k" in text and "64x1048576x" not in text and "1048576x64x" not in text


@pytest.mark.parametrize("name", LOOKUPS.names())
def test_interface(name):
    lookup = LOOKUPS[name]
    assert lookup.QUERY_PARTS >= 1 and isinstance(lookup.ALWAYS_FINDS_THE_SAME, bool) and lookup.__doc__
    for function, expected in ARGUMENTS.items():
        arguments = list(inspect.signature(getattr(lookup, function)).parameters)
        if expected[0] == "keys":  # which have a shape and often a longer name
            assert "keys" in arguments[0]
            arguments[0] = "keys"
        assert arguments == expected, function


def test_the_lookups_that_find_all_may_train():
    finds_all = {name for name in LOOKUPS.names() if LOOKUPS[name].ALWAYS_FINDS_THE_SAME}
    assert {"exact", "product"} <= finds_all and "approximate" not in finds_all


@pytest.mark.parametrize("name", LOOKUPS.names())
def test_find_is_its_reference(name):
    """With the keys that it makes and queries as routers make them, whether or not it may miss some."""
    lookup = LOOKUPS[name]
    lookup.check(4096, 32)
    keys, query_BC = lookup.init(3, 4096, 32), normal(1, (16, 32))
    (ids_BK, scores_BK), (expected_ids_BK, expected_scores_BK) = (
        jit(function)(keys, query_BC, 8) for function in (lookup.find, lookup.reference)
    )
    assert ids_BK.shape == scores_BK.shape == (16, 8) and ids_BK.dtype == jnp.int32
    assert all(len(set(ids_K)) == 8 for ids_K in np.asarray(ids_BK).tolist())
    if lookup.ALWAYS_FINDS_THE_SAME:
        np.testing.assert_array_equal(ids_BK, expected_ids_BK)
        np.testing.assert_allclose(scores_BK, expected_scores_BK, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LOOKUPS.names())
def test_keys_are_as_described(name):
    lookup = LOOKUPS[name]
    struct, axes = lookup.spec(64**2, 16)
    keys = lookup.init(2**32 - 1, 64**2, 16)
    assert (keys.shape, keys.dtype) == (struct.shape, struct.dtype) and len(axes) == keys.ndim
    assert keys.aval == jax.core.ShapedArray(struct.shape, struct.dtype)  # what was compiled ahead is what runs
    np.testing.assert_allclose(np.linalg.norm(keys, axis=-1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    "name, num_experts, key_dim, expected",
    [
        ("exact", 4099, 37, "1416b7c559392f70318c14d375b6a73716d922432a6ad0a13fc43aa06f8a1a83"),
        ("approximate", 4099, 37, "1416b7c559392f70318c14d375b6a73716d922432a6ad0a13fc43aa06f8a1a83"),
        ("product", 67**2, 74, "1d5b054ca184965dadec14145d77180e27298055f363de7985f6a6e4bc2557c9"),
    ],
)
def test_golden_keys(name, num_experts, key_dim, expected):
    """The keys that runs before this one were tuned with.

    To renew it, copy the hash that the failure shows; all runs and exported memories are then refused, until the
    facts are tuned again.
    """
    keys = np.asarray(LOOKUPS[name].init(7, num_experts, key_dim))
    assert hashlib.sha256(keys.tobytes()).hexdigest() == expected


@pytest.mark.parametrize("name", LOOKUPS.names())
@pytest.mark.parametrize("num_experts", [16, 4096, 300**2])
def test_other_keys_are_refused(name, num_experts):
    """Another version of jax might draw other keys from the seed: then every fact would meet other experts."""
    lookup = LOOKUPS[name]
    keys = lookup.init(5, num_experts, 18)
    saved = lookup.save(keys, num_experts)
    assert saved and all(isinstance(value, str | int) for value in saved.values())
    np.testing.assert_array_equal(lookup.restore(5, num_experts, 18, {**saved, "something": "else"}), keys)
    with pytest.raises(UserError, match="this version of jax makes other random keys from the same seed") as refusal:
        lookup.restore(6, num_experts, 18, saved)
    assert "\n" not in str(refusal.value)
    for wrong in ({}, dict.fromkeys(saved, 0)):
        with pytest.raises(UserError):
            lookup.restore(5, num_experts, 18, wrong)


@pytest.mark.parametrize("name", LOOKUPS.names())
def test_what_is_saved_sees_every_bit(name):
    """Of few keys, all are hashed; of many, a sample of their rows."""
    lookup = LOOKUPS[name]
    keys = np.array(lookup.init(5, 25, 6))
    saved = lookup.save(keys, 25)
    assert lookup.save(keys.copy(), 25) == saved
    for place in range(keys.size):
        for bit in (0, 13, 31):
            other = keys.copy()
            other.view(np.uint32).flat[place] ^= np.uint32(1 << bit)
            assert lookup.save(other, 25) != saved
    assert lookup.save(keys[..., ::-1, :], 25) != saved


def test_keys_that_fill_up_a_shard_are_not_saved():
    keys_NC = exact_lookup.init(0, 4099, 16)
    padded_NC = jnp.pad(keys_NC, ((0, 5), (0, 0)), constant_values=1)
    assert exact_lookup.save(padded_NC, 4099) == exact_lookup.save(keys_NC, 4099)


@pytest.mark.parametrize("name", LOOKUPS.names())
@pytest.mark.parametrize("num_experts, key_dim", [(1, 2), (2**20, 64)])
def test_the_usual_sizes_are_accepted(name, num_experts, key_dim):
    LOOKUPS[name].check(num_experts, key_dim)


@pytest.mark.parametrize(
    "num_experts, key_dim, told",
    [
        (2**19, 64, "--config.memory.num_experts=524288: must be a square"),
        (16, 63, "--config.router.key_dim=63: must be even"),
    ],
)
def test_product_keys_have_halves(num_experts, key_dim, told):
    with pytest.raises(UserError, match=told):
        product_lookup.check(num_experts, key_dim)
