"""The memory may lie on any linear layer of a block: it is trained there, in its memory layers and nowhere else."""

import helpers
import jax
import numpy as np
import pytest

from lamini_jax.backbone.linear_layers import LINEAR_LAYERS

# Input and output width of each linear layer of `helpers.BACKBONE`: 4 heads of 8, 2 of them for keys and values.
WIDTHS = {
    "q_proj": (32, 32),
    "k_proj": (32, 16),
    "v_proj": (32, 16),
    "o_proj": (32, 32),
    "gate_proj": (32, 48),
    "up_proj": (32, 48),
    "down_proj": (48, 32),
}
FACTS = helpers.FACTS[:8]


def test_these_are_all_targets():
    assert LINEAR_LAYERS.keys() == WIDTHS.keys()


@pytest.mark.parametrize("target", WIDTHS)
def test_steps_lower_the_loss(target, model):
    """And change the experts that were selected, and no others."""
    method = helpers.make_method(helpers.replace(helpers.CONFIG, memory={"target": target}), model, FACTS)
    state, (bucket,), index_B = method.init(), method.data.buckets, np.arange(len(FACTS))
    before = jax.tree.map(np.array, state.experts_NR)
    assert tuple(before[part].shape[-1] for part in ("down", "up")) == WIDTHS[target]
    loss = []
    for _ in range(4):
        state, losses = method.step(model, state, *bucket.batch(index_B))
        loss.append(float(losses.total_B.sum()))
    assert loss[-1] < loss[0]
    moved_N = np.any(helpers.flat(before) != helpers.flat(state.experts_NR), axis=1)
    assert set(np.flatnonzero(moved_N)) == set(method.selection.expert_ids_FK.ravel().tolist())
