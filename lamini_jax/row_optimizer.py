"""Any optax transformation, row by row, on the rows that facts have selected.

An expert's row is optimized as if it were a model of its own: its state, step count included, moves only when one of
its facts is trained. Facts choose their experts before tuning begins, so state is kept for those S experts alone, in
slots beside the bank, and not for all N. On a mesh a slot lies where its expert's row does.
"""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lamini_jax import bank, sharding

NONE = np.iinfo(np.int32).max  # no slot, no expert
_SLOT = ("experts",)
# The slots of a shard are a multiple of this, so that meshes of other sizes can share the tables of a checkpoint out.
_MULTIPLE = 64


def make(name: str, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Adafactor as the paper uses it (appendix A: a rate of our own, no scaling by the parameters), Adam or SGD."""
    if name == "adafactor":
        return optax.adafactor(learning_rate, multiply_by_parameter_scale=False)
    return {"adam": optax.adam, "sgd": optax.sgd}[name](learning_rate)


@flax.struct.dataclass
class Slots:
    """The selected experts, ascending but for the NONE that fills up a shard, and the optimizer's state of each."""

    expert_ids_S: jax.Array
    state: optax.OptState  # every leaf with a leading axis S


def slots_of(expert_ids_FK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct experts of a selection, as many in every shard, and the slot of each selected one among them."""
    shards = sharding.size("experts")
    ids_X, places_FK = np.unique(expert_ids_FK, return_inverse=True)
    owner_X = ids_X // (sharding.padded(num_experts, "experts") // shards)
    counts_P = np.bincount(owner_X, minlength=shards)
    slots = -(-counts_P.max() // _MULTIPLE) * _MULTIPLE
    slots_X = owner_X * slots + np.arange(len(ids_X)) - (np.cumsum(counts_P) - counts_P)[owner_X]
    ids_S = np.full(shards * slots, NONE, np.int32)
    ids_S[slots_X] = ids_X
    return ids_S, slots_X[places_FK].reshape(expert_ids_FK.shape).astype(np.int32)


def most_touched(slots_FK: np.ndarray, num_slots: int, batch_size: int) -> int:
    """The most slots of one shard that any batch of so many facts can touch."""
    owner_FK = slots_FK // (num_slots // sharding.size("experts"))
    counts_PF = np.stack([(owner_FK == shard).sum(axis=1) for shard in range(sharding.size("experts"))])
    return int(np.sort(counts_PF, axis=1)[:, -batch_size:].sum(axis=1).max())


@functools.partial(jax.jit, static_argnames=("tx", "shape"))
def init(tx: optax.GradientTransformation, expert_ids_S, shape: bank.RowShape) -> Slots:
    """Fresh state for the selected experts."""

    def start(_):
        return tx.init({name: jnp.zeros(part) for name, part in shape.parts().items()})

    state = jax.vmap(start)(expert_ids_S)
    state = jax.tree.map(lambda leaf, names: sharding.constrain(leaf, *names), state, axes(state, shape))
    return Slots(sharding.constrain(expert_ids_S, *_SLOT), state)


def axes(state: optax.OptState, shape: bank.RowShape):
    """The axes of the state's leaves: those shaped as a row's part are divided as it is."""
    parts = list(shape.parts().values())
    return jax.tree.map(lambda leaf: bank.ROWS if leaf.shape[1:] in parts else _SLOT, state)


def update(tx, rows_NR, slots: Slots, slots_BK, gradients_BKR, shape: bank.RowShape, touched: int):
    """One step of the rows at `slots_BK` (NONE is passed over), wherever they lie: the new rows, the new slots.

    The gradients of an expert that several facts selected are summed. U is the slots of a batch in a shard, of which
    there are at most `touched`.
    """
    state_axes, batch = axes(slots.state, shape), ("batch", None)
    gradient_axes = ("batch", None, None, "columns")

    def fetch(shard, rows_NR, ids_S, state, slots_bK, gradients_bKR):
        slots_X = shard.places(shard.collect(slots_bK).reshape(-1), ids_S.size)
        # One more, for what is another shard's.
        size = min(touched + 1, slots_X.size)
        slots_U, inverse_X = jnp.unique(slots_X, size=size, fill_value=ids_S.size, return_inverse=True)
        ids_U = ids_S.at[slots_U].get(mode="fill", fill_value=NONE)

        def total(gradient_bKMI):
            gradient_BKMI = shard.collect(gradient_bKMI)
            gradient_XMI = gradient_BKMI.reshape(-1, *gradient_BKMI.shape[2:]).astype(jnp.float32)
            return jax.ops.segment_sum(gradient_XMI, inverse_X.reshape(-1), num_segments=slots_U.size)

        places_U = shard.places(ids_U, rows_NR["down"].shape[0])
        rows_UR = jax.tree.map(lambda x: x.at[places_U].get(mode="clip").astype(jnp.float32), rows_NR)
        state_U = jax.tree.map(lambda x: x.at[slots_U].get(mode="clip"), state)
        return places_U, slots_U, rows_UR, state_U, jax.tree.map(total, gradients_bKR)

    def store(_, rows_NR, state, places_U, slots_U, rows_UR, state_U):
        rows_NR = jax.tree.map(lambda x, new: x.at[places_U].set(new.astype(x.dtype), mode="drop"), rows_NR, rows_UR)
        return rows_NR, jax.tree.map(lambda x, new: x.at[slots_U].set(new, mode="drop"), state, state_U)

    fetch_axes = (bank.ROWS, _SLOT, state_axes, batch, gradient_axes)
    fetched = (_SLOT, _SLOT, bank.ROWS, state_axes)
    places_U, slots_U, rows_UR, state_U, gradients_UR = sharding.owned(fetch, fetch_axes, (*fetched, bank.ROWS))(
        rows_NR, slots.expert_ids_S, slots.state, slots_BK, gradients_BKR
    )
    # Between the two, whole rows: an optimizer may look at all of a row, whose columns the compiler then sums over.
    updates_UR, state_U = jax.vmap(tx.update)(gradients_UR, state_U, rows_UR)
    rows_UR = optax.apply_updates(rows_UR, updates_UR)
    rows_NR, state = sharding.owned(store, (bank.ROWS, state_axes, *fetched), (bank.ROWS, state_axes))(
        rows_NR, slots.state, places_U, slots_U, rows_UR, state_U
    )
    return rows_NR, slots.replace(state=state)


@jax.jit
def trained_rows(rows_NR, slots: Slots):
    """rows_SR of all slots."""

    def local(shard, rows_NR, ids_S):
        places_S = shard.places(ids_S, rows_NR["down"].shape[0])
        return jax.tree.map(lambda x: x.at[places_S].get(mode="fill", fill_value=0), rows_NR)

    return sharding.owned(local, (bank.ROWS, _SLOT), bank.ROWS)(rows_NR, slots.expert_ids_S)


@functools.partial(jax.jit, donate_argnums=0)
def with_trained_rows(rows_NR, slots: Slots, rows_SR):
    """The inverse: the bank with these rows in the slots' places."""

    def local(shard, rows_NR, ids_S, rows_SR):
        places_S = shard.places(ids_S, rows_NR["down"].shape[0])
        return jax.tree.map(lambda x, new: x.at[places_S].set(new, mode="drop"), rows_NR, rows_SR)

    return sharding.owned(local, (bank.ROWS, _SLOT, bank.ROWS), bank.ROWS)(rows_NR, slots.expert_ids_S, rows_SR)


def rearranged(tables: list[jax.Array], ids_then_S: np.ndarray, ids_now_S: np.ndarray, shape: bank.RowShape):
    """Tables of slots in the order of other slots, bit for bit; some of them at a time, never whole on one device."""
    names = tuple(jax.tree.leaves(axes(tables, shape), is_leaf=lambda leaf: isinstance(leaf, tuple)))
    if np.array_equal(ids_then_S, ids_now_S):
        return tables
    order_S = np.argsort(ids_then_S)
    places_S = order_S[np.minimum(np.searchsorted(ids_then_S, ids_now_S, sorter=order_S), order_S.size - 1)]
    places_S = np.where(ids_then_S[places_S] == ids_now_S, places_S, NONE).astype(np.int32)
    places_S[ids_now_S == NONE] = NONE
    now = tuple(
        sharding.zeros((ids_now_S.size, *leaf.shape[1:]), leaf.dtype, axes)
        for leaf, axes in zip(tables, names, strict=True)
    )
    for start, index_X in sharding.turns(ids_now_S.size, "experts"):
        now = sharding.write(now, _rows(tuple(tables), places_S[index_X], names), np.int32(start), names)
    return list(now)


@functools.partial(jax.jit, static_argnames="names")
def _rows(tables, places_X, names):
    """As integers, because a sum with zeros, which is how rows travel, would lose the sign of a zero."""

    def bits(table):
        missing = sharding.padded(table.shape[0], "experts") - table.shape[0]
        table = jnp.pad(table, [(0, missing), *[(0, 0)] * (table.ndim - 1)])
        return jax.lax.bitcast_convert_type(table, f"uint{8 * table.dtype.itemsize}").astype(jnp.uint32)

    rows = sharding.take(tuple(map(bits, tables)), places_X, names)
    return tuple(
        jax.lax.bitcast_convert_type(row.astype(f"uint{8 * table.dtype.itemsize}"), table.dtype)
        for row, table in zip(rows, tables, strict=True)
    )
