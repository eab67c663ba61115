"""What all requests of a server share."""

import dataclasses
from typing import Any

from lamini_jax.fact_memory import FactMemory
from lamini_jax.serving.engine import Engine
from lamini_jax.serving.limits import Settings


@dataclasses.dataclass
class State:
    """The parts of a running server.

    `memory.table` is what questions are answered from. It is read once for each request, and replaced, whole, when
    facts have changed: `state.memory.table = table`, after `answers.warm(state, table)` has compiled what it needs.
    """

    memory: FactMemory
    engine: Engine
    settings: Settings
    tuner: Any = None  # a `tuner.Tuner`, which `serve` makes, starts and stops
    ready: bool = False  # everything is compiled: `/readyz`
    stopping: bool = False  # SIGTERM has come: no new requests
    fired: int = 0  # questions of the model `memory` that a fact answered
    refused: int = 0  # and those that asked for no fact
