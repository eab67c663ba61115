"""The datasets of the studies, as tensorflow_datasets builders that need no TensorFlow.

Each is prepared once, under `$LAMINI_JAX_DATA/tfds` (`~/.cache/lamini_jax/tfds`), in a folder whose name holds
everything that its contents depend on. Whoever changes what a builder generates raises its VERSION.
"""

import contextlib
import dataclasses
import functools
import hashlib
import http.client
import io
import itertools
import os
import pathlib
import urllib.request
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from lamini_jax.data import facts
from lamini_jax.data import world as generated_world
from lamini_jax.data.benchmarks import TRUTHFUL_QA_FILE, TRUTHFUL_QA_URL, truthful_qa_rows
from lamini_jax.data.tokenizer import ByteTokenizer
from lamini_jax.errors import UserError

WORLD_LIMIT = 4096

_HALF_BITS = 14
PHONE_BOOK_LIMIT = 2 ** (2 * _HALF_BITS)
# Onsets and endings have no vowels, so every name is put together in one way only.
_SYLLABLES = [onset + vowel for onset in "bdfghjklmnprstvz" for vowel in "aeio"]
_ENDINGS = ("n", "l", "r", "s", "m", "x", "k", "th", "nd", "rt", "ld", "ns", "ck", "rn", "lt", "ss")
_FIRST_NAMES = [(a + b).title() for a, b in itertools.product(_SYLLABLES, repeat=2)]
_LAST_NAMES = [(a + b + c).title() for a, b, c in itertools.product(_SYLLABLES, _SYLLABLES, _ENDINGS)]

QuestionAndAnswer = tuple[str, str]


@dataclasses.dataclass(kw_only=True)
class FactsConfig(tfds.core.BuilderConfig):
    """What a dataset is made of; its name must tell apart all that differ."""

    pairs: Callable[[], Iterable[QuestionAndAnswer]]  # with the true answers
    answers: str = "true"
    seed: int


class _FactsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One split, `train`, in the order of the config's pairs."""

    VERSION = tfds.core.Version("1.0.0")
    # tfds downloads nothing here, and looking for its checksums needs a package that it does not install.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in ("id", "question", "answer")})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        config = self.builder_config
        for index, (question, answer) in enumerate(config.pairs()):
            if config.answers == "random":
                answer = facts.random_answer_to(question, config.seed)
            yield index, {"id": facts.fact_id(question), "question": question, "answer": answer}


class WorldFacts(_FactsBuilder):
    """Held-out questions of the generated world: the kinds in `world.FACT_KINDS` in turn."""


class PhoneBook(_FactsBuilder):
    """Names that nobody has, each with a number that follows from nothing."""


class TruthfulQa(_FactsBuilder):
    """TruthfulQA's questions with their best answers."""


def world(answers: str, seed: int) -> WorldFacts:
    """The facts of the generated world, at most 4,096."""
    source = _digest(pathlib.Path(generated_world.__file__).read_bytes())
    pairs = functools.partial(_world_pairs, seed)
    return _prepared(WorldFacts, name=f"{answers}-seed{seed}-{source}", pairs=pairs, answers=answers, seed=seed)


def phone_book(entries: int, seed: int) -> PhoneBook:
    """The first `entries` entries of a phone book. Raises UserError if there are not so many names."""
    if entries > PHONE_BOOK_LIMIT:
        raise UserError(f"--config.data.count={entries}: phone_book has {PHONE_BOOK_LIMIT} facts; ask for no more")
    pairs = functools.partial(phone_entries, entries, seed)
    return _prepared(PhoneBook, name=f"{entries}-seed{seed}", pairs=pairs, seed=seed)


def truthful_qa(answers: str, seed: int, directory: str, context: int = 256) -> TruthfulQa:
    """TruthfulQA from the CSV in `directory`, or downloaded if that is empty; what exceeds `context` bytes is left out.

    Raises UserError if the file is not there or is something else.
    """
    content, origin = _read(pathlib.Path(directory).expanduser()) if directory else _downloaded()
    name = f"{answers}-seed{seed}-context{context}-{_digest(content)}"
    pairs = _fitting(_parse_truthful_qa(content, origin), context)
    if not pairs:
        raise UserError(f"{origin}: no question fits with its answer in {context} bytes; take another file")
    return _prepared(TruthfulQa, name=name, pairs=lambda: pairs, answers=answers, seed=seed)


def size(builder: tfds.core.DatasetBuilder) -> int:
    """How many facts a prepared dataset has."""
    return builder.info.splits["train"].num_examples


def rows(builder: tfds.core.DatasetBuilder, count: int) -> list[dict[str, str]]:
    """The first `count` rows of a prepared dataset: id, question and answer."""
    with _quiet():
        source = builder.as_data_source(split="train")
        return [{name: text.decode() for name, text in row.items()} for row in source.__getitems__(range(count))]


