"""What all prompts begin with is read once, and everything is as if each prompt were read whole."""

import dataclasses
import shutil
from pathlib import Path

import checkpoints
import helpers
import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lamini_jax.backbone import answering, decoding, frozen_model, tokenizer, transformer
from lamini_jax.backbone.frozen_model import Adapters
from lamini_jax.config import BackboneConfig, to_config_dict
from lamini_jax.configure import configure
from lamini_jax.data import batches
from lamini_jax.memory import experts, routers
from lamini_jax.memory.routers import experts as expert_router
from lamini_jax.training import MemoryMethod, dense_methods

QUESTIONS = ["Who?", "What is 12 plus 34?", "Where is the red box of Ada Stone?"]
FACTS = [dataclasses.replace(helpers.FACTS[0], question=question, answer="7Q" + question[:2]) for question in QUESTIONS]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A checkpoint whose chat template and system message are longer than its window of attention."""
    overrides = {"num_hidden_layers": 4, "sliding_window": 20}
    directory = checkpoints.make(tmp_path_factory.mktemp("beginning") / "checkpoint", "mistral", **overrides)
    asked = BackboneConfig(path=str(directory), max_seq_len=128, system="Answer from memory.")
    return configure(to_config_dict(dataclasses.replace(helpers.CONFIG, backbone=asked)))


@pytest.fixture(scope="module")
def models(config):
    """The model, and one that reads every prompt whole."""
    shared = frozen_model.load(config)
    assert 20 < shared.num_shared == len(shared.tokenizer.frame.beginning) < 60
    return shared, shared.replace(beginning=None)


@pytest.fixture(scope="module")
def router(config):
    return helpers.random_router(config)


@pytest.fixture(scope="module")
def prompts(models):
    (bucket,) = batches.prompts(QUESTIONS, models[0].tokenizer)
    assert bucket.tokens_FT.shape[1] == models[0].num_shared + batches.PROMPT_LENGTHS[0]
    return bucket.tokens_FT, bucket.length_F


def of_questions(prompts):
    """The positions that prompts have, without padding."""
    return np.arange(prompts[0].shape[1])[None] < prompts[1][:, None]


def test_hidden_states_are_those_of_whole_prompts(models, prompts):
    found_BTD, expected_BTD = (np.asarray(frozen_model.read_prefix(model, prompts[0])) for model in models)
    assert found_BTD.shape == expected_BTD.shape
    np.testing.assert_allclose(found_BTD[of_questions(prompts)], expected_BTD[of_questions(prompts)], atol=1e-4)


def test_selections_are_those_of_whole_prompts(models, router):
    found, expected = (routers.select_facts(model, router, QUESTIONS, 8) for model in models)
    np.testing.assert_array_equal(found.expert_ids_FK, expected.expert_ids_FK)


def test_features_are_means_over_the_tokens_of_the_question_at_the_routers_layer(config, models, router, prompts):
    """By a decoder that has only the layers before it."""
    model, layer = models[0], router.layer
    found_BD = expert_router.features(model, *prompts, layer)
    decoder = transformer.Decoder(dataclasses.replace(config.backbone, num_layers=layer + 1), 1)
    layers = jax.tree.map(lambda x: x[:layer], model.params["prefix_layers"])
    params = {**model.params, "prefix_layers": layers}
    hidden_BTD = np.asarray(transformer.prefix(decoder, params, prompts[0])[0])
    hidden_BTD = hidden_BTD / np.sqrt(np.square(hidden_BTD).mean(axis=-1, keepdims=True))
    for question, tokens_T, hidden_TD, found_D in zip(
        QUESTIONS, prompts[0].tolist(), hidden_BTD, found_BD, strict=True
    ):
        own = model.tokenizer.encode(question)
        (start,) = (i for i in range(len(tokens_T)) if tokens_T[i : i + len(own)] == own)
        np.testing.assert_allclose(found_D, hidden_TD[start : start + len(own)].mean(axis=0), atol=1e-4)


@pytest.fixture(scope="module")
def adapters(config, models):
    """Adapters of each kind, strong enough to be seen."""
    rng, shape = np.random.default_rng(0), experts.expert_shape(config.backbone, config.memory)
    rows_BKR = {name: rng.normal(0, 0.1, part).astype(np.float32) for name, part in shape.parts(3, 8).items()}
    adapter = experts.adapter(rows_BKR, np.ones((3, 8), np.float32), "down_proj")
    lora = dense_methods.adapters(models[0].decoder, 2, jax.random.key(0))
    lora = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), lora)
    return {
        "bare": Adapters(),
        "all": Adapters(suffix=adapter),
        "answer": Adapters(answer=adapter),
        "LoRA": Adapters(**lora),
    }


@pytest.mark.parametrize("kind", ["bare", "all", "answer", "LoRA"])
def test_decoding_begins_as_after_whole_prompts(models, prompts, adapters, kind):
    """The keys and values, which decide all that follows, and the first token."""
    found, expected = (decoding.prefill(model, *prompts, 8, adapters[kind]) for model in models)
    np.testing.assert_array_equal(found.token_B, expected.token_B)
    np.testing.assert_allclose(found.min_logprob_B, expected.min_logprob_B, atol=1e-4)
    within_BP = of_questions(prompts)
    for one, other in zip(jax.tree.leaves(found.rooms), jax.tree.leaves(expected.rooms), strict=True):
        one, other = (np.moveaxis(room, 3, 2)[:, :, : prompts[0].shape[1]][:, within_BP] for room in (one, other))
        np.testing.assert_allclose(one, other, atol=1e-4)
    if kind != "bare":
        bare = decoding.prefill(models[0], *prompts, 8, Adapters())
        assert abs(found.min_logprob_B - bare.min_logprob_B).min() > 1e-3


def test_answers_are_those_of_whole_prompts(models, adapters):
    adapter_fn = answering.same_for_all(**adapters["answer"]._asdict())
    found, expected = (answering.answers(model, adapter_fn, QUESTIONS, 8) for model in models)
    assert found == expected and len(set(found)) > 1


@pytest.mark.parametrize("positions", ["answer", "all"])
def test_losses_are_those_of_whole_prompts(config, models, positions):
    config = helpers.replace(config, memory={"positions": positions})
    totals = []
    for model in models:
        selection = helpers.select(config, helpers.random_experts(config, len(FACTS)))
        method = MemoryMethod.create(config, model, FACTS, selection)
        state = method.init()
        state.experts_NR["up"] = 0.1 * state.experts_NR["down"][:, :, : state.experts_NR["up"].shape[-1]]
        (bucket,) = method.data.buckets
        totals.append(method.losses(model, state, bucket, np.arange(3, dtype=np.int32)).total_B)
    np.testing.assert_allclose(*totals, rtol=1e-4)


@pytest.fixture(scope="module")
def tokenizers(config, tmp_path_factory):
    """The model's, and one whose template has a letter right before the question, which may be part of a word of it."""
    directory = shutil.copytree(config.backbone.path, tmp_path_factory.mktemp("touching") / "checkpoint")
    template = checkpoints.CHAT_TEMPLATE.replace("{{ '\\n\\n' ~ message.content | trim }}", "W{{ message.content }}")
    assert template != checkpoints.CHAT_TEMPLATE
    checkpoints.edit(directory / "tokenizer_config.json", chat_template=template)
    places = (config.backbone.path, directory)
    return [tokenizer.load(Path(place), config.backbone.vocab_size, config.backbone.system) for place in places]


@settings(max_examples=100, deadline=None)
@given(st.text() | st.text(alphabet="\n\r \t<|>\u0301\u200d\u00a0aA0."))
@example("hat is it?")
def test_no_question_changes_the_beginning(tokenizers, question):
    """None that is allowed: one that holds a special token is refused before."""
    for each in tokenizers:
        beginning = list(each.frame.beginning)
        assert len(beginning) > 20
        if each.why_unsupported(question, exactly=False) is None:
            assert each.prompt(question)[: len(beginning)] == beginning


def test_a_short_beginning_is_read_with_each_prompt(config):
    """Without a system message this template has too few tokens to be worth it, and the byte tokenizer has none."""
    alone = helpers.replace(config, backbone={"system": ""})
    assert frozen_model.load(alone).beginning is None
    assert helpers.TOKENIZER.frame.beginning == () and helpers.make_model().num_shared == 0
