"""A kind of router is one module; whatever gates it makes, training and serving have the same ones."""

import types

import helpers
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FACTS, QUESTIONS

from lamini_jax import training
from lamini_jax.errors import OTHER_RUN, UserError
from lamini_jax.evaluation import recall
from lamini_jax.memory import experts, routers, storage
from lamini_jax.memory.routers import NO_EXPERT
from lamini_jax.memory.routers import experts as expert_router

CONFIG = helpers.replace(helpers.CONFIG, router={"kind": "uneven"}, tuning={"epochs": 8})
K = CONFIG.memory.top_k


def select(router, model, prompt_BT, length_B, top_k):
    """Some questions have fewer than K experts, and each expert a weight of its own."""
    ids_BK = expert_router.select(router, model, prompt_BT, length_B, top_k).expert_ids_BK
    weights_BK = 1.0 + ids_BK % 7
    gates_BK = weights_BK / jnp.linalg.norm(weights_BK, axis=1, keepdims=True)
    return routers.Selection(jnp.where(ids_BK % 5 == 0, NO_EXPERT, ids_BK), gates_BK)


def restore(config, arrays, record):
    return expert_router.restore(config, arrays, record).replace(kind="uneven")


UNEVEN = types.SimpleNamespace(**{**vars(expert_router), "select": select, "restore": restore})


@pytest.fixture(scope="module", autouse=True)
def kinds():
    """The kinds of routers, with one more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routers, "KINDS", {"experts": expert_router, "uneven": UNEVEN})
        yield


@pytest.fixture(scope="module")
def tuned(kinds, model, router, tmp_path_factory):
    """A run with a router of this kind, and where its checkpoints are."""
    directory = tmp_path_factory.mktemp("uneven")
    return training.memory_run(CONFIG, model, FACTS, directory, "", router.replace(kind="uneven")).result(), directory


def test_gates_of_training_are_those_of_serving(model, router, tuned):
    """Training's losses are those of the adapters that answer, tuned or read back; with other gates they are not."""
    tuned, directory = tuned
    trained_F = tuned.progress.total_F
    assert trained_F.mean() < 10  # of about 25 before
    served = storage.load_run(CONFIG, directory)
    for adapter_fn in (tuned.adapter_fn, storage.adapter_fn(model, served, CONFIG)):
        np.testing.assert_allclose(helpers.losses_served(model, adapter_fn, FACTS), trained_F, rtol=1e-3, atol=1e-3)

    def fetch(expert_ids_BK):
        return experts.gather_trained(served.expert_ids_S, served.experts_SR, expert_ids_BK)

    even = storage.with_experts(model, router, fetch, CONFIG)
    assert abs(helpers.losses_served(model, even, FACTS) - trained_F).mean() > 0.2 * trained_F.mean()


def test_what_selects_no_expert_is_trained_with_the_others(model, router, tuned):
    tuned, directory = tuned
    selected_FK = routers.select_facts(model, router, QUESTIONS, K).expert_ids_FK
    assert (selected_FK % 5 == 0).any() and (selected_FK % 5 != 0).any(axis=1).all()
    np.testing.assert_array_equal(tuned.expert_ids_FK, np.where(selected_FK % 5 == 0, NO_EXPERT, selected_FK))
    served = storage.load_run(CONFIG, directory)
    np.testing.assert_array_equal(served.expert_ids_S, np.unique(selected_FK[selected_FK % 5 != 0]))
    assert helpers.flat(served.experts_SR).any(axis=1).all()
    exact_F, _ = recall.recalled(tuned.model, tuned.adapter_fn, FACTS)
    assert tuned.certified_F.any() and exact_F[tuned.certified_F].all()


def test_a_run_continues_with_the_gates_that_it_began_with(model, tuned):
    selection = training.memory_run(CONFIG, model, FACTS, tuned[1], "").method.selection
    assert selection.router.kind == "uneven"
    again = routers.select_facts(model, selection.router, QUESTIONS, K)
    assert helpers.same_bits(selection[1:], again[1:])
    assert np.unique(selection.gates_FK).size > K


@pytest.mark.parametrize("act", ["serve", "train"])
def test_a_checkpoint_of_another_kind_is_refused(model, tuned, act):
    """In one line, which names both."""
    config = helpers.replace(CONFIG, router={"kind": "experts"})
    with pytest.raises(UserError) as error:
        if act == "serve":
            storage.load_run(config, tuned[1])
        else:
            training.memory_run(config, model, FACTS, tuned[1], "")
    message = str(error.value)
    assert "router of kind uneven" in message and "--config.router.kind=experts" in message and "\n" not in message
    assert error.value.status == OTHER_RUN
