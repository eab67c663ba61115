"""What runs on the devices: a few programs of a few shapes, all compiled before the first request.

Slots hold what has been read of each sequence, its keys and values, and the adapter of the fact that answers it, if one
does. S is slots, of which the first N are stepped; G, P, W are axes of rooms as in `backbone/transformer.py`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.backbone import frozen_model, linear_layers, transformer
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.backbone.linear_layers import Adapter, LowRank
from lamini_jax.backbone.transformer import Known, Room
from lamini_jax.config import MemoryConfig
from lamini_jax.data import batches
from lamini_jax.runtime import sharding
from lamini_jax.serving.work import MOST_LIKELIEST

_SHORTEST_REACH = 128
_SCORED_TOKENS = 4096  # of a batch of prompts that are scored


class Slots(NamedTuple):
    """The state of all slots on the devices."""

    rooms: tuple[Room, Room]
    adapter: Adapter  # of every slot; zeros add exactly nothing


class Settings(NamedTuple):
    """How the next token of each row is chosen."""

    temperature_N: np.ndarray
    top_p_N: np.ndarray
    seed_N: np.ndarray
    choice_N: np.ndarray  # which of the answers to one prompt it is: each has draws of its own
    place_N: np.ndarray  # how many tokens the answer has


class Stepped(NamedTuple):
    """The likeliest next tokens, and what others can be chosen from."""

    logits_NV: jax.Array
    token_N: jax.Array
    logprob_N: jax.Array


def sizes(slots: int) -> list[int]:
    """The numbers of rows that a step may have."""
    return [*(n for n in (4**i for i in range(slots.bit_length())) if n < slots), slots]


def reaches(length: int) -> list[int]:
    """How many positions a step may look back to."""
    return [*(_SHORTEST_REACH << i for i in range(length.bit_length()) if _SHORTEST_REACH << i < length), length]


def widths(model: FrozenModel) -> list[int]:
    """The padded lengths of prompts: close to each other where all prompts begin with what has been read before."""
    known = model.num_shared
    if not known:
        return score_widths(model.max_seq_len)
    found = [*batches.PROMPT_LENGTHS]
    while known + found[-1] < model.max_seq_len:
        found.append(2 * found[-1])
    return sorted({min(known + width, model.max_seq_len) for width in found})


def score_widths(length: int) -> list[int]:
    """The padded lengths of prompts that are scored."""
    return [*(width for width in (64, *(256 << i for i in range(length.bit_length()))) if width < length), length]


def at_least(steps: list[int], wanted: int) -> int:
    """The smallest of these that is enough."""
    return next(step for step in steps if step >= wanted)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def empty(model: FrozenModel, slots: int, memory: MemoryConfig, rank: int) -> Slots:
    """Slots that hold nothing, with room for adapters of this memory with at most `rank` experts."""
    config, memory_layers = model.decoder.config, model.decoder.memory_layers

    def room(layers):
        shape = layers, slots, config.num_kv_heads, config.max_seq_len, config.head_dim
        return {name: _room(jnp.zeros(shape, config.dtype)) for name in ("keys", "values")}

    down, up = linear_layers.linear_shapes(config)[memory.target]
    parts = (jnp.zeros((memory_layers, slots, rank, width), memory.dtype) for width in (down, up))
    return Slots((room(config.num_layers - memory_layers), room(memory_layers)), {memory.target: LowRank(*parts)})


@functools.partial(jax.jit, donate_argnums=1)
def read(model: FrozenModel, slots: Slots, slot, prompt_1T, adapter: Adapter | None = None) -> Slots:
    """Reads a prompt into a slot, which then has no adapter. What it has at the padding is never looked at.

    `adapter` is one that acts on prompts too. A model whose beginning is known reads only what comes after it.
    """
    parts = model.decoder, model.params
    caches = frozen_model.caches(model, *prompt_1T.shape)
    own = frozen_model.after_beginning(model, prompt_1T)
    hidden_1TD, prefix = transformer.prefix(*parts, **own, known=Known(caches[0]))
    positions_1T = own["positions_BT"]
    if adapter is not None:
        hidden_1TD, positions_1T = frozen_model.with_shared(model, hidden_1TD), None
    _, suffix = transformer.suffix(*parts, hidden_1TD, positions_1T, adapter, Known(caches[1]))

    def placed(room_LSGPW, cache_L1TGW):
        return _room(jax.lax.dynamic_update_slice(room_LSGPW, jnp.moveaxis(cache_L1TGW, 2, 3), (0, slot, 0, 0, 0)))

    return slots._replace(rooms=jax.tree.map(placed, slots.rooms, (prefix, suffix)))


@functools.partial(jax.jit, donate_argnums=0)
def equip(slots: Slots, slot, adapter: Adapter) -> Slots:
    """Gives a slot an adapter, that of one prompt."""
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
    return slots._replace(adapter=jax.tree.map(put, slots.adapter, adapter))


@functools.partial(jax.jit, donate_argnums=0)
def copy(slots: Slots, source, target) -> Slots:
    """Copies everything of a slot into another one."""

    def copied(x_XS):
        one = jax.lax.dynamic_slice_in_dim(x_XS, source, 1, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(x_XS, one, target, axis=1)

    return jax.tree.map(copied, slots)


@functools.partial(jax.jit, static_argnames="reach", donate_argnums=1)
def step(model: FrozenModel, slots: Slots, token_N, position_N, reach: int) -> tuple[Slots, Stepped]:
    """Reads one token of each of the first N slots; all positions are below `reach`."""
    parts = model.decoder, model.params
    adapter = jax.tree.map(lambda x_MSKX: x_MSKX[:, : token_N.shape[0]], slots.adapter)
    hidden_N1D, rooms = transformer.step(*parts, token_N, position_N, slots.rooms, (None, adapter), reach=reach)
    logits_NV = transformer.unembed(*parts, hidden_N1D)[:, 0]
    token_N = jnp.argmax(logits_NV, axis=-1).astype(jnp.int32)
    return slots._replace(rooms=jax.tree.map(_room, rooms)), Stepped(logits_NV, token_N, _logprobs(logits_NV, token_N))


@jax.jit
def sample(stepped: Stepped, settings: Settings) -> Stepped:
    """The same with tokens that are drawn, where the temperature is not 0, by keys of the requests' own."""

    def drawn(logits_V, temperature, top_p, *numbers):
        key = functools.reduce(jax.random.fold_in, numbers[1:], jax.random.key(numbers[0]))
        scaled_V = logits_V / jnp.maximum(temperature, 1e-4)
        kept_V = jnp.where(nucleus(scaled_V, top_p), scaled_V, -jnp.inf)
        return jnp.argmax(kept_V + jax.random.gumbel(key, kept_V.shape))

    drawn_N = jax.vmap(drawn)(stepped.logits_NV, *settings).astype(jnp.int32)
    token_N = jnp.where(settings.temperature_N > 0, drawn_N, stepped.token_N)
    return stepped._replace(token_N=token_N, logprob_N=_logprobs(stepped.logits_NV, token_N))


