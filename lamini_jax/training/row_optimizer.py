"""Any optax transformation, row by row, on the experts that facts have selected.

An expert's row is optimized as if it were a model of its own: its state, step count included, changes only when one of
its facts is trained. Facts select their experts before tuning begins, so state is kept for only those S experts, in
slots, and not for all N. On a mesh a slot is on the device of its expert.
"""

import functools

import flax
import jax
import jax.numpy as jnp
import optax

from lamini_jax.memory import experts, slots
from lamini_jax.memory.experts import ExpertShape
from lamini_jax.memory.slots import EMPTY_SLOT, Most
from lamini_jax.runtime import sharded_tables, sharding


@flax.struct.dataclass
class Slots:
    """The selected experts, in each shard ascending and padded with EMPTY_SLOT, and the optimizer's state of each."""

    expert_ids_S: jax.Array
    state: optax.OptState  # every leaf with a leading axis S


@functools.partial(jax.jit, static_argnames=("tx", "shape"))
def init(tx: optax.GradientTransformation, expert_ids_S, shape: ExpertShape) -> Slots:
    """New state for the selected experts."""

    def start(_):
        return tx.init({name: jnp.zeros(part) for name, part in shape.parts().items()})

    state = jax.vmap(start)(expert_ids_S)
    axes = slots.table_axes(state, shape)
    state = jax.tree.map(lambda leaf, names: sharding.constrain(leaf, *names), state, axes)
    return Slots(sharding.constrain(expert_ids_S, *slots.AXES), state)


def update(tx, experts_NR, selected: Slots, slots_BK, gradients_BKR, shape: ExpertShape, most: Most):
    """One step of the rows at `slots_BK` (EMPTY_SLOT is skipped), on whichever devices: the new rows and new slots.

    The gradients of an expert that several facts selected are summed. Y is what a shard is asked for, U its slots in
    this batch.
    """
    state_axes, batch = slots.table_axes(selected.state, shape), ("batch", None)
    gradient_axes = ("batch", None, None, "columns")

    def fetch(shard, experts_NR, ids_S, state, slots_bK, gradients_bKR):
        found, slots_Y = sharded_tables.exchange(shard, slots_bK.reshape(-1), ids_S.size, most.asked)
        size = min(most.touched + 1, slots_Y.size)  # one more, for no slot
        slots_U, inverse_Y = jnp.unique(slots_Y, size=size, fill_value=ids_S.size, return_inverse=True)
        ids_U = ids_S.at[slots_U].get(mode="fill", fill_value=EMPTY_SLOT)

        def total(gradient_bKMI):
            gradient_YMI = found.send(gradient_bKMI.reshape(-1, *gradient_bKMI.shape[2:]), 0)
            return jax.ops.segment_sum(
                gradient_YMI.astype(jnp.float32), inverse_Y.reshape(-1), num_segments=slots_U.size
            )

        rows_U = shard.local_rows(ids_U, experts_NR["down"].shape[0])
        experts_UR = jax.tree.map(lambda x: x.at[rows_U].get(mode="clip").astype(jnp.float32), experts_NR)
        state_U = jax.tree.map(lambda x: x.at[slots_U].get(mode="clip"), state)
        return rows_U, slots_U, experts_UR, state_U, jax.tree.map(total, gradients_bKR)

    def store(_, experts_NR, state, rows_U, slots_U, experts_UR, state_U):
        def replaced(x, new_UR):
            return x.at[rows_U].set(new_UR.astype(x.dtype), mode="drop")

        experts_NR = jax.tree.map(replaced, experts_NR, experts_UR)
        return experts_NR, jax.tree.map(lambda x, new: x.at[slots_U].set(new, mode="drop"), state, state_U)

    fetched_axes = (slots.AXES, slots.AXES, experts.AXES, state_axes)
    fetch_axes = (experts.AXES, slots.AXES, state_axes, batch, gradient_axes)
    fetched = sharded_tables.on_shards(fetch, fetch_axes, (*fetched_axes, experts.AXES))
    rows_U, slots_U, experts_UR, state_U, gradients_UR = fetched(
        experts_NR, selected.expert_ids_S, selected.state, slots_BK, gradients_BKR
    )
    # Outside `on_shards`, so with whole experts: an optimizer may need all of an expert's columns.
    updates_UR, state_U = jax.vmap(tx.update)(gradients_UR, state_U, experts_UR)
    experts_UR = optax.apply_updates(experts_UR, updates_UR)
    stored_axes = (experts.AXES, state_axes)
    experts_NR, state = sharded_tables.on_shards(store, (*stored_axes, *fetched_axes), stored_axes)(
        experts_NR, selected.state, rows_U, slots_U, experts_UR, state_U
    )
    return experts_NR, selected.replace(state=state)
