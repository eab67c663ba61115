"""Decoding with a KV cache, greedy or sampled: in batches, each of which stops when all of its answers are complete.

`prefill` reads the prompts and compiles once per shape of them; `decode` generates the next tokens and compiles once
per number of prompts.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lamini_jax.backbone import transformer
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.backbone.transformer import Adapter
from lamini_jax.runtime import sharding


class Adapters(NamedTuple):
    """The adapters of prefix and suffix for some prompts, and the experts they are made of, if they are."""

    prefix: Adapter | None = None
    suffix: Adapter | None = None
    expert_ids_BK: jax.Array | None = None


BARE = Adapters()


class Sampling(NamedTuple):
    """Tokens are drawn from softmax(logits / temperature) instead of taking the likeliest ones."""

    key: jax.Array
    temperature: jax.Array


class State(NamedTuple):
    """Answers being generated: answer_BA has `step` tokens of each, followed by stop tokens."""

    step: jax.Array
    answer_BA: jax.Array
    min_logprob_B: jax.Array  # the log-probability of the least likely token in answer_BA and token_B
    token_B: jax.Array  # the next token of each
    budget_B: jax.Array  # tokens that an answer may have
    length_B: jax.Array  # of the prompts
    caches: tuple[transformer.Cache, transformer.Cache]

    @property
    def probability_B(self):
        """The probability of the least likely token of each answer."""
        return jnp.exp(self.min_logprob_B)


@jax.jit
def prefill(
    model: FrozenModel,
    prompt_BT,
    length_B,
    max_new_tokens,
    adapters: Adapters = BARE,
    sampling: Sampling | None = None,
) -> State:
    """Reads prompts, right-padded to T, and chooses the first token of each answer of at most `max_new_tokens`.

    A is the length of the backbone's longest sequence, prompt included; `max_new_tokens` is traced, so that one
    compilation serves all its values.
    """
    config, batch = model.decoder.config, prompt_BT.shape[0]
    length = max(config.max_seq_len, prompt_BT.shape[1])
    caches = tuple(
        transformer.empty_cache(config, layers, batch, length)
        for layers in (config.num_layers - model.decoder.memory_layers, model.decoder.memory_layers)
    )
    positions_BT = jnp.broadcast_to(jnp.arange(prompt_BT.shape[1]), prompt_BT.shape)
    last_B, drawn = length_B - 1, _at(sampling, 0)
    token_B, logprob_B, caches = _next(model, prompt_BT, positions_BT, last_B, caches, adapters, drawn)
    answer_BA = jnp.full((batch, length), model.tokenizer.stop_ids[0], jnp.int32)
    budget_B = jnp.minimum(max_new_tokens, length - length_B)
    return State(jnp.int32(0), answer_BA, logprob_B, token_B, budget_B, length_B, caches)


@functools.partial(jax.jit, donate_argnames="state")
def decode(
    model: FrozenModel, state: State, until, adapters: Adapters = BARE, sampling: Sampling | None = None
) -> State:
    """Continues until there are `until` tokens, or all answers are complete."""
    stop_ids = model.tokenizer.stop_ids

    def unfinished(state):
        room = state.step < jnp.minimum(until, state.answer_BA.shape[1])
        return room & ~is_complete(state.token_B, stop_ids).all()

    def advance(state):
        answer_BA = state.answer_BA.at[:, state.step].set(state.token_B)
        # A prompt's padding is overwritten before any token can attend to it.
        positions_B1 = (state.length_B + state.step)[:, None]
        first_B, step = jnp.zeros_like(state.length_B), state.step + 1
        token_B, logprob_B, caches = _next(
            model, state.token_B[:, None], positions_B1, first_B, state.caches, adapters, _at(sampling, step)
        )
        done_B = is_complete(state.token_B, stop_ids)
        token_B = jnp.where(done_B | (step >= state.budget_B), stop_ids[0], token_B)
        logprob_B = jnp.where(done_B, state.min_logprob_B, jnp.minimum(state.min_logprob_B, logprob_B))
        return state._replace(step=step, answer_BA=answer_BA, token_B=token_B, min_logprob_B=logprob_B, caches=caches)

    state = jax.lax.while_loop(unfinished, advance, state)
    whole = {name: sharding.constrain(getattr(state, name)) for name in ("answer_BA", "min_logprob_B")}
    return state._replace(**whole)


def is_complete(token_B, stop_ids: tuple[int, ...]):
    """Which answers end with these tokens."""
    return functools.reduce(jnp.logical_or, [token_B == stop_id for stop_id in stop_ids])


def generate(model: FrozenModel, prompt_BT, length_B, max_new_tokens, adapters=BARE, sampling=None):
    """answer_BA, padded with the first of the stop tokens, and the probability_B of the least likely token of each.

    The stop token that ends an answer counts too, unless the answer was cut off.
    """
    state = prefill(model, prompt_BT, length_B, max_new_tokens, adapters, sampling)
    state = decode(model, state, state.answer_BA.shape[1], adapters, sampling)
    return state.answer_BA, state.probability_B


def _at(sampling: Sampling | None, step) -> Sampling | None:
    """The sampling of one step, with its own key."""
    return sampling and sampling._replace(key=jax.random.fold_in(sampling.key, step))


def _next(model: FrozenModel, tokens_BT, positions_BT, last_B, caches, adapters: Adapters, sampling):
    """The token that follows position `last_B`, its log-probability, and the caches with `tokens_BT` in them."""
    parts = model.decoder, model.params
    hidden_BTD, prefix = transformer.prefix(*parts, tokens_BT, positions_BT, caches[0], adapters.prefix)
    hidden_BTD, suffix = transformer.suffix(*parts, hidden_BTD, positions_BT, caches[1], adapters.suffix)
    hidden_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
    logits_BV = transformer.unembed(*parts, hidden_B1D)[:, 0]
    if sampling is None:
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        token_B = jax.random.categorical(sampling.key, logits_BV / sampling.temperature)
    logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return token_B.astype(jnp.int32), logit_B - jax.nn.logsumexp(logits_BV, axis=-1), (prefix, suffix)
