"""What the HTTP part hands to the engine, and what comes back."""

import dataclasses
import math

from lamini_jax.backbone.frozen_model import Adapters
from lamini_jax.errors import UserError

MOST_LIKELIEST = 20  # tokens, whose log-probabilities may be asked for at each place


@dataclasses.dataclass(frozen=True)
class Work:
    """A prompt to be continued, once for each of `choices`."""

    tokens: tuple[int, ...]
    max_tokens: int
    adapters: Adapters | None = None  # of one prompt; None: the backbone alone
    choices: int = 1
    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts before which an answer ends
    likeliest: int | None = None  # how many tokens are told beside the chosen one; None: no log-probabilities
    deadline: float = math.inf  # in seconds of time.monotonic


@dataclasses.dataclass(frozen=True)
class Scoring:
    """A prompt whose own tokens are scored, by the backbone alone, and the likeliest token that follows it."""

    tokens: tuple[int, ...]
    likeliest: int = 1
    deadline: float = math.inf


@dataclasses.dataclass(frozen=True)
class Token:
    """A token, its log-probability, and the likeliest tokens at its place with theirs, the best first."""

    id: int
    logprob: float | None = None  # None: not asked for, or the first of a prompt
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """More of an answer: the text that is new, and the tokens. The last piece of a choice has a `finish`."""

    work: int  # its number in the request
    choice: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish: str | None = None  # "stop" or "length"


@dataclasses.dataclass(frozen=True)
class Scored:
    """The tokens of a Scoring's prompt, and one more, which may be a stop token."""

    work: int
    tokens: tuple[Token, ...]


@dataclasses.dataclass(frozen=True)
class Done:
    """The end of a request, after which nothing comes: what it took, and the error that ended it, if one did."""

    error: Exception | None = None
    prompt_tokens: int = 0
    tokens: int = 0  # generated
    queued_seconds: float = 0.0
    first_seconds: float = 0.0  # from its arrival until the first token
    seconds: float = 0.0


class Full(UserError):
    """The queue has no room: try again later."""


class Late(UserError):
    """A request has passed its deadline."""


class Cancelled(Exception):
    """Whoever asked has gone."""
