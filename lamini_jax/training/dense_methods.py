"""The baselines, which train the same weights for all facts: one LoRA on every linear layer, and full fine-tuning.

The LoRA is the one that the paper compares with (appendix A).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lamini_jax.backbone import answering, linear_layers, transformer
from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.backbone.linear_layers import Adapter, LowRank
from lamini_jax.backbone.transformer import Decoder
from lamini_jax.config import Config, OptimizerConfig
from lamini_jax.data import batches
from lamini_jax.data.facts import Fact
from lamini_jax.runtime import checkpointing, sharding
from lamini_jax.training import data, optimizers
from lamini_jax.training.data import DeviceFacts, TrainingData
from lamini_jax.training.method import fact_losses


@flax.struct.dataclass
class DenseState:
    """What training a baseline changes."""

    trained: Any  # adapters of prefix and suffix, or all parameters
    optimizer: optax.OptState


@dataclasses.dataclass(frozen=True)
class DenseMethod:
    """A `TrainMethod` whose every step changes everything that it trains; so it keeps facts as tokens only."""

    config: Config
    model: FrozenModel
    facts: Sequence[Fact]
    data: TrainingData
    tx: optax.GradientTransformation
    step: Callable
    losses: Callable

    @classmethod
    def create(
        cls, config: Config, model: FrozenModel, facts: Sequence[Fact], padding: batches.Padding = batches.MANY
    ) -> Self:
        """Facts ready for steps."""
        examples = batches.encode(facts, model.tokenizer, padding)
        tx = optimizers.make(cls.optimizer_of(config), data.num_steps(examples, config.tuning))
        return cls(
            config, model, facts, data.of_tokens(examples, config.tuning.batch_size), tx, *_programs(tx, cls.apply)
        )

    @staticmethod
    def optimizer_of(config: Config) -> OptimizerConfig:
        """The settings of its optimizer."""
        raise NotImplementedError

    @staticmethod
    def apply(model: FrozenModel, trained: Any) -> tuple[FrozenModel, dict[str, Adapter]]:
        """The backbone, and the adapters of its prefix and suffix, with the trained weights in them."""
        raise NotImplementedError

    def fresh(self) -> Any:
        """What is trained, before any step."""
        raise NotImplementedError

    def init(self) -> DenseState:
        """The state before any step."""
        trained = self.fresh()
        return DenseState(trained, _fresh_optimizer(self.tx, trained))

    def adapter(self, state: DenseState) -> tuple[FrozenModel, AdapterFn]:
        """The model and adapters that answer questions with this state, until the next step donates it."""
        model, adapters = self.apply(self.model, state.trained)
        return model, answering.same_for_all(**adapters)

    def save(self, state: DenseState) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
        """What a checkpoint keeps."""
        return {"state": state}, {}, {"backbone": self.model.fingerprint}

    def restore(self, saved: checkpointing.Saved) -> DenseState:
        """The state that was saved, on the current mesh."""
        state = self.init()
        restored = checkpointing.restore_like(state, saved.tables["state"])
        return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), restored, state)


class LoraMethod(DenseMethod):
    """One LoRA on every linear layer of the frozen backbone."""

    @staticmethod
    def optimizer_of(config: Config) -> OptimizerConfig:
        """The settings of its optimizer."""
        return config.lora.optimizer

    @staticmethod
    def apply(model: FrozenModel, trained: Any) -> tuple[FrozenModel, dict[str, Adapter]]:
        """The backbone with these adapters."""
        return model, trained

    def fresh(self) -> dict[str, Adapter]:
        """Adapters that add nothing."""
        return _fresh_adapters(self.model.decoder, self.config.lora.rank, np.uint32(self.config.seed))


class FullMethod(DenseMethod):
    """Full fine-tuning: all weights of a copy of the backbone."""

    @staticmethod
    def optimizer_of(config: Config) -> OptimizerConfig:
        """The settings of its optimizer."""
        return config.full.optimizer

    @staticmethod
    def apply(model: FrozenModel, trained: Any) -> tuple[FrozenModel, dict[str, Adapter]]:
        """The backbone with these weights."""
        return model.replace(params=trained, fingerprint="", beginning=None), {}

    def fresh(self) -> transformer.Params:
        """A copy, because a step donates its state."""
        return jax.tree.map(jnp.copy, self.model.params)


def adapters(decoder: Decoder, rank: int, key: jax.Array) -> dict[str, Adapter]:
    """Adapters of prefix and suffix. As in the experts, the down matrix starts random and the up matrix at zero."""
    config = decoder.config
    parts = {"prefix": config.num_layers - decoder.memory_layers, "suffix": decoder.memory_layers}
    shapes = linear_layers.linear_shapes(config)
    keys = iter(jax.random.split(key, len(parts) * len(shapes)))

    def low_rank(layers, input_width, output_width):
        bound = (3 / input_width) ** 0.5
        down = jax.random.uniform(next(keys), (layers, rank, input_width), minval=-bound, maxval=bound)
        return LowRank(down, jnp.zeros((layers, rank, output_width)))

    return {part: {name: low_rank(layers, *shapes[name]) for name in shapes} for part, layers in parts.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fresh_adapters(decoder: Decoder, rank: int, seed):
    fresh = adapters(decoder, rank, jax.random.fold_in(jax.random.key(seed), 3))
    return jax.tree.map(lambda x: sharding.constrain(x, *(None,) * (x.ndim - 1), "width"), fresh)


def _fresh_optimizer(tx: optax.GradientTransformation, trained: Any) -> optax.OptState:
    """The optimizer's state before any step. On a mesh, what has the shape of a weight is sharded as the weight is."""
    if sharding.current_mesh() is None:
        return jax.jit(tx.init)(trained)
    whole = sharding.sharding_of((), ())

    def place(leaf, weight):
        return weight.sharding if leaf.shape == weight.shape else whole

    shapes = jax.eval_shape(tx.init, trained)
    shardings = optax.tree_map_params(tx, place, shapes, trained, transform_non_params=lambda _: whole)
    return jax.jit(tx.init, out_shardings=shardings)(trained)


def _programs(tx: optax.GradientTransformation, apply: Callable) -> tuple[Callable, Callable]:
    """`step` and `losses` of a `TrainMethod`."""

    def forward(model: FrozenModel, trained, batch: DeviceFacts):
        model, adapters = apply(model, trained)
        prefix, suffix = adapters.get("prefix"), adapters.get("suffix")
        hidden_BTD, _ = transformer.prefix(model.decoder, model.params, batch.inputs, adapter=prefix)
        return fact_losses(model, hidden_BTD, batch, suffix)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(model: FrozenModel, state: DenseState, facts: DeviceFacts, index_B):
        with jax.named_scope("gather"):
            batch = facts.take(index_B)

        def objective(trained):
            losses, mean_B = forward(model, trained, batch)
            return jnp.sum(mean_B) / mean_B.size, losses

        gradients, losses = jax.grad(objective, has_aux=True)(state.trained)
        with jax.named_scope("optimizer"):
            updates, optimizer = tx.update(gradients, state.optimizer, state.trained)
            return DenseState(optax.apply_updates(state.trained, updates), optimizer), losses

    @jax.jit
    def losses(model: FrozenModel, state: DenseState, facts: DeviceFacts, index_B):
        return forward(model, state.trained, facts.take(index_B))[0]

    return step, losses
