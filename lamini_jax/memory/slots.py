"""Slots: where the experts that facts have selected stand, apart from the millions that none has.

Facts choose their experts before tuning begins, so whatever is kept for trained experts alone (their optimizer's state,
what a checkpoint saves, what serving needs) has S slots and not N rows. On a mesh a slot is where its expert is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.memory import experts
from lamini_jax.memory.experts import ExpertShape
from lamini_jax.runtime import sharded_tables, sharding

EMPTY_SLOT = np.iinfo(np.int32).max  # no slot, no expert
AXES = ("experts",)
# The slots of a shard are a multiple of this, so that meshes of other sizes can divide the tables of a checkpoint.
_MULTIPLE = 64


def assign_slots(expert_ids_FK: np.ndarray, num_experts: int) -> np.ndarray:
    """expert_ids_S: the distinct experts of a selection, ascending in each shard, and as many in every shard.

    EMPTY_SLOT, where a fact has fewer than K experts, gets none.
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


def max_slots_per_batch(slots_FK: np.ndarray, num_slots: int, batch_size: int) -> int:
    """The most slots of one shard that any batch of so many facts can touch."""
    owner_FK = slots_FK // (num_slots // sharding.num_shards("experts"))
    per_shard_F = np.stack([(owner_FK == shard).sum(axis=1) for shard in range(sharding.num_shards("experts"))])
    return int(np.sort(per_shard_F, axis=1)[:, -batch_size:].sum(axis=1).max())


def table_axes(tables, shape: ExpertShape):
    """The axes of tables with a leading axis S: those shaped as a part of an expert are divided as it is."""
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


def permute_slots(tables: list[jax.Array], ids_then_S: np.ndarray, ids_now_S: np.ndarray, shape: ExpertShape):
    """Tables of slots in the order of other slots, bit for bit; some of them at a time, never whole on one device."""
    names = tuple(jax.tree.leaves(table_axes(tables, shape), is_leaf=lambda leaf: isinstance(leaf, tuple)))
    if np.array_equal(ids_then_S, ids_now_S):
        return tables
    slots_then_S = find_slots(ids_then_S, ids_now_S)
    now = tuple(
        sharding.zeros((ids_now_S.size, *leaf.shape[1:]), leaf.dtype, axes)
        for leaf, axes in zip(tables, names, strict=True)
    )
    for start, index_X in sharded_tables.row_chunks(ids_now_S.size, "experts"):
        now = sharded_tables.write_rows(now, _rows(tuple(tables), slots_then_S[index_X], names), np.int32(start), names)
    return list(now)


@functools.partial(jax.jit, static_argnames="names")
def _rows(tables, rows_X, names):
    """As integers, because a sum with zeros, which is how rows travel, would lose the sign of a zero."""

    def bits(table):
        missing = sharding.round_up(table.shape[0], "experts") - table.shape[0]
        table = jnp.pad(table, [(0, missing), *[(0, 0)] * (table.ndim - 1)])
        return jax.lax.bitcast_convert_type(table, f"uint{8 * table.dtype.itemsize}").astype(jnp.uint32)

    rows = sharded_tables.gather_rows(tuple(map(bits, tables)), rows_X, names)
    return tuple(
        jax.lax.bitcast_convert_type(row.astype(f"uint{8 * table.dtype.itemsize}"), table.dtype)
        for row, table in zip(rows, tables, strict=True)
    )
