"""Greedy decoding with a KV cache: batched, one compilation per shape, stopped when every answer is complete."""

import functools

import jax
import jax.numpy as jnp

from lamini_jax import backbone, sharding
from lamini_jax.backbone import Decoder


@functools.partial(jax.jit, static_argnames=("decoder", "stop_id"))
def greedy(
    decoder: Decoder, params, prompt_BT, length_B, longest, stop_id: int, suffix_adapter=None, prefix_adapter=None
):
    """answer_BA of at most `longest` tokens, filled up with the stop token. Prompts are right-padded to T.

    A is the context, whose room prompt and answer share; `longest` is traced, so that one compilation serves all.
    """
    config, batch = decoder.config, prompt_BT.shape[0]
    slots = max(config.context, prompt_BT.shape[1])
    room_B = jnp.minimum(longest, slots - length_B)
    prefix_cache = backbone.empty_cache(config, config.num_layers - decoder.memory_layers, batch, slots)
    suffix_cache = backbone.empty_cache(config, decoder.memory_layers, batch, slots)

    def next_token(tokens_BT, positions_BT, last_B, caches):
        hidden_BTD, prefix_cache = backbone.prefix(decoder, params, tokens_BT, positions_BT, caches[0], prefix_adapter)
        hidden_BTD, suffix_cache = backbone.suffix(decoder, params, hidden_BTD, positions_BT, caches[1], suffix_adapter)
        hidden_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
        logits_BV = backbone.unembed(decoder, params, hidden_B1D)[:, 0]
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), (prefix_cache, suffix_cache)

    def proceed(state):
        step, token_B, answer_BA, _ = state
        return (step < slots) & jnp.any(token_B != stop_id)

    def advance(state):
        step, token_B, answer_BA, caches = state
        answer_BA = answer_BA.at[:, step].set(token_B)
        # A prompt's padding is overwritten before anything may look at it.
        positions_B1 = (length_B + step)[:, None]
        following_B, caches = next_token(token_B[:, None], positions_B1, jnp.zeros_like(length_B), caches)
        complete_B = (token_B == stop_id) | (step + 1 >= room_B)
        return step + 1, jnp.where(complete_B, stop_id, following_B), answer_BA, caches

    positions_BT = jnp.broadcast_to(jnp.arange(prompt_BT.shape[1]), prompt_BT.shape)
    token_B, caches = next_token(prompt_BT, positions_BT, length_B - 1, (prefix_cache, suffix_cache))
    answer_BA = jnp.full((batch, slots), stop_id, jnp.int32)
    _, _, answer_BA, _ = jax.lax.while_loop(proceed, advance, (0, token_B, answer_BA, caches))
    return sharding.constrain(answer_BA)
