"""Decoding with a KV cache, greedy or sampled: batched, stopped when every answer is complete.

`start` reads the prompts and compiles once per shape of them; `proceed` says the next tokens and compiles once per
number of prompts.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lamini_jax import backbone, sharding
from lamini_jax.backbone import Adapter, Decoder


class Adapted(NamedTuple):
    """What is added to the backbone for some prompts, and the experts it was made of, if it was."""

    prefix: Adapter | None = None
    suffix: Adapter | None = None
    expert_ids_BK: jax.Array | None = None


BARE = Adapted()


class Sampling(NamedTuple):
    """Tokens are drawn, from softmax(logits / temperature), and not the likeliest ones."""

    key: jax.Array
    temperature: jax.Array


class State(NamedTuple):
    """Answers under way: `step` tokens each of answer_BA, which is filled up with the stop token."""

    step: jax.Array
    answer_BA: jax.Array
    least_B: jax.Array  # the log-probability of the least likely token, of those in answer_BA and of token_B
    token_B: jax.Array  # what comes next
    room_B: jax.Array
    length_B: jax.Array  # of the prompts
    caches: tuple[backbone.Cache, backbone.Cache]


@functools.partial(jax.jit, static_argnames=("decoder", "stop_ids"))
def start(
    decoder: Decoder,
    params,
    prompt_BT,
    length_B,
    longest,
    stop_ids: tuple[int, ...],
    adapted: Adapted = BARE,
    sampling: Sampling | None = None,
) -> State:
    """Reads prompts, right-padded to T, and chooses the first token of each answer, which has at most `longest`.

    A is the context, whose room prompt and answer share; `longest` is traced, so that one compilation serves all.
    """
    config, batch = decoder.config, prompt_BT.shape[0]
    slots = max(config.context, prompt_BT.shape[1])
    caches = tuple(
        backbone.empty_cache(config, layers, batch, slots)
        for layers in (config.num_layers - decoder.memory_layers, decoder.memory_layers)
    )
    positions_BT = jnp.broadcast_to(jnp.arange(prompt_BT.shape[1]), prompt_BT.shape)
    token_B, least_B, caches = _next(
        decoder, params, prompt_BT, positions_BT, length_B - 1, caches, adapted, sampling, 0
    )
    answer_BA = jnp.full((batch, slots), stop_ids[0], jnp.int32)
    return State(jnp.int32(0), answer_BA, least_B, token_B, jnp.minimum(longest, slots - length_B), length_B, caches)


@functools.partial(jax.jit, static_argnames=("decoder", "stop_ids"), donate_argnames="state")
def proceed(
    decoder: Decoder,
    params,
    state: State,
    until,
    stop_ids: tuple[int, ...],
    adapted: Adapted = BARE,
    sampling: Sampling | None = None,
) -> State:
    """Goes on until `until` tokens are said, or all answers are complete."""

    def unfinished(state):
        return (state.step < jnp.minimum(until, state.answer_BA.shape[1])) & ~complete(state.token_B, stop_ids).all()

    def advance(state):
        answer_BA = state.answer_BA.at[:, state.step].set(state.token_B)
        # A prompt's padding is overwritten before anything may look at it.
        positions_B1 = (state.length_B + state.step)[:, None]
        first_B, step = jnp.zeros_like(state.length_B), state.step + 1
        token_B, least_B, caches = _next(
            decoder, params, state.token_B[:, None], positions_B1, first_B, state.caches, adapted, sampling, step
        )
        done_B = complete(state.token_B, stop_ids)
        token_B = jnp.where(done_B | (step >= state.room_B), stop_ids[0], token_B)
        least_B = jnp.where(done_B, state.least_B, jnp.minimum(state.least_B, least_B))
        return state._replace(step=step, answer_BA=answer_BA, token_B=token_B, least_B=least_B, caches=caches)

    state = jax.lax.while_loop(unfinished, advance, state)
    return state._replace(answer_BA=sharding.constrain(state.answer_BA), least_B=sharding.constrain(state.least_B))


def complete(token_B, stop_ids: tuple[int, ...]):
    """Which answers end with these tokens."""
    return functools.reduce(jnp.logical_or, [token_B == stop_id for stop_id in stop_ids])


def generate(decoder: Decoder, params, prompt_BT, length_B, longest, stop_ids, adapted=BARE, sampling=None):
    """answer_BA, filled up with the first of the stop tokens, and the probability_B of the least likely token of each.

    The stop token counts, where the answer was not cut off before it.
    """
    state = start(decoder, params, prompt_BT, length_B, longest, stop_ids, adapted, sampling)
    state = proceed(decoder, params, state, state.answer_BA.shape[1], stop_ids, adapted, sampling)
    return state.answer_BA, jnp.exp(state.least_B)


def _next(decoder, params, tokens_BT, positions_BT, last_B, caches, adapted: Adapted, sampling, step):
    """The token that follows position `last_B`, its log-probability, and the caches with `tokens_BT` in them."""
    hidden_BTD, prefix = backbone.prefix(decoder, params, tokens_BT, positions_BT, caches[0], adapted.prefix)
    hidden_BTD, suffix = backbone.suffix(decoder, params, hidden_BTD, positions_BT, caches[1], adapted.suffix)
    hidden_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
    logits_BV = backbone.unembed(decoder, params, hidden_B1D)[:, 0]
    if sampling is None:
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        token_B = jax.random.categorical(jax.random.fold_in(sampling.key, step), logits_BV / sampling.temperature)
    logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return token_B.astype(jnp.int32), logit_B - jax.nn.logsumexp(logits_BV, axis=-1), (prefix, suffix)
