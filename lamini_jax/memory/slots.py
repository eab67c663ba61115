"""Slots: a numbering of only the experts that facts have selected, without the millions that no fact has.

Facts select their experts before tuning begins, so whatever is kept only for trained experts (their optimizer's state,
what a checkpoint saves, what serving needs) has S slots instead of N rows. On a mesh a slot is on its expert's device.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.memory import experts
from lamini_jax.memory.experts import ExpertShape
from lamini_jax.runtime import sharded_tables, sharding

EMPTY_SLOT = np.iinfo(np.int32).max  # no slot, no expert
AXES = ("experts",)
# The number of slots of a shard is a multiple of this, so that other meshes can divide the tables of a checkpoint.
_MULTIPLE = 64


def assign_slots(expert_ids_FK: np.ndarray, num_experts: int) -> np.ndarray:
    """expert_ids_S: the distinct experts of a selection, ascending in each shard; all shards have as many slots.

    EMPTY_SLOT in place of an expert, for a fact with fewer than K of them, gets no slot.
    """
    shards = sharding.num_shards("experts")
    ids_X = np.unique(expert_ids_FK[expert_ids_FK != EMPTY_SLOT])
    owner_X = ids_X // (sharding.round_up(num_experts, "experts") // shards)
    per_shard = np.bincount(owner_X, minlength=shards)
    slots = -(-per_shard.max() // _MULTIPLE) * _MULTIPLE
    expert_ids_S = np.full(shards * slots, EMPTY_SLOT, np.int32)
    expert_ids_S[owner_X * slots + np.arange(len(ids_X)) - (np.cumsum(per_shard) - per_shard)[owner_X]] = ids_X
    return expert_ids_S


def find_slots(expert_ids_S: np.ndarray, expert_ids_X: np.ndarray) -> np.ndarray:
    """The slot of each expert, EMPTY_SLOT for those that have none."""
    order_S = np.argsort(expert_ids_S)
    places_X = np.searchsorted(expert_ids_S, expert_ids_X, sorter=order_S)
    slots_X = order_S[np.minimum(places_X, order_S.size - 1)]
    found_X = (expert_ids_S[slots_X] == expert_ids_X) & (expert_ids_X != EMPTY_SLOT)
    return np.where(found_X, slots_X, EMPTY_SLOT).astype(np.int32)


class Most(NamedTuple):
    """What no batch of some facts exceeds."""

    touched: int  # slots of one shard that it touches
    asked: int  # slots of one shard that one part of it selects


def most_of_any_batch(slots_FK: np.ndarray, num_slots: int, batch_size: int) -> Most:
    """The most that any batch of `batch_size` facts, one part of which each shard has, can need of one shard."""
    shards = sharding.num_shards("experts")
    owner_FK = slots_FK // (num_slots // shards)
    by_shard_HF = np.sort(np.stack([(owner_FK == shard).sum(axis=1) for shard in range(shards)]), axis=1)
    part = sharding.round_up(batch_size, "batch") // sharding.num_shards("batch")
    return Most(*(int(by_shard_HF[:, -facts:].sum(axis=1).max()) for facts in (batch_size, part)))


def table_axes(tables, shape: ExpertShape):
    """The axes of tables with a leading axis S: those with the shape of a part of an expert are divided as it is."""
    parts = list(shape.parts().values())
    return jax.tree.map(lambda leaf: experts.AXES if leaf.shape[1:] in parts else AXES, tables)


@jax.jit
def read(experts_NR, expert_ids_S):
    """experts_SR of all slots."""

    def local(shard, experts_NR, ids_S):
        rows_S = shard.local_rows(ids_S, experts_NR["down"].shape[0])
        return jax.tree.map(lambda x: x.at[rows_S].get(mode="fill", fill_value=0), experts_NR)

    return sharded_tables.on_shards(local, (experts.AXES, AXES), experts.AXES)(experts_NR, expert_ids_S)


@functools.partial(jax.jit, donate_argnums=0)
def write(experts_NR, expert_ids_S, experts_SR):
    """The inverse of `read`: the array with these experts in the slots' rows."""

    def local(shard, experts_NR, ids_S, experts_SR):
        rows_S = shard.local_rows(ids_S, experts_NR["down"].shape[0])
        return jax.tree.map(lambda x, new: x.at[rows_S].set(new, mode="drop"), experts_NR, experts_SR)

    axes = (experts.AXES, AXES, experts.AXES)
    return sharded_tables.on_shards(local, axes, experts.AXES)(experts_NR, expert_ids_S, experts_SR)


def permute_slots(tables: list[jax.Array], old_ids_S: np.ndarray, new_ids_S: np.ndarray, shape: ExpertShape):
    """Tables of slots, bit for bit, in the order of other slots; a chunk at a time, never whole on one device."""
    names = tuple(jax.tree.leaves(table_axes(tables, shape), is_leaf=lambda leaf: isinstance(leaf, tuple)))
    if np.array_equal(old_ids_S, new_ids_S):
        return tables
    old_slots_S = find_slots(old_ids_S, new_ids_S)
    new = tuple(
        sharding.zeros((new_ids_S.size, *leaf.shape[1:]), leaf.dtype, axes)
        for leaf, axes in zip(tables, names, strict=True)
    )
    for start, index_X in sharded_tables.row_chunks(new_ids_S.size, "experts"):
        new = sharded_tables.write_rows(new, _rows(tuple(tables), old_slots_S[index_X], names), np.int32(start), names)
    return list(new)


@functools.partial(jax.jit, static_argnames="names")
def _rows(tables, rows_X, names):
    """Some rows of tables that the shards need not divide, bit for bit: a sum would lose a zero's sign."""

    def padded(table):
        missing = sharding.round_up(table.shape[0], "experts") - table.shape[0]
        return jnp.pad(table, [(0, missing), *[(0, 0)] * (table.ndim - 1)])

    most = rows_X.size // sharding.num_shards("batch")
    return sharded_tables.gather_rows(tuple(map(padded, tables)), rows_X, names, most)
