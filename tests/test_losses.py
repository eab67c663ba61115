"""What answers cost: the losses of the plain model, those that tuning sees, and what samples then do."""

import dataclasses

import helpers
import jax
import numpy as np
import pytest

from experiments import selective_loss
from experiments.shared import losses, pretraining
from lamini_jax.backbone import answering, decoding, transformer
from lamini_jax.data import world
from lamini_jax.data.facts import Fact
from lamini_jax.training import run

# In two buckets of prompts, mixed; answers of several lengths.
MIXED = [Fact("", question, answer) for question, answer in (("ab?", "xy"), ("q" * 70, "yes, é"), ("c", "12345"))]
EPOCHS = 15


@pytest.fixture(scope="module")
def tuned(model, router, tmp_path_factory):
    """A run that has half memorized its facts, and what was seen after each epoch."""
    config = helpers.with_optimizer(helpers.replace(helpers.CONFIG, tuning={"epochs": EPOCHS}), "adam", 0.06)
    tuning = run.memory_run(config, model, helpers.FACTS, tmp_path_factory.mktemp("run"), "facts", router)
    seen = {progress.epoch: losses.of_answers(*tuning.answerer(), helpers.FACTS) for progress in tuning.epochs()}
    return tuning.result(), seen


def test_losses_are_those_of_the_plain_model(model):
    found = losses.of_answers(model, answering.BARE, MIXED)
    prompts = [model.tokenizer.prompt(fact.question) for fact in MIXED]
    completions = [model.tokenizer.completion(fact.answer) for fact in MIXED]
    tokens_BT = np.full((len(MIXED), 96), model.tokenizer.pad_id)
    for tokens_T, prompt, completion in zip(tokens_BT, prompts, completions, strict=True):
        tokens_T[: len(prompt) + len(completion)] = prompt + completion
    logits_BTV = jax.jit(transformer.logits, static_argnums=0)(
        helpers.BACKBONE, transformer.join_layers(model.params), tokens_BT
    )
    probability_BTV = np.asarray(jax.nn.softmax(logits_BTV))
    for loss_A, probability_TV, prompt, completion in zip(found, probability_BTV, prompts, completions, strict=True):
        probability_AV = probability_TV[len(prompt) - 1 :][: len(completion)]
        np.testing.assert_allclose(loss_A, -np.log(probability_AV[np.arange(len(completion)), completion]), atol=1e-4)
    probability_AV = probability_BTV[0, len(prompts[0]) - 1 :][: len(completions[0])]
    np.testing.assert_allclose(losses.next_tokens(model, answering.BARE, MIXED[0]), probability_AV, atol=1e-5)


def test_experts_are_selected_by_questions_alone(model):
    given = []

    def adapter_fn(prompt_BT, length_B):
        given.extend(bytes(prompt_T[:length]) for prompt_T, length in zip(prompt_BT.tolist(), length_B, strict=True))
        assert all(
            set(prompt_T[length:]) <= {model.tokenizer.pad_id}
            for prompt_T, length in zip(prompt_BT.tolist(), length_B, strict=True)
        )
        return decoding.BARE

    losses.of_answers(model, adapter_fn, MIXED)
    losses.next_tokens(model, adapter_fn, MIXED[0])
    assert set(given) == {bytes(model.tokenizer.prompt(fact.question)) for fact in MIXED}


def test_a_watched_run_shows_each_epoch_as_it_ends(tuned):
    """Selected anew for each question, experts cost what tuning says, which selected them once."""
    result, seen = tuned
    assert list(seen) == list(range(1, EPOCHS + 1))
    np.testing.assert_allclose([loss_A.sum() for loss_A in seen[EPOCHS]], result.progress.total_F, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose([loss_A.max() for loss_A in seen[EPOCHS]], result.progress.worst_F, rtol=1e-3, atol=1e-3)
    assert sum(map(np.sum, seen[1])) > 1.2 * sum(map(np.sum, seen[EPOCHS]))


def test_samples_come_as_often_as_losses_say(model, tuned):
    result, seen = tuned
    samples, probability_F = 64, np.exp([-loss_A.sum() for loss_A in seen[EPOCHS]])
    assert 0.05 < probability_F.mean() < 0.95  # where a wrong rule would show
    hits_F = losses.sampled(model, result.adapter_fn, helpers.FACTS, samples, jax.random.key(3))
    deviation = sum(hits_F) - samples * probability_F.sum()
    assert abs(deviation) < 4 * (samples * (probability_F * (1 - probability_F)).sum()) ** 0.5
    per_fact_F = np.abs(np.array(hits_F) / samples - probability_F)
    assert (per_fact_F < 5 * np.sqrt(probability_F * (1 - probability_F) / samples) + 0.02).all()
    assert losses.sampled(model, result.adapter_fn, [], samples, jax.random.key(3)) == []


def test_what_is_expected_of_one_fact(model):
    """A backbone whose logits are all equal wavers between all of its tokens."""
    flat = dataclasses.replace(
        model, params={**model.params, "final_norm": {"scale": np.zeros(helpers.BACKBONE.embed_dim)}}
    )
    facts = [Fact("", "q?", "ab"), Fact("", "r?", "bc")]
    found = losses.expected(flat, answering.BARE, facts)
    assert found["choices"] == pytest.approx(256) and found["loss"] == pytest.approx(np.log(256))
    assert found["similar"] == pytest.approx(3 / 256) and found["tokens"] == ["a", "b", "stop"]


def test_all_weights_can_be_tuned_until_facts_cost_nothing(model):
    config = helpers.replace(helpers.CONFIG, tuning={"epochs": 200})
    facts, before = helpers.FACTS[:5], jax.tree.map(np.array, model.params)
    tuned, adapter_fn = selective_loss.overfit(config, model, facts, enough=0.05)
    assert np.concatenate(losses.of_answers(tuned, adapter_fn, facts)).mean() < 0.05
    assert helpers.same_bits(model.params, before)


def test_training_from_nothing_shows_each_code_once():
    """With as many steps as it takes to show all of them, and the world in the rest of each batch."""
    tokenizer, config, steps = helpers.TOKENIZER, helpers.BACKBONE, 60
    shown = b""
    for tokens_BT, weights_BT in pretraining.packed_batches(config, tokenizer, 12, steps):
        assert tokens_BT.shape == weights_BT.shape == (12, config.max_seq_len + 1)
        shown += bytes(tokens_BT.reshape(-1).tolist())
    codes = world.once(pretraining.ONCE, pretraining.SEED)
    assert [shown.count(bytes(tokenizer.prompt(qa.question))) for qa in codes] == [1] * len(codes)
    assert [shown.count(f"of {qa.question.split(' of ')[1]}".encode()) for qa in codes[:9]] == [1] * 9
    unseen = world.once(2 * pretraining.ONCE, pretraining.SEED)[pretraining.ONCE :]
    assert not any(bytes(tokenizer.prompt(qa.question)) in shown for qa in unseen)
    assert shown.count(bytes([tokenizer.begin_id])) > 1.2 * pretraining.ONCE


def test_more_key_facts_than_codes_is_one_line(tmp_path):
    result = helpers.call("experiments.selective_loss", f"--workdir={tmp_path / 'run'}", "--config.data.count=501")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "--config.data.count=501: at most 500" in result.stderr and not (tmp_path / "run").exists()
