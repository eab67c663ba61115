"""Decoding with a KV cache, greedy or sampled: in batches, each of which stops when all of its answers are complete.

`prefill` reads the prompts and compiles once per shape of them; `decode` generates the next tokens and compiles once
per number of prompts and reach: how many positions its steps look at, of which there are few.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lamini_jax.backbone import frozen_model, transformer
from lamini_jax.backbone.frozen_model import Adapters, FrozenModel
from lamini_jax.backbone.transformer import Known
from lamini_jax.runtime import sharding

BARE = Adapters()
_LEAST_REACH = 128


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
    rooms: tuple[transformer.Room, transformer.Room]

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
    parts, batch = (model.decoder, model.params), prompt_BT.shape[0]
    length = max(model.max_seq_len, prompt_BT.shape[1])
    if adapters.prefix is not None:  # which changes what is known of the shared beginning
        model = model.replace(beginning=None)
    known = tuple(map(Known, frozen_model.caches(model, *prompt_BT.shape)))
    own = frozen_model.after_beginning(model, prompt_BT)
    hidden_BTD, prefix = transformer.prefix(*parts, **own, adapter=adapters.prefix, known=known[0])
    positions_BT = own["positions_BT"]
    if adapters.suffix is not None:  # likewise: the suffix reads all of the prompt
        hidden_BTD = frozen_model.with_shared(model, hidden_BTD)
        positions_BT = jnp.broadcast_to(jnp.arange(prompt_BT.shape[1]), prompt_BT.shape)
    last_B1 = length_B[:, None] - 1 - positions_BT[:, :1]
    arguments = positions_BT, adapters.suffix, known[1]
    read_B1D, suffix = transformer.suffix(*parts, hidden_BTD, *arguments, at_BA=last_B1)
    if adapters.answer is not None:  # the position that predicts the answer's first token, again and with memory
        last_B1D = transformer.pick(hidden_BTD, last_B1)
        arguments = length_B[:, None] - 1, adapters.answer, Known(suffix)
        read_B1D, suffix = transformer.suffix(*parts, last_B1D, *arguments)
    token_B, logprob_B = _choose(model, read_B1D, _at(sampling, 0))
    answer_BA = jnp.full((batch, length), model.tokenizer.stop_ids[0], jnp.int32)
    budget_B = jnp.minimum(max_new_tokens, length - length_B)
    rooms = transformer.as_room(prefix, length), transformer.as_room(suffix, length)
    return State(jnp.int32(0), answer_BA, logprob_B, token_B, budget_B, length_B, rooms)


@functools.partial(jax.jit, static_argnames="reach", donate_argnames="state")
def decode(
    model: FrozenModel,
    state: State,
    until,
    adapters: Adapters = BARE,
    sampling: Sampling | None = None,
    *,
    reach: int,
) -> State:
    """Continues until there are `until` tokens, or all answers are complete; all positions are below `reach`."""
    stop_ids, beside = model.tokenizer.stop_ids, (adapters.prefix, adapters.suffix or adapters.answer)

    def unfinished(state):
        room = state.step < jnp.minimum(until, state.answer_BA.shape[1])
        return room & ~is_complete(state.token_B, stop_ids).all()

    def advance(state):
        answer_BA = state.answer_BA.at[:, state.step].set(state.token_B)
        # A prompt's padding is overwritten before any token can attend to it.
        arguments = state.token_B, state.length_B + state.step, state.rooms, beside
        hidden_B1D, rooms = transformer.step(model.decoder, model.params, *arguments, reach=reach)
        rooms, step = jax.tree.map(transformer.placed_room, rooms), state.step + 1
        token_B, logprob_B = _choose(model, hidden_B1D, _at(sampling, step))
        done_B = is_complete(state.token_B, stop_ids)
        token_B = jnp.where(done_B | (step >= state.budget_B), stop_ids[0], token_B)
        logprob_B = jnp.where(done_B, state.min_logprob_B, jnp.minimum(state.min_logprob_B, logprob_B))
        return state._replace(step=step, answer_BA=answer_BA, token_B=token_B, min_logprob_B=logprob_B, rooms=rooms)

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
    state, until = prefill(model, prompt_BT, length_B, max_new_tokens, adapters, sampling), 0
    while int(state.step) == until < state.answer_BA.shape[1]:
        reach = reach_for(state, prompt_BT.shape[1] + until + 1)
        until = reach - prompt_BT.shape[1] if reach < state.answer_BA.shape[1] else reach
        state = decode(model, state, until, adapters, sampling, reach=reach)
    return state.answer_BA, state.probability_B


def reach_for(state: State, positions: int) -> int:
    """The reach of steps that look at so many positions: as few different ones as make a short answer cheap."""
    longest = state.answer_BA.shape[1]
    return min(longest, max(_LEAST_REACH, 1 << (positions - 1).bit_length()))


def _at(sampling: Sampling | None, step) -> Sampling | None:
    """The sampling of one step, with its own key."""
    return sampling and sampling._replace(key=jax.random.fold_in(sampling.key, step))


def _choose(model: FrozenModel, hidden_B1D, sampling: Sampling | None):
    """The next token, given the suffix's output, and its log-probability."""
    logits_BV = transformer.unembed(model.decoder, model.params, hidden_B1D)[:, 0]
    if sampling is None:
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        token_B = jax.random.categorical(sampling.key, logits_BV / sampling.temperature)
    logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return token_B.astype(jnp.int32), logit_B - jax.nn.logsumexp(logits_BV, axis=-1)