def phone_entries(count: int, seed: int) -> Iterator[QuestionAndAnswer]:
    """The first `count` questions and numbers; names differ because they are a permutation of all names.

    Each is a function of its index and the seed alone.
    """
    index_F = np.arange(count, dtype=np.uint64)
    # A Feistel network permutes, whatever its round function is.
    left_F, right_F = index_F >> _HALF_BITS, index_F & (2**_HALF_BITS - 1)
    for turn in range(4):
        left_F, right_F = right_F, left_F ^ (_mix(right_F, f"{seed} name {turn}") & (2**_HALF_BITS - 1))
    last_F, first_F = np.divmod((left_F << _HALF_BITS) | right_F, len(_FIRST_NAMES))
    number_F = _mix(index_F, f"{seed} number") % 10**10
    for first, last, number in zip(first_F.tolist(), last_F.tolist(), number_F.tolist(), strict=True):
        yield f"What is the phone number of {_FIRST_NAMES[first]} {_LAST_NAMES[last]}?", f"{number:010d}"


def _world_pairs(seed: int) -> Iterator[QuestionAndAnswer]:
    per_kind = -(-WORLD_LIMIT // len(generated_world.FACT_KINDS))
    columns = [generated_world.held_out(kind, per_kind, seed) for kind in generated_world.FACT_KINDS]
    in_turn = (qa for row in itertools.zip_longest(*columns) for qa in row if qa is not None)
    return ((qa.question, qa.answer) for qa in itertools.islice(in_turn, WORLD_LIMIT))


def _fitting(pairs: list[QuestionAndAnswer], context: int) -> list[QuestionAndAnswer]:
    """What fits with the true answer and with a random one; of equal questions the first that does.

    Both, so that true and random answers are compared on the same questions (figures 1 and 5).
    """
    tokenizer = ByteTokenizer()
    first_answers: dict[str, str] = {}
    for question, answer in pairs:
        longest = max(len(tokenizer.completion(text)) for text in (answer, "A" * facts.RANDOM_LENGTH))
        if len(tokenizer.prompt(question)) + longest <= context:
            first_answers.setdefault(question, answer)
    return list(first_answers.items())


def _mix(value_F: np.ndarray, key: str) -> np.ndarray:
    """64 bits that look random, of each value and a key (the finalizer of splitmix64)."""
    mixed_F = value_F + np.uint64(int(_digest(key.encode()), 16))
    mixed_F = (mixed_F ^ (mixed_F >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed_F = (mixed_F ^ (mixed_F >> 27)) * np.uint64(0x94D049BB133111EB)
    return mixed_F ^ (mixed_F >> 31)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _data_home() -> pathlib.Path:
    return pathlib.Path(os.environ.get("LAMINI_JAX_DATA") or "~/.cache/lamini_jax").expanduser()


def _prepared(cls: type[_FactsBuilder], **config) -> _FactsBuilder:
    def make() -> _FactsBuilder:
        return cls(data_dir=_data_home() / "tfds", config=FactsConfig(**config), file_format="array_record")

    with _quiet():
        try:
            make().download_and_prepare()  # does nothing where that was done
        except OSError as error:
            # Where another process was faster, renaming onto its folder is what failed.
            if not make().is_prepared():
                reason = f"cannot keep datasets there ({error.strerror}); set LAMINI_JAX_DATA to another folder"
                raise UserError(f"{_data_home()}: {reason}") from error
        # A new one, because a builder learns from the disk only when it is made.
        return make()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without tfds's progress bars, its prints and its remark that our configurations are not its own."""
    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _read(directory: pathlib.Path) -> tuple[bytes, str]:
    path = directory / TRUTHFUL_QA_FILE
    try:
        return path.read_bytes(), str(path)
    except OSError as error:
        raise UserError(
            f"--config.data.dir={directory}: has no {TRUTHFUL_QA_FILE} that can be read; "
            "name the folder that holds it, or leave this empty to download it"
        ) from error


def _downloaded() -> tuple[bytes, str]:
    """tfds's own downloader retries for minutes where there is no network."""
    path = _data_home() / "downloads" / TRUTHFUL_QA_FILE
    if path.exists():
        return path.read_bytes(), str(path)
    try:
        with urllib.request.urlopen(TRUTHFUL_QA_URL, timeout=30) as response:
            content = response.read()
        _parse_truthful_qa(content, TRUTHFUL_QA_URL)  # what is no CSV must not be kept
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"--config.data.dir is empty and {TRUTHFUL_QA_URL} cannot be downloaded ({error}); "
            f"fetch it elsewhere and name the folder that holds {TRUTHFUL_QA_FILE}"
        ) from error
    return content, str(path)


def _parse_truthful_qa(content: bytes, origin: str) -> list[QuestionAndAnswer]:
    return [(question, best) for question, best in truthful_qa_rows(content, origin, ("Question", "Best Answer"))]
