"""Rows are optimized as if each were a model of its own, with its own state and its own count of steps."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamini_jax.config import OptimizerConfig
from lamini_jax.memory.experts import ExpertShape
from lamini_jax.memory.slots import Most
from lamini_jax.training import optimizers, row_optimizer

SHAPE = ExpertShape(layers=2, input_width=5, output_width=3)
# The slots of each step; 6 is out of range and fills up.
STEPS = [[0, 2, 5, 6], [1, 2, 6, 6], [0, 1, 2, 4], [6, 6, 6, 6], [2, 4, 5, 6]]
NUM_SLOTS = 6


def draw(seed, count):
    return np.random.default_rng(seed).normal(size=(count, SHAPE.floats)).astype(np.float32)


def start(tx, rows):
    """These rows, each of them selected."""
    return helpers.parts(rows, SHAPE), row_optimizer.init(tx, np.arange(NUM_SLOTS, dtype=np.int32), SHAPE)


def update(tx, experts_NR, slots, slots_U, gradients):
    """A step of one fact that selected these slots."""
    gradients_BKR = helpers.parts(gradients[None], SHAPE)
    step = jax.jit(lambda *arguments: row_optimizer.update(tx, *arguments, SHAPE, Most(NUM_SLOTS, NUM_SLOTS)))
    return step(experts_NR, slots, np.array([slots_U], np.int32), gradients_BKR)


def state_of(slots, slot):
    return jax.tree.map(lambda leaf: np.asarray(leaf[slot]), slots.state)


def make(name, learning_rate):
    return optimizers.make(OptimizerConfig(name, learning_rate), 100)


@pytest.fixture(params=optimizers.OPTIMIZERS)
def tx(request):
    return make(request.param, 0.01)


def test_each_row_by_itself(tx):
    """Several steps of different rows, against optax on one row at a time."""
    rows = draw(0, NUM_SLOTS)
    experts_NR, slots = start(tx, rows)
    expected_rows = [helpers.parts(row, SHAPE) for row in rows]
    expected_states = [tx.init(parts) for parts in expected_rows]
    update_one = jax.jit(tx.update)
    for step, slots_U in enumerate(STEPS):
        gradients = draw(step + 1, len(slots_U))
        touched = [slot for slot in slots_U if slot < NUM_SLOTS]
        before, rows_before = [state_of(slots, slot) for slot in range(NUM_SLOTS)], helpers.flat(experts_NR)
        experts_NR, slots = update(tx, experts_NR, slots, slots_U, gradients)
        for place, slot in enumerate(slots_U):
            if slot < NUM_SLOTS:
                parts, gradient = expected_rows[slot], helpers.parts(gradients[place], SHAPE)
                updates, expected_states[slot] = update_one(gradient, expected_states[slot], parts)
                expected_rows[slot] = jax.tree.map(jnp.add, parts, updates)
        for slot in range(NUM_SLOTS):
            found = helpers.flat(experts_NR)[slot]
            np.testing.assert_allclose(found, helpers.flat(expected_rows[slot]), rtol=1e-5, atol=1e-7)
            state = state_of(slots, slot)
            assert jax.tree.structure(state) == jax.tree.structure(expected_states[slot])
            for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(expected_states[slot]), strict=True):
                np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-9)
            same = helpers.same_bits(state, before[slot]) and helpers.same_bits(found, rows_before[slot])
            assert same or slot in touched


def test_gradients_of_a_slot_that_several_facts_selected_are_summed():
    tx = make("sgd", 1.0)
    rows, gradients = draw(0, NUM_SLOTS), draw(1, 4)
    experts_NR, slots = start(tx, rows)
    experts_NR, _ = update(tx, experts_NR, slots, [2, 4, 2, 2], gradients)
    expected = rows.copy()
    expected[4] -= gradients[1]
    expected[2] -= gradients[[0, 2, 3]].sum(axis=0)
    np.testing.assert_allclose(helpers.flat(experts_NR), expected, rtol=1e-5, atol=1e-6)


def test_a_row_counts_its_own_steps():
    tx = make("adam", 0.01)
    experts_NR, slots = start(tx, draw(0, NUM_SLOTS))
    for slots_U in STEPS:
        experts_NR, slots = update(tx, experts_NR, slots, slots_U, draw(0, len(slots_U)))
    np.testing.assert_array_equal(slots.state[0].count, [2, 2, 4, 0, 2, 2])


def test_the_first_step_of_adam_by_hand():
    """Its bias correction makes the first step of every row the learning rate, whenever it comes."""
    tx = make("adam", 0.01)
    rows = draw(0, NUM_SLOTS)
    experts_NR, slots = start(tx, rows)
    for slots_U in ([0, 1], [0, 2], [0, 3]):
        gradients = draw(1, 2)
        experts_NR, slots = update(tx, experts_NR, slots, slots_U, gradients)
        new = slots_U[1]
        np.testing.assert_allclose(helpers.flat(experts_NR)[new], rows[new] - 0.01 * np.sign(gradients[1]), atol=1e-6)


def test_state_is_kept_for_the_selected_experts_alone():
    for name in optimizers.OPTIMIZERS:
        slots = row_optimizer.init(make(name, 0.01), np.array([1, 3, 7]), SHAPE)
        assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(slots))