def nucleus(logits_V, top_p):
    """Which tokens are among the fewest, the likeliest ones, that have the probability `top_p` together.

    The least likely of them is found by halving: sorting a whole vocabulary would take a CPU longer than the step.
    """
    probability_V = jax.nn.softmax(logits_V)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.sum(jnp.where(probability_V >= middle, probability_V, 0.0)) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    least, _ = jax.lax.fori_loop(0, 30, halve, (jnp.float32(0), probability_V.max()))
    return (probability_V >= least) | (top_p >= 1)


@jax.jit
def likeliest(logits_NV):
    """The likeliest tokens and their log-probabilities, the best first."""
    logit_NX, token_NX = jax.lax.top_k(logits_NV, min(MOST_LIKELIEST, logits_NV.shape[-1]))
    return token_NX, logit_NX - jax.nn.logsumexp(logits_NV, axis=-1, keepdims=True)


@jax.jit
def score(model: FrozenModel, prompt_BT):
    """Log-probabilities: logprob_BT of each next token, and token_BTX and logprob_BTX of the likeliest at its place."""
    parts = model.decoder, model.params
    hidden_BTD, _ = transformer.prefix(*parts, prompt_BT)
    hidden_BTD, _ = transformer.suffix(*parts, hidden_BTD)
    next_BT = jnp.roll(prompt_BT, -1, axis=1)

    def scored(part):
        hidden_1TD, next_1T = (x[None] for x in part)
        logits_TV = transformer.unembed(*parts, hidden_1TD)[0]
        return _logprobs(logits_TV, next_1T[0]), *likeliest(logits_TV)

    return jax.lax.map(scored, (hidden_BTD, next_BT))


def scored_rows(width: int) -> int:
    """How many prompts of this padded length are scored at once: one where that is as fast as several."""
    return 1 if jax.default_backend() == "cpu" else max(1, _SCORED_TOKENS // width)


def _logprobs(logits_NV, token_N):
    logit_N = jnp.take_along_axis(logits_NV, token_N[:, None], axis=-1)[:, 0]
    return logit_N - jax.nn.logsumexp(logits_NV, axis=-1)


def _room(x_LSGPW):
    return sharding.constrain(x_LSGPW, None, None, "kv_heads", None, None)
