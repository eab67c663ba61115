"""Facts and questions as padded arrays of a few fixed shapes, so that nothing compiles inside a loop.

F is the facts (or questions) of one bucket, T the tokens of its longest one, A those of its longest answer, C the most
choices that a context has, B the rows of a batch.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from lamini_jax.data.benchmarks import MultipleChoice
from lamini_jax.data.facts import Fact

MAX_SHAPES = 2
# Two buckets are merged if that pads less than this share of all tokens: cheaper than another compilation.
_WORTH_PADDING = 0.15
# The padded length of a prompt does not depend on the other questions: a fact must select the same experts when it is
# tuned and when it is asked for, and sums over another length are rounded differently.
# What all prompts begin with, if it is read apart, comes in addition.
PROMPT_LENGTHS = (32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Padding:
    """What the axes of a bucket are rounded up to, so that few shapes compile.

    Of a few facts, which take less time than a compilation, so is everything else: facts to a power of two.
    """

    tokens: int = 8
    answer: int = 1
    few: bool = False


MANY = Padding()
FEW = Padding(tokens=32, answer=16, few=True)


@dataclasses.dataclass(frozen=True)
class TokenizedFacts:
    """The facts of one bucket: prompt, then completion, then padding."""

    tokens_FT: np.ndarray
    prompt_length_F: np.ndarray
    length_F: np.ndarray  # of prompt and completion together
    index_F: np.ndarray  # in the list of facts
    padding: Padding = MANY

    @property
    def rows(self) -> int:
        """The facts of the bucket, and those that fill it up."""
        count = len(self.index_F)
        return 1 << (count - 1).bit_length() if self.padding.few else count

    @property
    def answer_width(self) -> int:
        """A, the tokens of the longest answer and perhaps more."""
        return -(-int(self.answer_length_F.max()) // self.padding.answer) * self.padding.answer

    @property
    def start_F(self) -> np.ndarray:
        """The position that predicts the first token of the completion."""
        return self.prompt_length_F - 1

    @property
    def answer_length_F(self) -> np.ndarray:
        """Tokens of the completion, the stop token included."""
        return self.length_F - self.prompt_length_F

    def most_tokens(self, count: int) -> int:
        """The most answer tokens that `count` of the facts have together, rounded up to a multiple of 8."""
        if self.padding.few:
            return count * self.answer_width
        return int(-(-np.sort(self.answer_length_F)[-count:].sum() // 8) * 8)

    @property
    def targets_FA(self) -> np.ndarray:
        """The tokens of the completions; what follows a shorter one is ignored."""
        places_FA = self.prompt_length_F[:, None] + np.arange(self.answer_width)[None]
        return np.take_along_axis(self.tokens_FT, np.minimum(places_FA, self.tokens_FT.shape[1] - 1), axis=1)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The questions of one bucket, without answers."""

    tokens_FT: np.ndarray
    length_F: np.ndarray
    index_F: np.ndarray  # in the list of questions


@dataclasses.dataclass(frozen=True)
class Choices:
    """Contexts of one bucket, each with the choices (C) that share all tokens but their last."""

    tokens_FT: np.ndarray  # the context, then the choices' shared tokens
    start_F: np.ndarray  # the position that predicts the first token of the choices
    length_F: np.ndarray  # tokens of each choice
    targets_FAC: np.ndarray  # the choices' tokens; what follows a shorter one is ignored
    item_F: np.ndarray  # in the list of items
    choice_FC: np.ndarray  # which of the item's choices; -1: none


def encode(facts: Sequence[Fact], tokenizer, padding: Padding = MANY) -> list[TokenizedFacts]:
    """Facts in buckets, short ones first, of at most MAX_SHAPES lengths T."""
    prompts = [tokenizer.prompt(fact.question) for fact in facts]
    sequences = [prompt + tokenizer.completion(fact.answer) for prompt, fact in zip(prompts, facts, strict=True)]
    prompt_lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    widths = _bucket_widths(np.array([len(sequence) for sequence in sequences]), padding.tokens)
    return [
        TokenizedFacts(tokens_FT, prompt_lengths[index_F], length_F, index_F, padding)
        for tokens_FT, length_F, index_F in _buckets(sequences, widths, tokenizer.pad_id)
    ]


