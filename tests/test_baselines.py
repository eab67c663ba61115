"""LoRA and full fine-tuning start as the bare backbone, learn the facts, and leave the frozen backbone as it is."""

import helpers
import jax
import numpy as np
import pytest
from helpers import FACTS

from lamini_jax.backbone import answering, linear_layers, transformer
from lamini_jax.evaluation import recall
from lamini_jax.training import FullMethod, LoraMethod, loop

# At a rate for the baseline's whole budget, most facts are recalled in a few epochs.
CONFIG = helpers.replace(helpers.CONFIG, tuning={"epochs": 8})


@pytest.fixture(scope="module")
def bare_losses_F(model):
    """Of each fact the sum over its answer's tokens, by the plain logits."""
    whole = transformer.join_layers(model.params)
    (bucket,) = helpers.batches.encode(FACTS, model.tokenizer)
    logits_FTV = jax.jit(lambda tokens_FT: transformer.logits(helpers.BACKBONE, whole, tokens_FT))(bucket.tokens_FT)
    log_probabilities_FTV = np.asarray(jax.nn.log_softmax(logits_FTV))
    targets_FT, mask_FT = helpers.next_tokens(bucket)
    losses_FT = -np.take_along_axis(log_probabilities_FTV, targets_FT[:, :, None], axis=-1)[:, :, 0]
    losses_F = np.empty(len(FACTS), np.float32)
    losses_F[bucket.index_F] = losses_FT.sum(axis=1, where=mask_FT)
    return losses_F


@pytest.fixture(scope="module", params=[LoraMethod, FullMethod])
def method(model, request):
    return request.param.create(CONFIG, model, FACTS)


def test_starts_as_the_bare_backbone_and_learns(model, method, bare_losses_F):
    frozen = jax.tree.map(np.array, model)
    state, progress = method.init(), loop.new_progress(len(FACTS))
    loop.check(method, state, progress)
    np.testing.assert_allclose(progress.total_F, bare_losses_F, rtol=1e-4)
    np.testing.assert_allclose(helpers.losses_served(*method.adapter(state), FACTS), bare_losses_F, rtol=1e-4)

    state, progress = helpers.train(method, 8)
    assert progress.total_F.sum() < 0.8 * bare_losses_F.sum()
    np.testing.assert_allclose(helpers.losses_served(*method.adapter(state), FACTS), progress.total_F, rtol=1e-3)
    assert helpers.same_bits(model, frozen)
    assert recall.recalled(model, answering.BARE, FACTS[:1])[1] != [FACTS[0].answer]


def test_a_step_donates_its_state(model, method):
    """And with it nothing of the frozen backbone."""
    state = method.init()
    method.step(model, state, method.data.buckets[0], np.arange(8, dtype=np.int32))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trained))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(model))


def test_lora_starts_with_down_random_and_up_at_zero(model):
    fresh = LoraMethod.create(CONFIG, model, FACTS).init().trained
    assert set(fresh) == {"prefix", "suffix"}
    for part in fresh.values():
        assert set(part) == set(linear_layers.LINEAR_LAYERS)
        assert all(np.asarray(low_rank.down).all() and not np.asarray(low_rank.up).any() for low_rank in part.values())


def test_full_fine_tuning_is_another_backbone(model):
    """Its weights have no fingerprint of the frozen ones', so that no memory is ever put beside them."""
    method = FullMethod.create(CONFIG, model.replace(fingerprint="frozen"), FACTS)
    tuned, _ = method.adapter(method.init())
    assert tuned.fingerprint != "frozen" == method.model.fingerprint
