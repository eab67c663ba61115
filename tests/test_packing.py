"""Logits are computed for the tokens of answers alone, and their losses are those that logits of everything give."""

import re

import helpers
import jax
import numpy as np
import pytest

from lamini_jax.backbone import frozen_model, transformer
from lamini_jax.data import batches
from lamini_jax.training import MemoryMethod

LENGTHS = [0, 1, 2, 3, 5, 5]  # of answers, 16 tokens together
A = 5


def unpacked(model, hidden_BAD, targets_BA, length_B):
    """Losses from logits of all positions, and which tokens are the likeliest."""
    logits_BAV = np.asarray(transformer.unembed(model.decoder, model.params, hidden_BAD), np.float64)
    right_BA = np.take_along_axis(logits_BAV, targets_BA[:, :, None], axis=-1)[:, :, 0]
    counted_BA = np.arange(A) < length_B[:, None]
    loss_BA = np.log(np.exp(logits_BAV).sum(axis=-1)) - right_BA
    return np.where(counted_BA, loss_BA, 0), ~counted_BA | (right_BA == logits_BAV.max(axis=-1))


@pytest.mark.parametrize("most", [16, 24, 1000])
def test_losses_are_those_of_all_logits(model, most):
    rng, packed = np.random.default_rng(most), jax.jit(frozen_model.token_losses, static_argnums=4)
    for _ in range(8):
        length_B = rng.permutation(LENGTHS)
        hidden_BAD = rng.normal(size=(len(LENGTHS), A, helpers.BACKBONE.embed_dim)).astype(np.float32)
        targets_BA = rng.integers(256, size=(len(LENGTHS), A)).astype(np.int32)
        logits_BAV = np.asarray(transformer.unembed(model.decoder, model.params, hidden_BAD))
        likeliest_BA = rng.random(targets_BA.shape) < 0.5
        targets_BA = np.where(likeliest_BA, logits_BAV.argmax(axis=-1), targets_BA).astype(np.int32)
        losses_BA, found_BA = packed(model, hidden_BAD, targets_BA, length_B, most)
        expected_BA, right_BA = unpacked(model, hidden_BAD, targets_BA, length_B)
        np.testing.assert_allclose(losses_BA, expected_BA, atol=1e-4)
        np.testing.assert_array_equal(found_BA, right_BA)


def test_there_is_room_for_the_longest_answers_of_any_batch():
    facts = [fact for length in (3, 9, 1, 4) for fact in helpers.some_facts(4, answer_length=length)]
    (examples,) = batches.encode(facts, helpers.TOKENIZER)
    rng = np.random.default_rng(0)
    for count in (1, 3, 8, 16):
        most = examples.most_tokens(count)
        drawn = [examples.answer_length_F[rng.permutation(len(facts))[:count]].sum() for _ in range(200)]
        assert max(drawn) <= most and most % 8 == 0
    assert examples.most_tokens(4) == 40 and examples.most_tokens(16) == 88  # stop tokens included


@pytest.mark.parametrize("positions", ["answer", "all"])
def test_a_step_makes_no_logits_of_padding(model, positions):
    """Of 8 answers one is long: nothing has as many logits as 8 long ones."""
    facts = [*helpers.some_facts(7), helpers.some_facts(8, answer_length=20)[7]]
    config = helpers.replace(helpers.CONFIG, memory={"positions": positions})
    selection = helpers.select(config, helpers.random_experts(config, len(facts)))
    method = MemoryMethod.create(config, model, facts, selection, padding=batches.Padding(64))
    (bucket,), V = method.data.buckets, helpers.BACKBONE.vocab_size
    padded, packed = 8 * bucket.targets_FA.shape[1] * V, bucket.most_tokens * V

    def logits(facts):
        """The sizes of everything in a step that is as wide as the vocabulary."""
        text = str(jax.make_jaxpr(method.step)(model, method.init(), facts, np.arange(8, dtype=np.int32)))
        shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]", text)}
        return {int(np.prod(shape)) for shape in shapes if shape[-1] == V}

    assert packed < padded / 2
    assert packed in logits(bucket) and max(logits(bucket)) < padded
    assert padded in logits(bucket.replace(most_tokens=10**6))
