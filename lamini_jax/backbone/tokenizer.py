"""Text to token ids and back: bytes for the tiny backbone, the checkpoint's own tokenizer for others."""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from lamini_jax.backbone import chat_template, json_file
from lamini_jax.backbone.chat_template import Messages
from lamini_jax.backbone.json_file import one_line, shown
from lamini_jax.errors import UserError

_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Files of a checkpoint that belong to its tokenizer, by the beginnings of their names.
_FILES = ("tokenizer", "chat_template", "generation_config", "special_tokens", "added_tokens", "vocab", "merges")


# Shorter ones than this are read with each prompt.
_WORTH_SHARING = 8
_PROBES = ("Who wrote the letter?", "7", "(a) or (b)", "über Nacht")  # questions that begin and end differently


class Frame(NamedTuple):
    """What all prompts have in common."""

    beginning: tuple[int, ...]  # the tokens that they begin with, if there are enough of them to be read apart
    before: int  # tokens before the question's own
    after: int  # tokens after the question's own


class Tokenizer(Protocol):
    """What the package needs of a tokenizer. It is hashable, because it is a static field of a pytree."""

    vocab_size: int
    pad_id: int
    stop_ids: tuple[int, ...]  # tokens that end an answer; the first of them ends answers in training
    frame: Frame

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any special token. Raises UserError if the text cannot be encoded."""

    def decode(self, ids) -> str:
        """The text of some ids up to the first stop token."""

    def prompt(self, question: str) -> list[int]:
        """What the model reads before it answers."""

    def chat(self, messages: Messages) -> list[int]:
        """What the model reads before it says the next message. Raises UserError for what the template refuses."""

    def plain(self, text: str) -> list[int]:
        """The tokens of a plain text that begins a sequence."""

    def shown(self, ids: Sequence[int]) -> str:
        """The text of some ids with the names of special tokens in it."""

    def completion(self, answer: str) -> list[int]:
        """What the model must then produce, the stop token included."""

    def continuation(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a plain text and of what follows it, without prompt format and stop token."""

    def why_unsupported(self, text: str, exactly: bool) -> str | None:
        """Why a text cannot be used as a question, or with `exactly` as an answer; None if it can."""

    def save(self, directory: Path) -> None:
        """Writes the files from which `load` and other libraries read this tokenizer."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes are their own ids; special tokens are bytes that UTF-8 never has, so that no text can forge one."""

    vocab_size = 256
    pad_id, begin_id, answer_id, stop_id = 0xFC, 0xFD, 0xFE, 0xFF
    stop_ids = (stop_id,)
    frame = Frame((), 1, 1)
    special = {pad_id: "<|pad|>", begin_id: "<|begin|>", answer_id: "<|answer|>", stop_id: "<|stop|>"}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises UserError if it cannot be written in UTF-8 (lone surrogates)."""
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise UserError(f"{text!r}: is not valid UTF-8 text") from error

    def decode(self, ids) -> str:
        """The text of some ids up to the first stop token; bytes that are not UTF-8 become U+FFFD."""
        return bytes(np.asarray(_before_stop(ids, self.stop_ids), np.uint8)).decode("utf-8", errors="replace")

    def prompt(self, question: str) -> list[int]:
        """The question between the begin token and the answer token."""
        return [self.begin_id, *self.encode(question), self.answer_id]

    def chat(self, messages: Messages) -> list[int]:
        """The last message as a question: this tokenizer is of models that have learned questions and answers alone."""
        return self.prompt(messages[-1]["content"])

    def plain(self, text: str) -> list[int]:
        """The text after the begin token."""
        return [self.begin_id, *self.encode(text)]

    def shown(self, ids: Sequence[int]) -> str:
        """The text of some ids with the names of special tokens in it; bytes that are not UTF-8 become U+FFFD."""
        written = b"".join(self.special[i].encode() if i in self.special else bytes([i]) for i in ids)
        return written.decode("utf-8", errors="replace")

    def completion(self, answer: str) -> list[int]:
        """The answer and the stop token."""
        return [*self.encode(answer), self.stop_id]

    def continuation(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a plain text, after the begin token, and those of what follows it."""
        return self.plain(context), self.encode(text)

    def why_unsupported(self, text: str, exactly: bool) -> str | None:
        """None: bytes can represent every text."""
        return None

    def save(self, directory: Path) -> None:
        """Writes it as a byte-level tokenizer with a chat template, for other libraries to read."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        names = dict(zip(("pad_token", "bos_token", "answer_token", "eos_token"), self.special.values(), strict=True))
        # Byte-level tokenizers write a byte that is not a visible Latin-1 character as a character from U+0100 on.
        visible = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (0x20, 0xA0, 0xAD)]
        hidden = [byte for byte in range(256) if byte not in visible]
        letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
        vocabulary = {letters[byte]: byte for byte in range(self.pad_id)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names.values()])
        tokenizer.save(str(directory / "tokenizer.json"))
        template = "{{ '<|begin|>' }}{{ messages[-1]['content'] }}{{ '<|answer|>' }}"
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **names}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
        generation = {"bos_token_id": self.begin_id, "eos_token_id": self.stop_id, "pad_token_id": self.pad_id}
        (directory / "generation_config.json").write_text(json.dumps(generation) + "\n")


class CheckpointTokenizer:
    """The tokenizer of a checkpoint at `source`, with its chat template: the question is the user's turn.

    `library` is the tokenizers library's object, `settings` what tokenizer_config.json says or would say, `stops` ids
    at which generation stops, besides the end of a turn. A `system` message precedes the question, unless it is empty.
    A checkpoint without a chat template, which has not learned to chat, reads the question and a line feed.
    """

    def __init__(self, source: Path, library, settings: dict[str, Any], stops: Iterable[int], system: str = ""):
        self._source, self._tokenizer, self._settings = source, library, settings
        # Some were saved with truncation and padding for training; questions must be neither cut off nor padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._render = chat_template.load(source, settings, system)
        self._specials = [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        found = [self._special("eos_token"), *stops]
        self.stop_ids = tuple(dict.fromkeys(stop for stop in found if stop is not None))
        if not self.stop_ids:
            raise UserError(f"{source / _SETTINGS}: names no eos_token to end an answer with")
        pad = self._special("pad_token")
        self.pad_id = self.stop_ids[0] if pad is None else pad
        self.frame = self._find_frame()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any special token. Raises UserError for lone surrogates."""
        return self._ids(text, add_special_tokens=False)

    def decode(self, ids) -> str:
        """The text of some ids up to the first stop token."""
        return self._tokenizer.decode(_before_stop(ids, self.stop_ids), skip_special_tokens=True)

    def prompt(self, question: str) -> list[int]:
        """The question as the chat template has it, and the beginning of the assistant's turn."""
        return self.chat(chat_template.asking(question))

    def chat(self, messages: Messages) -> list[int]:
        """The messages as the chat template has them, and the beginning of the assistant's turn."""
        if self._render is None:
            return self.plain("".join(f"{message['content']}\n" for message in messages))
        return self.encode(self._render(messages))

    def plain(self, text: str) -> list[int]:
        """The text with the special tokens that the tokenizer puts before one."""
        return self._ids(text)

    def shown(self, ids: Sequence[int]) -> str:
        """The text of some ids with the names of special tokens in it."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def completion(self, answer: str) -> list[int]:
        """The answer and the token that ends a turn."""
        return [*self.encode(answer), self.stop_ids[0]]

    def continuation(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a plain text and of what follows it; blanks between them go with the latter, as in training."""
        kept = len(context.rstrip())
        ids = self.plain(context[:kept])
        return ids, self._ids(context + text)[len(ids) :]

    def why_unsupported(self, text: str, exactly: bool) -> str | None:
        """Names a special token in the text or, with `exactly`, the other text that decoding gives; None if neither."""
        for special in self._specials:
            if special in text:
                return f"holds {special}, which the tokenizer reads as a special token"
        if exactly and (decoded := self.decode(self.encode(text))) != text:
            return f"comes back from the tokenizer as {decoded!r}"
        return None

    def save(self, directory: Path) -> None:
        """Copies the files from which it was read; of a checkpoint in one file, writes what they would be."""
        if self._source.is_dir():
            for path in self._source.iterdir():
                if path.name.startswith(_FILES) and path.is_file():
                    shutil.copyfile(path, directory / path.name)
            return
        self._tokenizer.save(str(directory / _TOKENIZER))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (directory / _SETTINGS).write_text(json.dumps({**settings, **self._settings}, indent=1) + "\n")
        generation = {"bos_token_id": self._special("bos_token"), "eos_token_id": list(self.stop_ids)}
        generation = {name: value for name, value in generation.items() if value is not None}
        text = json.dumps({**generation, "pad_token_id": self.pad_id}, indent=1)
        (directory / "generation_config.json").write_text(text + "\n")

    def _ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError):  # what the library raises for text that is not Unicode
            raise UserError(f"{text!r}: is not valid UTF-8 text") from None

    def _special(self, name: str) -> int | None:
        """The id of a special token that tokenizer_config.json names."""
        value = self._settings.get(name)
        token = value.get("content") if isinstance(value, dict) else value
        if not isinstance(token, str | None):
            raise UserError(f"{self._source / _SETTINGS}: {name} {shown(json.dumps(value))} is not a text")
        return None if token is None else self._tokenizer.token_to_id(token)

    def _find_frame(self) -> Frame:
        """Found by some questions. A special token ends the beginning: no question can change tokens before one."""
        prompts = [self.prompt(question) for question in _PROBES]
        before, after = _common(prompts), _common([prompt[::-1] for prompt in prompts])
        specials = {token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}
        ends = [place + 1 for place, token in enumerate(prompts[0][:before]) if token in specials]
        beginning = prompts[0][: max(ends, default=0)]
        return Frame(tuple(beginning) if len(beginning) >= _WORTH_SHARING else (), before, after)


