"""What all training methods have in common: the interface that the loop and a run use, and the losses they report."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.backbone import frozen_model
from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config
from lamini_jax.data.facts import Fact
from lamini_jax.runtime import sharding
from lamini_jax.runtime.checkpointing import Saved
from lamini_jax.training.data import DeviceFacts, TrainingData


class Losses(NamedTuple):
    """For each fact, in nats: the sum over its answer's tokens, the largest one, and whether all are the likeliest."""

    total_B: jax.Array
    worst_B: jax.Array
    likeliest_B: jax.Array


class TrainMethod(Protocol):
    """A way to memorize facts: everything that training needs, assembled by `create(config, model, facts, ...)`.

    What it trains is a state, a pytree on the devices. `step(model, state, facts, index_B) -> state, Losses` is one
    update on the facts at `index_B` of a bucket and donates the state; `losses(model, state, facts, index_B) -> Losses`
    changes nothing. Both are jit-compiled.
    """

    config: Config
    model: FrozenModel
    facts: Sequence[Fact]
    data: TrainingData
    step: Callable[..., tuple[Any, Losses]]
    losses: Callable[..., Losses]

    def init(self) -> Any:
        """The state before any step."""

    def adapter(self, state: Any) -> tuple[FrozenModel, AdapterFn]:
        """The model and adapters that answer questions with this state, until the next step donates it."""

    def save(self, state: Any) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
        """What a checkpoint keeps of it: tables on the devices, arrays, and a record for JSON."""

    def restore(self, saved: Saved) -> Any:
        """The state that was saved, on the current mesh."""


def fact_losses(model: FrozenModel, inputs, batch: DeviceFacts, suffix_adapter) -> tuple[Losses, jax.Array]:
    """The losses of each fact, on every device, and the mean over its answer's tokens, which training minimizes.

    `inputs` is what `frozen_model.answer_states` takes.
    """
    hidden_BAD = frozen_model.answer_states(model, inputs, batch.start_F, batch.targets_FA.shape[1], suffix_adapter)
    arrays = batch.targets_FA, batch.length_F
    losses_BA, likeliest_BA = frozen_model.token_losses(model, hidden_BAD, *arrays, batch.most_tokens)
    total_B = losses_BA.sum(axis=1)
    losses = Losses(total_B, losses_BA.max(axis=1), likeliest_BA.all(axis=1))
    return jax.tree.map(sharding.constrain, losses), total_B / jnp.maximum(batch.length_F, 1)
