"""Decoding with a cache returns what reading everything anew for each token would."""

import dataclasses

import helpers
import jax
import numpy as np
import pytest

from lamini_jax.backbone import decoding, transformer
from lamini_jax.backbone.tokenizer import ByteTokenizer

LENGTHS = np.array([3, 10, 64, 37], np.int32)
LONGEST = 24


@pytest.fixture(scope="module")
def prompt_BT():
    """Prompts of different lengths, padded with what must not be read."""
    return np.random.default_rng(0).integers(256, size=(len(LENGTHS), 64)).astype(np.int32)


def reading_everything_anew(model, prompt_BT, length_B, steps):
    """The likeliest tokens, one forward pass of the whole model for each."""
    config, params = model.decoder.config, transformer.join_layers(model.params)
    logits = jax.jit(lambda tokens_BT: transformer.logits(config, params, tokens_BT))
    index_B = np.arange(len(length_B))
    tokens_BT = np.zeros((len(length_B), prompt_BT.shape[1] + steps), np.int32)
    tokens_BT[:, : prompt_BT.shape[1]] = prompt_BT
    answer_BA = np.empty((len(length_B), steps), np.int32)
    for step in range(steps):
        logits_BTV = np.asarray(logits(tokens_BT))
        answer_BA[:, step] = logits_BTV[index_B, length_B + step - 1].argmax(axis=-1)
        tokens_BT[index_B, length_B + step] = answer_BA[:, step]
    return answer_BA


@pytest.fixture(scope="module")
def expected_BA(model, prompt_BT):
    return reading_everything_anew(model, prompt_BT, LENGTHS, LONGEST)