def load(directory: Path, vocab_size: int, system: str = "") -> CheckpointTokenizer:
    """The tokenizer of a checkpoint. Raises UserError if it is missing, damaged or larger than the vocabulary."""
    library, settings = _load_library(directory / _TOKENIZER), json_file.read(directory / _SETTINGS)
    tokenizer = CheckpointTokenizer(directory, library, settings, _stops(directory), system)
    vocabulary = f"and the backbone's vocabulary is {vocab_size} tokens"
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{directory / _TOKENIZER}: has the token id {tokenizer.vocab_size - 1}, {vocabulary}")
    if tokenizer.stop_ids[0] >= vocab_size:
        raise UserError(f"{directory}: eos_token_id {tokenizer.stop_ids[0]} ends an answer, {vocabulary}")
    return tokenizer


def _common(sequences: list[list[int]]) -> int:
    """How many tokens all sequences begin with."""
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({tokens[i] for tokens in sequences}) > 1), shortest)


def _stops(directory: Path) -> Iterator[int]:
    """The tokens at which generation stops, as the files beside a tokenizer say."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        ids = json_file.read(path).get("eos_token_id") if path.exists() else None
        for stop in ids if isinstance(ids, list) else [ids]:
            if stop is not None and (type(stop) is not int or stop < 0):
                raise UserError(f"{path}: eos_token_id {shown(json.dumps(stop))} is not a token id")
            if stop is not None:
                yield stop


def _before_stop(ids, stop_ids: tuple[int, ...]) -> list[int]:
    ids = np.asarray(ids)
    stops = np.flatnonzero(np.isin(ids, stop_ids))
    return ids[: stops[0] if stops.size else ids.size].tolist()


def _load_library(path: Path):
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(f"{path}: needs the tokenizers library; pip install -e .[hf]") from None
    if not path.is_file():
        raise UserError(f"{path}: no such file; a checkpoint needs the fast tokenizer that this file holds")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"{path}: is not a tokenizer ({one_line(error)})") from None
