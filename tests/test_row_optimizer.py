"""Rows are optimized as if each were a model of its own, with its own state and its own count of steps."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamini_jax import bank, row_optimizer
from lamini_jax.config import OPTIMIZERS

SHAPE = bank.RowShape(layers=2, input_width=5, output_width=3)
# The slots of each step; 6 is out of range and fills up.
STEPS = [[0, 2, 5, 6], [1, 2, 6, 6], [0, 1, 2, 4], [6, 6, 6, 6], [2, 4, 5, 6]]
NUM_SLOTS = 6


def draw(seed, count):
    return np.random.default_rng(seed).normal(size=(count, SHAPE.floats)).astype(np.float32)


def row_parts(row_R):
    return {"down": jnp.asarray(row_R[:10].reshape(2, 5)), "up": jnp.asarray(row_R[10:].reshape(2, 3))}


def flat(parts):
    return np.concatenate([np.asarray(parts["down"]).ravel(), np.asarray(parts["up"]).ravel()])


def state_of(slots, slot):
    return jax.tree.map(lambda leaf: np.asarray(leaf[slot]), slots.state)


@pytest.fixture(params=OPTIMIZERS)
def tx(request):
    return row_optimizer.make(request.param, 0.01)


def test_each_row_by_itself(tx):
    """Several steps of different rows, against optax on one row at a time."""
    rows = draw(0, NUM_SLOTS)
    slots = row_optimizer.init(tx, np.arange(NUM_SLOTS), SHAPE)
    expected_rows = [row_parts(row) for row in rows]
    expected_states = [tx.init(parts) for parts in expected_rows]
    update = jax.jit(
        lambda slots, slots_U, rows, gradients: row_optimizer.update(tx, slots, slots_U, rows, gradients, SHAPE)
    )
    update_one = jax.jit(tx.update)
    for step, slots_U in enumerate(STEPS):
        gradients = draw(step + 1, len(slots_U))
        touched = [slot for slot in slots_U if slot < NUM_SLOTS]
        before = [state_of(slots, slot) for slot in range(NUM_SLOTS)]
        given = np.concatenate([rows, np.ones((1, SHAPE.floats), np.float32)])[slots_U]
        new_rows, slots = update(slots, jnp.array(slots_U), given, gradients)
        for place, slot in enumerate(slots_U):
            if slot < NUM_SLOTS:
                rows[slot] = new_rows[place]
                parts = expected_rows[slot]
                updates, expected_states[slot] = update_one(row_parts(gradients[place]), expected_states[slot], parts)
                expected_rows[slot] = jax.tree.map(jnp.add, parts, updates)
        for slot in range(NUM_SLOTS):
            np.testing.assert_allclose(rows[slot], flat(expected_rows[slot]), rtol=1e-5, atol=1e-7)
            state = state_of(slots, slot)
            assert jax.tree.structure(state) == jax.tree.structure(expected_states[slot])
            for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(expected_states[slot]), strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
            assert helpers.same_bits(state, before[slot]) or slot in touched


def test_a_row_counts_its_own_steps():
    tx = row_optimizer.make("adam", 0.01)
    slots = row_optimizer.init(tx, np.arange(NUM_SLOTS), SHAPE)
    for slots_U in STEPS:
        rows = draw(0, len(slots_U))
        _, slots = row_optimizer.update(tx, slots, jnp.array(slots_U), rows, rows, SHAPE)
    np.testing.assert_array_equal(slots.state[0].count, [2, 2, 4, 0, 2, 2])


def test_the_first_step_of_adam_by_hand():
    """Its bias correction makes the first step of every row the learning rate, whenever it comes."""
    tx = row_optimizer.make("adam", 0.01)
    slots = row_optimizer.init(tx, np.arange(NUM_SLOTS), SHAPE)
    for slots_U in ([0, 1], [0, 2], [0, 3]):
        rows, gradients = draw(0, 2), draw(1, 2)
        new_rows, slots = row_optimizer.update(tx, slots, jnp.array(slots_U), rows, gradients, SHAPE)
        np.testing.assert_allclose(new_rows[1], rows[1] - 0.01 * np.sign(gradients[1]), atol=1e-6)


def test_slots_are_the_distinct_experts_in_order():
    expert_ids_FK = np.array([[7, 3, 900], [3, 900, 1]])
    ids_S, slots_FK = row_optimizer.slots_of(expert_ids_FK)
    np.testing.assert_array_equal(ids_S, [1, 3, 7, 900])
    np.testing.assert_array_equal(ids_S[slots_FK], expert_ids_FK)
    assert ids_S.dtype == slots_FK.dtype == np.int32


def test_state_is_kept_for_the_selected_experts_alone():
    for name in OPTIMIZERS:
        slots = row_optimizer.init(row_optimizer.make(name, 0.01), np.array([1, 3, 7]), SHAPE)
        assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(slots))