def prompts(questions: Sequence[str], tokenizer) -> list[Prompts]:
    """The prompts of some questions, in buckets of PROMPT_LENGTHS (then its doubles)."""
    sequences = [tokenizer.prompt(question) for question in questions]
    widths = _prompt_widths(sequences, len(tokenizer.frame.beginning))
    return [Prompts(*bucket) for bucket in _buckets(sequences, widths, tokenizer.pad_id)]


def choices(items: Sequence[MultipleChoice], tokenizer) -> list[Choices]:
    """The choices of some items, in buckets of PROMPT_LENGTHS (then its doubles).

    Choices of an item that differ only in their last token share one sequence: a model never reads that token.
    """
    found: dict[tuple, list[tuple[int, int]]] = {}
    for index, item in enumerate(items):
        for choice, text in enumerate(item.choices):
            context, (*shared, last) = tokenizer.continuation(item.context, text)
            found.setdefault((index, tuple(context), tuple(shared)), []).append((choice, last))
    keys, ends = list(found), list(found.values())
    sequences = [[*context, *shared] for _, context, shared in keys]
    return [
        _choices(tokens_FT, [keys[row] for row in index_F], [ends[row] for row in index_F])
        for tokens_FT, _, index_F in _buckets(sequences, _prompt_widths(sequences), tokenizer.pad_id)
    ]


def epoch_batches(
    examples: Sequence[TokenizedFacts], batch_size: int, seed: int, epoch: int, active: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Each fact once, in an order that depends only on (seed, epoch): a bucket's number and `index_B` of its facts.

    Batches of the buckets alternate at random; a bucket with fewer facts than a batch has smaller batches. -1 fills the
    last batch of each. `active` (one bool per fact) leaves some facts out.
    """
    rng = np.random.default_rng((seed, epoch))
    batches = []
    for bucket, facts in enumerate(examples):
        order = rng.permutation(len(facts.index_F)).astype(np.int32)
        if active is not None:
            order = order[active[facts.index_F[order]]]
        for index_B in in_order(order.size, min(batch_size, facts.rows)):
            batches.append((bucket, np.where(index_B >= 0, order[index_B], -1)))
    return (batches[i] for i in rng.permutation(len(batches)))


def in_order(count: int, batch_size: int) -> Iterator[np.ndarray]:
    """`index_B` of 0 to count - 1, in order; -1 fills the last batch."""
    index = np.full(-(-count // batch_size) * batch_size, -1, np.int32)
    index[:count] = np.arange(count)
    return iter(index.reshape(-1, batch_size))


def _choices(tokens_FT: np.ndarray, keys: list, ends: list[list[tuple[int, int]]]) -> Choices:
    """A bucket, from the (item, context, shared tokens) of each row and its (choice, last token) pairs."""
    start_F = np.array([len(context) - 1 for _, context, _ in keys], np.int32)
    length_F = np.array([len(shared) + 1 for _, _, shared in keys], np.int32)
    shape = len(keys), length_F.max(), max(map(len, ends))
    targets_FAC, choice_FC = np.zeros(shape, np.int32), np.full(shape[::2], -1, np.int32)
    for row, ((_, _, shared), last) in enumerate(zip(keys, ends, strict=True)):
        choice_FC[row, : len(last)], last_C = zip(*last, strict=True)
        targets_FAC[row, : len(shared)] = np.array(shared, np.int32)[:, None]
        targets_FAC[row, len(shared), : len(last)] = last_C
    return Choices(tokens_FT, start_F, length_F, targets_FAC, np.array([item for item, _, _ in keys]), choice_FC)


def _prompt_widths(sequences: list[list[int]], shared: int = 0) -> list[int]:
    widths, longest = list(PROMPT_LENGTHS), max(map(len, sequences), default=0) - shared
    while widths[-1] < longest:
        widths.append(2 * widths[-1])
    return [shared + width for width in widths]


def _buckets(
    sequences: list[list[int]], widths: list[int], pad_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Padded tokens, lengths and indices in the list, for each width that some sequence needs."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    buckets = np.searchsorted(widths, lengths)
    for bucket in np.unique(buckets):
        index_F = np.flatnonzero(buckets == bucket).astype(np.int32)
        tokens_FT = np.full((index_F.size, widths[bucket]), pad_id, np.int32)
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
