"""The numbers of one step of each method, so that no change to the arithmetic goes unseen.

A fixed random backbone, eight facts, and random weights to start from, so that every part of them has a gradient; the
optimizers and rates are those of the shipped config. If a change of the numbers is meant, run this file and copy what
the failures print into GOLDEN. Tolerances are those of float32 on other CPUs, which round sums otherwise.
"""

import dataclasses
import pprint

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamini_jax.config import LoraConfig, TuningConfig
from lamini_jax.training import LoraMethod

CONFIG = dataclasses.replace(helpers.CONFIG, tuning=TuningConfig(batch_size=8), lora=LoraConfig(rank=4))
FACTS = helpers.FACTS[:8]
GOLDEN = {
    "memory_step": {
        "losses": [49.6235, 52.462, 39.172, 46.8394, 47.0657, 40.5685, 52.2484, 55.6296],
        "losses after the step": [47.3383, 50.42, 37.4657, 44.5701, 45.2014, 39.1095, 49.9451, 53.4863],
        "squared gradients": [1.5994],
        "changes": [-0.04, -0.04, 0.04, -0.04, 0.04, -0.04, 0.04, 0.04],
    },
    "memory_step_on_all_tokens": {
        "losses": [49.6397, 52.4747, 39.1935, 46.8261, 47.0719, 40.5686, 52.2518, 55.6604],
        "losses after the step": [47.3176, 50.1769, 37.5499, 44.5565, 45.1243, 38.9678, 49.963, 53.5342],
        "squared gradients": [1.676],
        "changes": [0.04, -0.04, 0.04, -0.04, 0.04, 0.04, 0.04, 0.04],
    },
    "lora_step": {
        "losses": [48.1177, 51.8835, 39.1313, 46.6609, 46.8172, 40.0247, 51.661, 54.9641],
        "losses after the step": [46.7193, 49.6539, 37.1569, 44.8149, 44.5942, 38.5354, 49.5675, 52.9487],
        "squared gradients": [3.2489],
        "changes": [-0.004, -0.004, *[0.004] * 7, -0.004, -0.004, -0.004, 0.004, -0.004, -0.004, -0.004],
    },
}


def from_random(weights):
    """Normal numbers in the place of the trained weights."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.05, x.shape), x.dtype), weights)


def memory_step(model, positions="answer"):
    """The method, a random state, and where in it a step shows: the first expert of the first fact."""
    method = helpers.make_method(helpers.replace(CONFIG, memory={"positions": positions}), model, FACTS)
    state, expert = method.init(), method.selection.expert_ids_FK[0, 0]
    state = state.replace(experts_NR=from_random(state.experts_NR))
    return method, state, lambda state: [state.experts_NR[part][expert, 0, :4] for part in ("down", "up")]


def memory_step_on_all_tokens(model):
    """The same with the paper's positions."""
    return memory_step(model, "all")


def lora_step(model):
    """The same, with the first entries of an adapter of the prefix and of one of the suffix."""
    method = LoraMethod.create(CONFIG, model, FACTS)
    state = method.init()
    state = state.replace(trained=from_random(state.trained))

    def entries(state):
        adapters = state.trained["prefix"]["q_proj"], state.trained["suffix"]["down_proj"]
        return [part[0, 0, :4] for adapter in adapters for part in adapter]

    return method, state, entries


def squared_gradients(state):
    """Their sum, which is all that Adafactor knows after a first step; that step itself has only their signs."""
    leaves = jax.tree.leaves(state.slots.state if hasattr(state, "slots") else state.optimizer)
    return sum(np.asarray(leaf, np.float64).sum() for leaf in leaves if leaf.dtype == np.float32)


@pytest.mark.parametrize("make", [memory_step, memory_step_on_all_tokens, lora_step])
def test_golden_step(model, make):
    method, state, entries = make(model)
    arguments = method.data.buckets[0], np.arange(len(FACTS), dtype=np.int32)
    start = [np.array(part) for part in entries(state)]
    state, losses = method.step(model, state, *arguments)
    found = {
        "losses": losses.total_B,
        "losses after the step": method.losses(model, state, *arguments).total_B,
        "squared gradients": [squared_gradients(state)],
        "changes": np.concatenate([now - then for now, then in zip(entries(state), start, strict=True)]),
    }
    found = {name: np.round(np.asarray(values, np.float64), 4).tolist() for name, values in found.items()}
    print(make.__name__, pprint.pformat(found, width=116, compact=True, sort_dicts=False))
    expected = GOLDEN[make.__name__]
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
