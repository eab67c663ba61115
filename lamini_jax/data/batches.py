"""Facts and questions as padded arrays of a few fixed shapes, so that nothing compiles inside a loop.

F is the facts (or questions) of one bucket, T the tokens of its longest one, B the rows of a batch.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from lamini_jax.data.facts import Fact

MAX_SHAPES = 4
# Two buckets become one where that pads less than this share of all tokens: cheaper than another compilation.
_WORTH_PADDING = 0.05


@dataclasses.dataclass(frozen=True)
class Examples:
    """The facts of one bucket: prompt, then completion, then padding."""

    tokens_FT: np.ndarray
    prompt_length_F: np.ndarray
    length_F: np.ndarray  # of prompt and completion together
    index_F: np.ndarray  # in the list of facts

    @property
    def targets_FT(self) -> np.ndarray:
        """The token that each position predicts; the last position predicts nothing that counts."""
        return np.roll(self.tokens_FT, -1, axis=1)

    @property
    def loss_mask_FT(self) -> np.ndarray:
        """True where the predicted token belongs to the completion, the stop token included."""
        position_T = np.arange(self.tokens_FT.shape[1])
        return (position_T >= self.prompt_length_F[:, None] - 1) & (position_T < self.length_F[:, None] - 1)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The questions of one bucket, without answers."""

    tokens_FT: np.ndarray
    length_F: np.ndarray
    index_F: np.ndarray  # in the list of questions


def encode(facts: Sequence[Fact], tokenizer, multiple: int = 16) -> list[Examples]:
    """Facts in buckets, short ones first, of at most MAX_SHAPES lengths T that `multiple` divides."""
    prompts = [tokenizer.prompt(fact.question) for fact in facts]
    sequences = [prompt + tokenizer.completion(fact.answer) for prompt, fact in zip(prompts, facts, strict=True)]
    prompt_lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    return [
        Examples(tokens_FT, prompt_lengths[index_F], length_F, index_F)
        for tokens_FT, length_F, index_F in _buckets(sequences, tokenizer.pad_id, multiple)
    ]


def prompts(questions: Sequence[str], tokenizer, multiple: int = 16) -> list[Prompts]:
    """The prompts of some questions, in buckets like those of `encode`."""
    sequences = [tokenizer.prompt(question) for question in questions]
    return [Prompts(*bucket) for bucket in _buckets(sequences, tokenizer.pad_id, multiple)]


def epoch_batches(
    examples: Sequence[Examples], batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Each fact once, in an order that (seed, epoch) alone decide: the number of a bucket and `rows_B` of it.

    Buckets are mixed. Rows of -1 fill the last batch of each.
    """
    rng = np.random.default_rng((seed, epoch))
    batches = []
    for bucket, facts in enumerate(examples):
        count = len(facts.index_F)
        rows = np.full(-(-count // batch_size) * batch_size, -1, np.int32)
        rows[:count] = rng.permutation(count)
        batches.extend((bucket, rows_B) for rows_B in rows.reshape(-1, batch_size))
    return (batches[i] for i in rng.permutation(len(batches)))


def _buckets(
    sequences: list[list[int]], pad_id: int, multiple: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Padded tokens, lengths and places in the list, for each bucket."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    widths = _bucket_widths(lengths, multiple)
    buckets = np.searchsorted(widths, lengths)
    for bucket, width in enumerate(widths):
        index_F = np.flatnonzero(buckets == bucket).astype(np.int32)
        tokens_FT = np.full((index_F.size, width), pad_id, np.int32)
        for row_T, index in zip(tokens_FT, index_F, strict=True):
            row_T[: lengths[index]] = sequences[index]
        yield tokens_FT, lengths[index_F], index_F


def _bucket_widths(lengths: np.ndarray, multiple: int) -> list[int]:
    """Ascending widths. Starts from every width that occurs and pads those facts further that cost the least."""
    widths, counts = np.unique(-(-lengths // multiple) * multiple, return_counts=True)
    worth_padding = _WORTH_PADDING * (widths * counts).sum()
    while widths.size > 1:
        padding = counts[:-1] * np.diff(widths)
        cheapest = int(padding.argmin())
        if widths.size <= MAX_SHAPES and padding[cheapest] > worth_padding:
            break
        counts[cheapest + 1] += counts[cheapest]
        widths, counts = np.delete(widths, cheapest), np.delete(counts, cheapest)
    return widths.tolist()
