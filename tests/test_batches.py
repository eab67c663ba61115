"""Batches: a few fixed shapes, every fact once per epoch, and a loss on the completion and on nothing else."""

import numpy as np
import pytest

from lamini_jax.backbone.tokenizer import ByteTokenizer
from lamini_jax.data import batches
from lamini_jax.data.facts import Fact

TOKENIZER = ByteTokenizer()


def some_facts(count, seed=0):
    """Facts of 4 to about 250 tokens, with a long tail like that of real questions."""
    rng = np.random.default_rng(seed)
    sizes = np.minimum(rng.geometric(1 / 30, size=(count, 2)), 120)
    return [Fact(str(i), f"{i}?" + "q" * a, "é" + "a" * b) for i, (a, b) in enumerate(sizes.tolist())]


def test_rows_hold_prompt_completion_and_padding():
    facts = some_facts(300)
    seen = []
    for bucket in batches.encode(facts, TOKENIZER):
        assert bucket.tokens_FT.dtype == np.int32
        for tokens_T, prompt_length, length, index in zip(
            bucket.tokens_FT, bucket.prompt_length_F, bucket.length_F, bucket.index_F, strict=True
        ):
            assert tokens_T[:prompt_length].tolist() == TOKENIZER.prompt(facts[index].question)
            assert tokens_T[prompt_length:length].tolist() == TOKENIZER.completion(facts[index].answer)
            assert (tokens_T[length:] == TOKENIZER.pad_id).all()
            seen.append(index)
    assert sorted(seen) == list(range(300))


def test_targets_are_exactly_the_completion():
    facts = some_facts(300)
    for bucket in batches.encode(facts, TOKENIZER):
        assert bucket.targets_FA.shape == (len(bucket.index_F), bucket.answer_length_F.max())
        for fact in range(len(bucket.index_F)):
            completion = TOKENIZER.completion(facts[bucket.index_F[fact]].answer)
            start, length = bucket.start_F[fact], bucket.answer_length_F[fact]
            assert bucket.targets_FA[fact, :length].tolist() == completion
            assert bucket.tokens_FT[fact, start + 1 : start + 1 + length].tolist() == completion


def test_targets_by_hand():
    (bucket,) = batches.encode([Fact("", "ab", "xyz")], TOKENIZER, batches.Padding(10))
    begin, answer, stop, pad = TOKENIZER.begin_id, TOKENIZER.answer_id, TOKENIZER.stop_id, TOKENIZER.pad_id
    assert bucket.tokens_FT.tolist() == [[begin, *b"ab", answer, *b"xyz", stop, pad, pad]]
    assert (bucket.start_F.tolist(), bucket.answer_length_F.tolist()) == ([3], [4])
    assert bucket.targets_FA.tolist() == [[*b"xyz", stop]]


def test_prompts_are_prompts_alone():
    questions = [fact.question for fact in some_facts(300)]
    seen = []
    for bucket in batches.prompts(questions, TOKENIZER):
        for tokens_T, length, index in zip(bucket.tokens_FT, bucket.length_F, bucket.index_F, strict=True):
            assert tokens_T[:length].tolist() == TOKENIZER.prompt(questions[index])
            assert (tokens_T[length:] == TOKENIZER.pad_id).all()
            seen.append(index)
    assert sorted(seen) == list(range(300))


@pytest.mark.parametrize("multiple", [1, 16, 64])
@pytest.mark.parametrize("count", [1, 10, 1000])
def test_shapes_are_few_and_rounded(count, multiple):
    buckets = batches.encode(some_facts(count), TOKENIZER, batches.Padding(multiple))
    widths = [bucket.tokens_FT.shape[1] for bucket in buckets]
    assert len(widths) <= batches.MAX_SHAPES
    assert widths == sorted(set(widths))
    assert all(width % multiple == 0 for width in widths)
    assert all(bucket.length_F.max() > bucket.tokens_FT.shape[1] - multiple for bucket in buckets)


def test_a_few_short_facts_cost_no_shape():
    facts = [Fact("", "q" * 5, "a")] * 3 + [Fact("", "q" * 50, "a")] * 500 + [Fact("", "q" * 200, "a")] * 500
    shapes = [bucket.tokens_FT.shape for bucket in batches.encode(facts, TOKENIZER, batches.Padding(16))]
    assert shapes == [(503, 64), (500, 208)]


def test_nothing_to_encode():
    assert batches.encode([], TOKENIZER) == batches.prompts([], TOKENIZER) == []


@pytest.mark.parametrize("batch_size", [1, 7, 32, 2000])
def test_every_fact_once_per_epoch(batch_size):
    examples = batches.encode(some_facts(500), TOKENIZER)
    seen = []
    for bucket, index_B in batches.epoch_batches(examples, batch_size, seed=0, epoch=3):
        assert index_B.shape == (min(batch_size, len(examples[bucket].index_F)),)
        assert (index_B >= 0).any()
        seen.extend(examples[bucket].index_F[index_B[index_B >= 0]])
    assert sorted(seen) == list(range(500))


def order(examples, seed, epoch):
    return [(bucket, index_B.tolist()) for bucket, index_B in batches.epoch_batches(examples, 16, seed, epoch)]


def test_order_depends_on_seed_and_epoch_alone():
    examples = batches.encode(some_facts(500), TOKENIZER)
    first = order(examples, 0, 5)
    order(examples, 0, 6)
    assert order(examples, 0, 5) == first
    assert first != order(examples, 0, 6)
    assert first != order(examples, 1, 5)


def test_buckets_are_mixed():
    examples = batches.encode(some_facts(2000), TOKENIZER)
    buckets = [bucket for bucket, _ in order(examples, 0, 0)]
    changes = sum(a != b for a, b in zip(buckets, buckets[1:], strict=False))
    assert len(examples) > 1
    assert changes > len(buckets) / 4
