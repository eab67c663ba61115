"""The optimizers by name, with their settings and the schedules of their learning rates: a new one is an entry here."""

import functools

import jax
import optax

from lamini_jax.config import OptimizerConfig
from lamini_jax.errors import UserError


def _scale_by_rms() -> optax.GradientTransformation:
    """Adafactor's scaling, with a reciprocal root where the moments of thin matrices are not factored.

    optax raises to the power of -1/2 there, which on a CPU takes a fifth of a step.
    """
    scaling = optax.scale_by_factored_rms()

    def update(gradients, state, params=None):
        updates, state = scaling.update(gradients, state, params)

        def scaled(gradient, moment, update):
            return gradient * jax.lax.rsqrt(moment) if moment.shape == gradient.shape else update

        return jax.tree.map(scaled, gradients, state.v, updates), state

    return optax.GradientTransformation(scaling.init, update)


OPTIMIZERS = {
    # As the paper uses it (appendix A: a rate of our own, no scaling by the parameters).
    "adafactor": lambda rate: optax.chain(
        _scale_by_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_learning_rate(rate)
    ),
    "adam": optax.adam,
    "sgd": optax.sgd,
}
SCHEDULES = {
    "constant": lambda rate, steps: rate,
    "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
}


def check(config: OptimizerConfig, field: str) -> None:
    """Raises UserError, naming the config's field, if there is no such optimizer."""
    if config.name not in OPTIMIZERS:
        raise UserError(f"--config.{field}.name={config.name}: must be one of {', '.join(OPTIMIZERS)}")


def make(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps: the same object for the same run, so that programs with it are too."""
    return _make(config, 0 if config.schedule == "constant" else steps)


@functools.cache
def _make(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    return OPTIMIZERS[config.name](SCHEDULES[config.schedule](config.learning_rate, steps))
