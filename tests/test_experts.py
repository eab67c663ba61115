"""The array of experts: rows of seed and id alone, which add exactly nothing until somebody trains them."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamini_jax.backbone import transformer
from lamini_jax.config import MemoryConfig
from lamini_jax.memory import experts

SHAPE = experts.expert_shape(helpers.BACKBONE, MemoryConfig(num_layers=2, target="down_proj"))


def random_rows(count, shape=SHAPE, seed=0):
    return helpers.parts(np.random.default_rng(seed).normal(size=(count, shape.floats)).astype(np.float32), shape)


def at(rows, index):
    return jax.tree.map(lambda x: x[index], rows)


@pytest.mark.parametrize("target, widths", [("down_proj", (48, 32)), ("o_proj", (32, 32)), ("gate_proj", (32, 48))])
def test_row_shape_is_that_of_the_target(target, widths):
    assert experts.expert_shape(helpers.BACKBONE, MemoryConfig(num_layers=3, target=target)) == (3, *widths)
    assert SHAPE.floats == 2 * (48 + 32)


def test_rows_depend_on_seed_and_id_alone():
    experts_NR = helpers.flat(experts.init(np.uint32(0), SHAPE, 5000))
    assert experts_NR.shape == (5000, SHAPE.floats) and experts_NR.dtype == np.float32
    for count in (1, 100):
        assert helpers.same_bits(helpers.flat(experts.init(np.uint32(0), SHAPE, count)), experts_NR[:count])
    other_NR = helpers.flat(experts.init(np.uint32(1), SHAPE, 5000))
    assert np.unique(np.concatenate([experts_NR, other_NR]), axis=0).shape[0] == 10_000


def test_down_starts_random_and_up_at_zero():
    parts = experts.init(np.uint32(0), SHAPE, 1000)
    down = np.asarray(parts["down"])
    assert not np.asarray(parts["up"]).any()
    assert abs(down).max() <= (3 / SHAPE.input_width) ** 0.5
    assert down.mean() == pytest.approx(0, abs=1e-3)
    assert down.var() == pytest.approx(1 / SHAPE.input_width, rel=0.02)


def test_gather_gives_zeros_for_what_is_out_of_range():
    experts_NR = random_rows(10)
    found = experts.gather(experts_NR, jnp.array([[3, 10], [0, 2**31 - 1]]))
    assert helpers.same_bits(at(found, np.s_[:, 0]), at(experts_NR, np.array([3, 0])))
    assert not helpers.flat(found)[:, 1].any()


def test_gather_trained_knows_the_trained_rows_and_no_others():
    ids_S = jnp.array([2, 5, 7, 4000], jnp.int32)
    experts_NR = random_rows(5000)
    asked = jnp.array([[2, 4000, 7, 5], [0, 3, 6, 4999]])
    found = experts.gather_trained(ids_S, at(experts_NR, ids_S), asked)
    assert helpers.same_bits(at(found, 0), experts.gather(experts_NR, asked[0]))
    assert helpers.flat(found).shape == (2, 4, SHAPE.floats) and not helpers.flat(found)[1].any()


def test_adapter_by_hand():
    """W x + sum_k gate_k up_k (down_k . x), in each layer and for each question."""
    rng = np.random.default_rng(0)
    rows_BKR = helpers.flat(random_rows(6)).reshape(2, 3, -1)
    gates_BK = jnp.asarray(rng.random((2, 3)), jnp.float32)
    x_BTI = rng.normal(size=(2, 5, 48)).astype(np.float32)
    weight_IO = rng.normal(size=(48, 32)).astype(np.float32)
    down, up = experts.adapter(helpers.parts(rows_BKR, SHAPE), gates_BK, "down_proj")["down_proj"]
    for layer in range(2):
        found = x_BTI @ weight_IO + (x_BTI @ np.swapaxes(down[layer], 1, 2)) @ np.asarray(up[layer])
        for question in range(2):
            expected = x_BTI[question].astype(np.float64) @ weight_IO
            for k in range(3):
                row = np.asarray(rows_BKR[question, k], np.float64)
                u = row[48 * layer : 48 * (layer + 1)]
                v = row[96 + 32 * layer : 96 + 32 * (layer + 1)]
                expected += float(gates_BK[question, k]) * np.outer(x_BTI[question] @ u, v)
            np.testing.assert_allclose(found[question], expected, atol=1e-4)


@jax.jit
def adapted_logits(model, tokens_BT, adapter):
    parts = model.decoder, model.params
    hidden_BTD, _ = transformer.prefix(*parts, tokens_BT)
    hidden_BTD, _ = transformer.suffix(*parts, hidden_BTD, adapter=adapter)
    return transformer.unembed(*parts, hidden_BTD)


@pytest.mark.parametrize("target", ["down_proj", "o_proj"])
def test_off_is_off(model, target):
    """Untrained experts, and experts that serving does not keep, leave every bit of the logits as it is."""
    shape = experts.expert_shape(helpers.BACKBONE, MemoryConfig(num_layers=2, target=target))
    tokens_BT = np.random.default_rng(0).integers(256, size=(3, 21)).astype(np.int32)
    ids_BK, gates_BK = jnp.arange(24).reshape(3, 8), jnp.full((3, 8), 8**-0.5)
    bare = adapted_logits(model, tokens_BT, None)

    def logits(rows_BKR):
        return np.asarray(adapted_logits(model, tokens_BT, experts.adapter(rows_BKR, gates_BK, target)))

    experts_NR = experts.init(np.uint32(0), shape, 64)
    assert helpers.same_bits(logits(experts.gather(experts_NR, ids_BK)), bare)
    trained_SR = random_rows(2, shape)
    assert helpers.same_bits(logits(experts.gather_trained(jnp.array([30, 40]), trained_SR, ids_BK)), bare)
    # A trained expert of the second question changes that question's logits and nobody else's.
    changed = logits(experts.gather_trained(jnp.array([12, 40]), trained_SR, ids_BK))
    assert helpers.same_bits(changed[[0, 2]], np.asarray(bare)[[0, 2]])
    assert (changed[1] != np.asarray(bare)[1]).any(axis=-1).all()