@pytest.fixture(scope="module")
def stop_id(expected_BA):
    """A token at which one answer stops midway, while another never stops."""
    for token in np.unique(expected_BA[:, 2 : LONGEST // 2]):
        stops_BA = expected_BA == token
        if not stops_BA[:, :2].any() and not stops_BA.any(axis=1).all():
            return int(token)
    pytest.fail("every answer of the random backbone stops; choose another seed")


def stopped(answer_BA, stop_id, longest):
    """Answers of at most `longest` tokens, nothing but the stop token from the first one on."""
    answer_BA = np.array(answer_BA)
    for answer_A in answer_BA:
        stops = np.flatnonzero(answer_A == stop_id)
        answer_A[min([longest, *stops]) :] = stop_id
    return answer_BA


@dataclasses.dataclass(frozen=True)
class OtherStops(ByteTokenizer):
    """Answers end with these tokens."""

    stop_ids: tuple[int, ...]


def stopping(model, *stop_ids):
    """The model with other stop tokens."""
    return model.replace(tokenizer=OtherStops(stop_ids))


def greedy(model, prompt_BT, length_B, longest, stop_id):
    return np.asarray(decoding.generate(stopping(model, stop_id), prompt_BT, length_B, longest)[0])


def test_with_the_cache_as_without(model, prompt_BT, expected_BA, stop_id):
    answer_BA = greedy(model, prompt_BT, LENGTHS, LONGEST, stop_id)
    assert answer_BA.shape == (len(LENGTHS), helpers.BACKBONE.max_seq_len)
    assert (answer_BA[:, :LONGEST] == stopped(expected_BA, stop_id, LONGEST)).all()


def test_nothing_after_the_stop_token(model, prompt_BT, stop_id):
    answer_BA = greedy(model, prompt_BT, LENGTHS, LONGEST, stop_id)
    lengths = [np.flatnonzero(answer_A == stop_id)[0] for answer_A in answer_BA]
    assert min(lengths) < LONGEST == max(lengths)
    for answer_A, length in zip(answer_BA, lengths, strict=True):
        assert (answer_A[length:] == stop_id).all()


def test_at_most_longest_tokens_and_one_compilation_for_all(model, prompt_BT, expected_BA, stop_id):
    greedy(model, prompt_BT, LENGTHS, LONGEST, stop_id)
    compilations = decoding.prefill._cache_size(), decoding.decode._cache_size()
    for longest in (1, 2, 13):
        answer_BA = greedy(model, prompt_BT, LENGTHS, longest, stop_id)
        assert (answer_BA[:, :LONGEST] == stopped(expected_BA, stop_id, longest)).all()
        assert (answer_BA[:, LONGEST:] == stop_id).all()
    assert (decoding.prefill._cache_size(), decoding.decode._cache_size()) == compilations


def test_padding_is_never_read(model, prompt_BT, stop_id):
    before_BA = greedy(model, prompt_BT, LENGTHS, LONGEST, stop_id)
    padding_BT = np.arange(prompt_BT.shape[1]) >= LENGTHS[:, None]
    after_BA = greedy(model, np.where(padding_BT, 255 - prompt_BT, prompt_BT), LENGTHS, LONGEST, stop_id)
    assert (after_BA == before_BA).all()


def test_a_long_neighbour_takes_no_room_from_an_answer(model, prompt_BT, stop_id):
    """Each answer may be as long as the longest sequence leaves room beside its own prompt."""
    room = helpers.BACKBONE.max_seq_len
    lengths = np.array([3, 10, 64, room - 5], np.int32)
    wide_BT = np.tile(prompt_BT, (1, room // prompt_BT.shape[1]))
    answer_BA = greedy(model, wide_BT, lengths, room, stop_id)
    for row, length in enumerate(lengths):
        alone_BA = greedy(model, np.tile(wide_BT[row], (len(lengths), 1)), np.full_like(lengths, length), room, stop_id)
        assert (answer_BA[row] == alone_BA[0]).all()
        assert (answer_BA[row, room - length :] == stop_id).all()


def test_answers_go_on_where_steps_look_further(model, prompt_BT, stop_id, monkeypatch):
    """Short prompts, whose answers outgrow the positions that the first steps look at."""
    arguments = stopping(model, stop_id), prompt_BT[:, :16], np.minimum(LENGTHS, 16), LONGEST
    at_once_BA, probability_B = decoding.generate(*arguments)
    compilations = decoding.decode._cache_size()
    monkeypatch.setattr(decoding, "_LEAST_REACH", 16)
    answer_BA, in_turns_B = decoding.generate(*arguments)
    assert decoding.decode._cache_size() == compilations + 2  # 32 positions, then 64
    assert (np.asarray(answer_BA) == at_once_BA).all()
    np.testing.assert_allclose(in_turns_B, probability_B, rtol=1e-4)


def test_any_of_several_tokens_stops(model, prompt_BT, expected_BA, stop_id):
    """The answer ends before it, and is filled up with the first of them."""
    filler = int(np.setdiff1d(np.arange(256), expected_BA)[0])
    answer_BA, _ = decoding.generate(stopping(model, filler, stop_id), prompt_BT, LENGTHS, LONGEST)
    alone_BA = greedy(model, prompt_BT, LENGTHS, LONGEST, stop_id)
    for answer_A, alone_A in zip(np.asarray(answer_BA), alone_BA, strict=True):
        length = np.flatnonzero(alone_A == stop_id)[0]
        assert (answer_A[:length] == alone_A[:length]).all()
        assert (answer_A[length + 1 :] == filler).all()


def test_token_by_token_as_at_once(model, prompt_BT, stop_id):
    """What is streamed is what would have been said at once."""
    model = stopping(model, stop_id)
    state = decoding.prefill(model, prompt_BT, LENGTHS, LONGEST)
    for step in range(1, LONGEST + 2):
        state = decoding.decode(model, state, step, reach=decoding.reach_for(state, prompt_BT.shape[1] + step))
    answer_BA, probability_B = decoding.generate(model, prompt_BT, LENGTHS, LONGEST)
    assert helpers.same_bits(state.answer_BA, answer_BA)
    assert helpers.same_bits(state.probability_B, probability_B)


def test_the_least_probability_is_that_of_the_least_likely_token(model, prompt_BT, stop_id):
    """Of the answer's tokens, its stop token included where it was said."""
    answer_BA, probability_B = decoding.generate(stopping(model, stop_id), prompt_BT, LENGTHS, LONGEST)
    config, params = model.decoder.config, transformer.join_layers(model.params)
    for prompt_T, length, answer_A, probability in zip(prompt_BT, LENGTHS, answer_BA, probability_B, strict=True):
        said = np.asarray(answer_A)[: min(LONGEST, np.flatnonzero(np.asarray(answer_A) == stop_id)[0] + 1)]
        tokens_BT = np.concatenate([prompt_T[:length], said])[None]
        log_BTV = jax.nn.log_softmax(transformer.logits(config, params, tokens_BT))
        least = min(float(log_BTV[0, length - 1 + i, token]) for i, token in enumerate(said))
        assert np.log(probability) == pytest.approx(least, abs=1e-4)


def test_samples_follow_the_probabilities(model, prompt_BT):
    """The first tokens of many answers to one prompt, against softmax(logits / temperature)."""
    count, temperature = 4096, 0.7
    prompts_BT, lengths_B = np.tile(prompt_BT[1], (count, 1)), np.full(count, LENGTHS[1])
    sampling = decoding.Sampling(jax.random.key(0), np.float32(temperature))
    state = decoding.prefill(model, prompts_BT, lengths_B, 1, sampling=sampling)
    logits_BTV = transformer.logits(
        model.decoder.config, transformer.join_layers(model.params), prompt_BT[1:2, : LENGTHS[1]]
    )
    expected_V = np.asarray(jax.nn.softmax(logits_BTV[0, -1] / temperature))
    found_V = np.bincount(np.asarray(state.token_B), minlength=expected_V.size) / count
    assert np.abs(found_V - expected_V).max() < 4 * (expected_V.max() / count) ** 0.5
    assert np.count_nonzero(found_V) > 10


def test_with_the_cache_as_without_in_other_families(prompt_BT):
    """A window shorter than the prompts, biases, norms of heads, and scaled rotary positions."""
    changes = {"sliding_window": 7, "qkv_bias": True, "qk_norm": True, "tied_embeddings": False}
    changes |= {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_max_seq_len": 32}
    model = helpers.make_model(helpers.replace(helpers.CONFIG, backbone=changes), seed=1)
    expected_BA = reading_everything_anew(model, prompt_BT, LENGTHS, 8)
    answer_BA = greedy(model, prompt_BT, LENGTHS, 8, 256)
    assert (answer_BA[:, :8] == expected_BA).all()
