"""Any optax transformation, row by row, on the rows that facts have selected.

An expert's row is optimized as if it were a model of its own: its state, step count included, moves only when one of
its facts is trained. Facts choose their experts before tuning begins, so state is kept for those S experts alone,
in `slots` (ascending ids) beside the bank, and not for all N.
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lamini_jax import bank


def make(name: str, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Adafactor as the paper uses it (appendix A: a rate of our own, no scaling by the parameters), Adam or SGD."""
    if name == "adafactor":
        return optax.adafactor(learning_rate, multiply_by_parameter_scale=False)
    return {"adam": optax.adam, "sgd": optax.sgd}[name](learning_rate)


@flax.struct.dataclass
class Slots:
    """The selected experts and the optimizer's state of each."""

    expert_ids_S: jax.Array
    state: optax.OptState  # every leaf with a leading axis S


def slots_of(expert_ids_FK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct experts of a selection, ascending, and the place of each selected one among them."""
    ids_S, slots_FK = np.unique(expert_ids_FK, return_inverse=True)
    return ids_S.astype(np.int32), slots_FK.reshape(expert_ids_FK.shape).astype(np.int32)


def init(tx: optax.GradientTransformation, expert_ids_S, shape: bank.RowShape) -> Slots:
    """Fresh state for the selected experts."""

    def start(_):
        return tx.init(bank.split(jnp.zeros(shape.floats), shape))

    return Slots(jnp.asarray(expert_ids_S), jax.vmap(start)(expert_ids_S))


def update(tx, slots: Slots, slots_U, rows_UR, gradients_UR, shape: bank.RowShape):
    """One step of the rows at `slots_U` (distinct; numbers out of range are passed over): their new rows, new slots."""
    rows = bank.split(rows_UR, shape)
    state = jax.tree.map(lambda x: x.at[slots_U].get(mode="clip"), slots.state)
    updates, state = jax.vmap(tx.update)(bank.split(gradients_UR, shape), state, rows)
    state = jax.tree.map(lambda old, new: old.at[slots_U].set(new, mode="drop"), slots.state, state)
    return bank.merge(optax.apply_updates(rows, updates)), slots.replace(state=state)
