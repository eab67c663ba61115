"""Continuous batching: a thread that owns the devices gives every active request its next token, step by step."""

import dataclasses
from collections.abc import Callable

from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.serving.work import Done, Piece, Scored, Scoring, Work

Deliver = Callable[[Piece | Scored | Done], None]  # called in the engine's thread


@dataclasses.dataclass(frozen=True)
class Figures:
    """What an engine is doing, and has done since it started."""

    slots: int
    active: int  # slots that are answering
    waiting: int  # requests in the queue
    prompt_tokens: int
    tokens: int  # generated
    steps: int
    stepped: int  # rows of these steps that were active: stepped / steps is how full batches were


class Engine:
    """Answers of one backbone, at most `slots` at a time; `queue` requests may wait for one."""

    def __init__(self, model: FrozenModel, slots: int, queue: int, rank: int): ...

    def submit(self, work: Work | Scoring, deliver: Deliver) -> "Ticket":
        """Queues a request. Raises Full, and UserError for a prompt that does not fit."""

    def watch(self, told: Callable[[Done], None]) -> None:
        """Has `told` called, in the engine's thread, at the end of each request."""

    @property
    def figures(self) -> Figures: ...

    def stop(self) -> None:
        """Finishes what runs and ends the thread."""


class Ticket:
    """A request that was submitted."""

    def cancel(self) -> None:
        """Frees its slots at the next step."""
