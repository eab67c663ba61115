"""The facts of the studies: one module per data set, and how a study takes its facts from one.

Every module of this package whose name does not begin with an underscore is a data set. It has

    SIZE                           how many pairs there are, to refuse a larger `data.count` at once; None: not checked
    ANSWERS_ARE_RANDOM             whether its answers are random already, so that no random ones replace them
    pairs(seed, directory)         yields (question, answer), in an order that depends only on its arguments
    fingerprint(seed, directory)   a text for a folder's name, which differs wherever `pairs` does

`directory` is `--config.data.dir`, the folder of files that are not generated. `fingerprint` is called first: it raises
UserError if they are missing or wrong. Neither module nor package imports tensorflow_datasets until facts are loaded:
that takes a while, which would slow down runs on a user's own JSONL.
"""

import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterator

from lamini_jax.config import DataConfig
from lamini_jax.data.facts import Fact, fact_id, random_answer_to
from lamini_jax.errors import UserError
from lamini_jax.runtime import user_cache
from lamini_jax.runtime.registry import Registry

DATASETS = Registry("lamini_jax.data.datasets", "data.facts")
ANSWERS = ("true", "random")

# How many pairs are searched for facts that fit: at least the first number, and the second for each requested fact.
_SEARCHED, _SEARCHED_PER_FACT = 4096, 16


def load(config: DataConfig, answers: str, seed: int, tokenizer, max_seq_len: int) -> list[Fact]:
    """The first `config.count` facts of a data set, with their true answers or with random ones (section 2).

    A fact must fit in `max_seq_len` tokens with either answer, so that both are compared on the same questions (figures
    1 and 5). Raises UserError, with the flag, if there are fewer facts.
    """
    asked, total = f"--config.data.count={config.count}", DATASETS[config.facts].SIZE
    if total is not None and config.count > total:
        raise UserError(f"{asked}: {config.facts} has {total} facts; ask for no more")
    facts = load_up_to(config, answers, seed, tokenizer, max_seq_len)
    if len(facts) < config.count:
        raise UserError(
            f"{asked}: {config.facts} has {len(facts)} facts that fit in --config.backbone.max_seq_len={max_seq_len} "
            "tokens; ask for no more"
        )
    return facts


def load_up_to(config: DataConfig, answers: str, seed: int, tokenizer, max_seq_len: int) -> list[Fact]:
    """Like `load`, but returns all facts of a data set that has fewer. Raises UserError if it has none."""
    if answers not in ANSWERS:
        raise ValueError(f"answers={answers!r}: must be one of {', '.join(ANSWERS)}")
    are_random = DATASETS[config.facts].ANSWERS_ARE_RANDOM
    facts: dict[str, Fact] = {}
    for question, true in _prepared_pairs(config, seed):
        random = true if are_random else random_answer_to(question, seed)
        longest = max(len(tokenizer.completion(answer)) for answer in (true, random))
        if len(tokenizer.prompt(question)) + longest <= max_seq_len:
            facts.setdefault(question, Fact(fact_id(question), question, true if answers == "true" else random))
        if len(facts) == config.count:
            break
    if not facts:
        flag = f"--config.backbone.max_seq_len={max_seq_len}"
        raise UserError(f"{flag}: no fact of {config.facts} fits in so few tokens; allow more")
    return list(facts.values())


def digest(content: bytes) -> str:
    """A short hash of some bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def data_home() -> pathlib.Path:
    """Where data sets and downloads are kept."""
    return pathlib.Path(os.environ.get("LAMINI_JAX_DATA") or user_cache.default()).expanduser()


def _prepared_pairs(config: DataConfig, seed: int) -> Iterator[tuple[str, str]]:
    """All pairs of a data set, read from tables that are prepared once.

    The first table is long enough if each pair becomes a fact. If some do not, one of twice the length follows, until
    it is clear that hardly any pair fits.
    """
    from lamini_jax.data.datasets import _tfds  # takes a while to import

    dataset = DATASETS[config.facts]
    source = digest(pathlib.Path(dataset.__file__).read_bytes())
    name = f"{config.facts}-{dataset.fingerprint(seed, config.dir)}-{source}"
    start, size = 0, 1 << (config.count - 1).bit_length()
    while size <= max(_SEARCHED, _SEARCHED_PER_FACT * config.count):
        pairs = itertools.islice(dataset.pairs(seed, config.dir), size)
        table = _tfds.prepared(data_home(), f"{name}-{size}", pairs)
        yield from _tfds.rows(table, start)
        if _tfds.size(table) < size:
            return
        start, size = size, 2 * size
