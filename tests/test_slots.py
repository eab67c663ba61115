"""Slots: where trained experts stand, apart from the millions that nobody has trained."""

import helpers
import numpy as np

from lamini_jax.memory import slots
from lamini_jax.memory.experts import ExpertShape
from lamini_jax.memory.slots import EMPTY_SLOT

SHAPE = ExpertShape(layers=2, input_width=5, output_width=3)


def test_slots_are_the_distinct_experts_in_order():
    expert_ids_FK = np.array([[7, 3, 900], [3, 900, 1]])
    ids_S = slots.assign_slots(expert_ids_FK, 1000)
    slots_FK = slots.find_slots(ids_S, expert_ids_FK)
    np.testing.assert_array_equal(ids_S[:4], [1, 3, 7, 900])
    assert len(ids_S) == 64 and (ids_S[4:] == EMPTY_SLOT).all()
    np.testing.assert_array_equal(ids_S[slots_FK], expert_ids_FK)
    assert ids_S.dtype == slots_FK.dtype == np.int32


def test_what_has_no_expert_has_no_slot():
    expert_ids_FK = np.array([[7, EMPTY_SLOT], [EMPTY_SLOT, 3]])
    ids_S = slots.assign_slots(expert_ids_FK, 1000)
    np.testing.assert_array_equal(ids_S, [3, 7, *[EMPTY_SLOT] * 62])
    asked = np.array([[7, EMPTY_SLOT], [8, 3]])
    np.testing.assert_array_equal(slots.find_slots(ids_S, asked), [[1, EMPTY_SLOT], [EMPTY_SLOT, 0]])


def test_a_batch_touches_the_slots_of_its_facts():
    """No more than it selects, whatever its facts; a fact that has no slot touches none."""
    slots_FK = np.array([[0, 1, 2], [1, 3, EMPTY_SLOT], [EMPTY_SLOT] * 3])
    assert [slots.most_of_any_batch(slots_FK, 64, size) for size in (1, 2, 3)] == [(3, 3), (5, 5), (5, 5)]


def test_what_is_written_is_read():
    """Of the slots' experts and no others, bit for bit."""
    rng = np.random.default_rng(0)
    rows_NR = rng.normal(size=(100, SHAPE.floats)).astype(np.float32)
    new_SR = rng.normal(size=(64, SHAPE.floats)).astype(np.float32)
    new_SR[0] = -0.0
    expert_ids_X = rng.choice(100, 30, replace=False)
    ids_S = slots.assign_slots(expert_ids_X, 100)
    written = slots.write(helpers.parts(rows_NR, SHAPE), ids_S, helpers.parts(new_SR, SHAPE))
    expected_NR = rows_NR.copy()
    expected_NR[np.sort(expert_ids_X)] = new_SR[:30]
    assert helpers.same_bits(helpers.flat(written), expected_NR)
    new_SR[30:] = 0
    assert helpers.same_bits(helpers.flat(slots.read(written, ids_S)), new_SR)


def test_other_slots_have_the_same_tables_in_another_order():
    """Bit for bit, a negative zero included; an expert that had no slot starts at zero."""
    rows_SR = np.random.default_rng(0).normal(size=(4, SHAPE.floats)).astype(np.float32)
    rows_SR[1] = -0.0
    tables = [*helpers.parts(rows_SR, SHAPE).values(), np.arange(4, dtype=np.int32)]
    then_S, now_S = np.array([2, 5, 7, EMPTY_SLOT]), np.array([7, 3, 5, 2, EMPTY_SLOT])
    *parts, counts_S = slots.permute_slots(tables, then_S, now_S, SHAPE)
    expected_SR = np.stack([rows_SR[2], np.zeros(SHAPE.floats, np.float32), rows_SR[1], rows_SR[0], rows_SR[2] * 0])
    assert helpers.same_bits(helpers.flat(dict(zip(("down", "up"), parts, strict=True)))[:4], expected_SR[:4])
    np.testing.assert_array_equal(counts_S, [2, 0, 1, 0, 0])
