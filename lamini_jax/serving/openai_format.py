"""Answers in the words of the OpenAI API: whole ones, and the chunks of streams."""

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

from lamini_jax.backbone.tokenizer import Tokenizer
from lamini_jax.serving.work import Token


@dataclasses.dataclass
class Choice:
    """One of the answers, as far as it is known."""

    index: int
    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    finish: str | None = None
    letters: int = 0  # before its tokens, in a stream: `text_offset` counts on


@dataclasses.dataclass(frozen=True)
class Completions:
    """What `/v1/completions` answers."""

    tokenizer: Tokenizer
    logprobs: bool
    id: str = dataclasses.field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    whole_object: str = "text_completion"
    chunk_object: str = "text_completion"

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A complete answer."""
        told = self._logprobs(choice) if self.logprobs else None
        return {"index": choice.index, "text": choice.text, "logprobs": told, "finish_reason": choice.finish}

    def first(self, begun: Choice) -> dict[str, Any] | None:
        """What a stream begins an answer with: the prompt, if that is asked for."""
        return self.whole(begun) if begun.text else None

    def chunk(self, choice: Choice) -> dict[str, Any]:
        """A part of one."""
        return self.whole(choice)

    def _logprobs(self, choice: Choice) -> dict[str, Any]:
        texts, offsets = [self.tokenizer.shown([token.id]) for token in choice.tokens], []
        for text in texts:
            offsets.append(choice.letters)
            choice.letters += len(text)
        top = [self._likeliest(token, text) for token, text in zip(choice.tokens, texts, strict=True)]
        values = [token.logprob for token in choice.tokens]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}

    def _likeliest(self, token: Token, text: str) -> dict[str, float] | None:
        """By their texts; where two tokens have the same one, the likelier counts, and the chosen one always."""
        if token.logprob is None:
            return None
        found: dict[str, float] = {}
        for other, logprob in token.likeliest:
            found.setdefault(self.tokenizer.shown([other]), logprob)
        if token.id not in dict(token.likeliest):
            found.setdefault(text, token.logprob)
        return found


@dataclasses.dataclass(frozen=True)
class Chats:
    """What `/v1/chat/completions` answers."""

    tokenizer: Tokenizer
    logprobs: bool
    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    whole_object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A complete answer."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return self._with(choice, {"message": message})

    def first(self, begun: Choice) -> dict[str, Any]:
        """What a stream begins an answer with."""
        return self._with(begun, {"delta": {"role": "assistant", "content": ""}})

    def chunk(self, choice: Choice) -> dict[str, Any]:
        """A part of one."""
        return self._with(choice, {"delta": {"content": choice.text} if choice.text else {}})

    def _with(self, choice: Choice, said: dict[str, Any]) -> dict[str, Any]:
        content = [self._token(token) for token in choice.tokens]
        told = {"content": content, "refusal": None} if self.logprobs and content else None
        return {"index": choice.index, **said, "logprobs": told, "finish_reason": choice.finish}

    def _token(self, token: Token) -> dict[str, Any]:
        best = [self._described(*pair) for pair in token.likeliest]
        return {**self._described(token.id, token.logprob), "top_logprobs": best}

    def _described(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.tokenizer.shown([token])
        whole = "\ufffd" not in text  # part of a letter has no text, and so its bytes are not known here
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def envelope(form: Completions | Chats, model: str, stream: bool) -> dict[str, Any]:
    """What all answers and all chunks begin with."""
    kind = form.chunk_object if stream else form.whole_object
    return {"id": form.id, "object": kind, "created": int(time.time()), "model": model}


def usage(prompts: Sequence[Sequence[int]], generated: int) -> dict[str, int]:
    """The tokens that were read and written."""
    read = sum(map(len, prompts))
    return {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}
