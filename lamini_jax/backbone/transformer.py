"""The frozen language model: a Llama-family decoder, split in two where the memory begins.

The **prefix** reads a question without any memory; the **suffix** (the last M layers) may carry an adapter. Parameters
are plain pytrees, applied by Flax Linen. The prefix's layers are a stack and scanned, so 32 compile like one;
the suffix's are apart, because a slice of a stack would be copied in every step.

Letters: B sequences, T tokens, P positions of a cache, D width, H heads, G key-value heads, W head width, V vocabulary.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.backbone.linear_layers import LINEAR_LAYERS, Adapter, Linear, contract, linear_shapes, low_rank
from lamini_jax.config import BackboneConfig
from lamini_jax.runtime import sharding

Params = Any
Cache = Any  # {"keys": keys_LBPGW, "values": values_LBPGW} of one part, which new tokens are written into
Room = Any  # the same with heads before positions (LBGPW), from which attention reads without a copy
Context = Any  # the same of tokens that have been read before, for any number of batches: B is 1 if they share it


class Known(NamedTuple):
    """The keys and values that attention sees beside those of the tokens themselves: at most one of these."""

    cache: Cache = None  # into which new ones are written
    context: Context = None  # which comes before the tokens
    room: Room = None  # in whose places the tokens are


NOTHING = Known()


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a learned scale, in float32, of the last axis."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD):
        scale_D = self.param("scale", nn.initializers.ones, x_BTD.shape[-1:])
        mean_square = jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True)
        return x_BTD * jax.lax.rsqrt(mean_square + self.eps) * jnp.expand_dims(scale_D, range(x_BTD.ndim - 1))


def rotation_scale(config: BackboneConfig) -> np.ndarray:
    """The factor of each of the W/2 rotary frequencies, for a context longer than the original one.

    `linear` divides all of them by the factor. `llama3` divides those that turn fewer than `rope_low_freq_factor` times
    within the original context, keeps those that turn more than `rope_high_freq_factor` times, and interpolates
    linearly in the number of turns between (Llama 3.1, arXiv 2407.21783).
    """
    c, half = config, config.head_dim // 2
    if c.rope_scaling == "none":
        return np.ones(half, np.float32)
    if c.rope_scaling == "linear":
        return np.full(half, 1 / c.rope_factor, np.float32)
    turns_F = c.rope_original_max_seq_len * c.rope_theta ** (-np.arange(half) / half) / (2 * np.pi)
    kept_F = np.clip((turns_F - c.rope_low_freq_factor) / (c.rope_high_freq_factor - c.rope_low_freq_factor), 0, 1)
    return (kept_F + (1 - kept_F) / c.rope_factor).astype(np.float32)


def rotate(x_BTHW, positions_BT, config: BackboneConfig):
    """Rotary positions: each pair (i, i + W/2) turns by position * theta^(-2i/W) (arXiv 2104.09864), unless scaled."""
    half = x_BTHW.shape[-1] // 2
    frequencies_F = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half) * rotation_scale(config)
    angles_BT1F = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_F[None, None, None]
    cos, sin = jnp.cos(angles_BT1F), jnp.sin(angles_BT1F)
    first, second = x_BTHW[..., :half], x_BTHW[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q_BTHW, k_BGPW, v_BGPW, mask_BTP, dtype: str):
    """Masked softmax attention, heads side by side in the result: (B, T, H * W)."""
    B, T, H, W = q_BTHW.shape
    G, P = k_BGPW.shape[1:3]
    # X is the query heads of one key-value head, times T. With batch axes first and two axes in each product, every
    # compiler makes one batched matrix product of it; XLA's CPU backend is five times slower at the five-axis einsum.
    q_BGXW = q_BTHW.transpose(0, 2, 1, 3).reshape(B, G, -1, W)
    scores_BGXP = contract("BGXW,BGPW->BGXP", q_BGXW, k_BGPW, dtype)
    scores_BHTP = jnp.where(mask_BTP[:, None], scores_BGXP.reshape(B, H, T, P), jnp.finfo(jnp.float32).min)
    weights_BGXP = jax.nn.softmax(scores_BHTP).reshape(B, G, -1, P)
    mixed_BGXW = contract("BGXP,BGPW->BGXW", weights_BGXP, v_BGPW, dtype)
    return mixed_BGXW.reshape(B, H, T, W).transpose(0, 2, 1, 3).reshape(B, T, -1)


class Block(nn.Module):
    """Attention and MLP, each after a norm and around a residual. `adapter` may add to any of the linear layers.

    Given a cache, it returns that with the new keys and values written into it; given a room, only the new ones.
    Given `at_BA`, the output is that of the tokens with these indices, and nothing else is computed of the others but
    their keys and values.
    """

    config: BackboneConfig

    @nn.compact
    def __call__(self, x_BTD, positions_BT, mask_BTP, adapter, known, at_BA=None):
        c = self.config
        cache, context, room = known
        shapes = linear_shapes(c)

        def linear(name, x_BTI):
            use_bias = c.qkv_bias and name in ("q_proj", "k_proj", "v_proj")
            y_BTO = Linear(shapes[name], c.dtype, use_bias, name=name)(x_BTI)
            if adapter and name in adapter:
                y_BTO = y_BTO + low_rank(x_BTI, adapter[name], c.dtype)
            return y_BTO

        def heads(x_BTO, axis="kv_heads"):
            return sharding.constrain(x_BTO.reshape(*x_BTO.shape[:2], -1, c.head_dim), "batch", None, axis, None)

        def rotated(x_BTHW, name, positions_BT):
            if c.qk_norm:
                x_BTHW = RMSNorm(c.norm_eps, name=name)(x_BTHW)
            return rotate(x_BTHW, positions_BT, c)

        with jax.named_scope("attention"):
            h_BTD = RMSNorm(c.norm_eps, name="attention_norm")(x_BTD)
            k_BPGW = rotated(heads(linear("k_proj", h_BTD)), "k_norm", positions_BT)
            v_BPGW = heads(linear("v_proj", h_BTD))
            if cache is not None:
                rows_B1 = jnp.arange(x_BTD.shape[0])[:, None]
                k_BPGW = cache["keys"].at[rows_B1, positions_BT].set(k_BPGW.astype(cache["keys"].dtype))
                v_BPGW = cache["values"].at[rows_B1, positions_BT].set(v_BPGW.astype(cache["values"].dtype))
                cache = {"keys": k_BPGW, "values": v_BPGW}
            elif context is not None:
                k_BPGW = _after(context["keys"], k_BPGW)
                v_BPGW = _after(context["values"], v_BPGW)
            k_BGPW, v_BGPW = k_BPGW.transpose(0, 2, 1, 3), v_BPGW.transpose(0, 2, 1, 3)
            if room is not None:
                cache = {"keys": k_BGPW.astype(room["keys"].dtype), "values": v_BGPW.astype(room["values"].dtype)}
                k_BGPW, v_BGPW = (_within(room[name], cache[name], positions_BT) for name in ("keys", "values"))
            if at_BA is not None:
                x_BTD, h_BTD, positions_BT, mask_BTP = (pick(x, at_BA) for x in (x_BTD, h_BTD, positions_BT, mask_BTP))
            q_BTHW = rotated(heads(linear("q_proj", h_BTD), "heads"), "q_norm", positions_BT)
            mixed_BTO = attend(q_BTHW * c.head_dim**-0.5, k_BGPW, v_BGPW, mask_BTP, c.dtype)
            x_BTD = x_BTD + linear("o_proj", mixed_BTO)
        with jax.named_scope("mlp"):
            h_BTD = RMSNorm(c.norm_eps, name="mlp_norm")(x_BTD)
            h_BTF = jax.nn.silu(linear("gate_proj", h_BTD)) * linear("up_proj", h_BTD)
            x_BTD = x_BTD + linear("down_proj", h_BTF)
        return x_BTD, cache


def pick(x_BT, at_BA):
    """Those of each sequence's tokens that have these indices; x_BT may have more axes."""
    return jnp.take_along_axis(x_BT, at_BA.reshape(*at_BA.shape, *(1,) * (x_BT.ndim - 2)), axis=1)


def _after(context_BPGW, x_BTGW):
    """The keys or values of a context and, after them, those of the tokens that follow it."""
    context_BPGW = jnp.broadcast_to(context_BPGW, (x_BTGW.shape[0], *context_BPGW.shape[1:]))
    return jnp.concatenate([context_BPGW.astype(x_BTGW.dtype), x_BTGW], axis=1)


def _within(room_BGPW, x_BG1W, positions_B1):
    """The keys or values of a room with those of one new token in their place."""
    here_BP = jnp.arange(room_BGPW.shape[2])[None] == positions_B1
    return jnp.where(here_BP[:, None, :, None], x_BG1W, room_BGPW)


class Decoder(nn.Module):
    """The whole model: its parameters, and what of it needs no adapter in the suffix, which is `suffix` below."""

    config: BackboneConfig
    memory_layers: int
    remat: bool = False  # for gradients, compute the suffix's activations again instead of keeping them

    def setup(self):
        c = self.config
        start = nn.initializers.normal(c.embed_dim**-0.5)
        self.embedding = self.param("embedding", start, (c.vocab_size, c.embed_dim), c.dtype)
        layers = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        layers["in_axes"] = (nn.broadcast, nn.broadcast, 0, 0)
        self.prefix_layers = nn.scan(Block, **layers, length=c.num_layers - self.memory_layers)(c)
        self.suffix_layers = nn.scan(Block, **layers, length=self.memory_layers)(c)
        self.final_norm = RMSNorm(c.norm_eps)
        if not c.tied_embeddings:
            self.unembedding = Linear((c.embed_dim, c.vocab_size), c.dtype)

    def embed(self, tokens_BT):
        return sharding.constrain(self.embedding[tokens_BT].astype(jnp.float32), "batch", None, None)

    def prefix(self, tokens_BT, positions_BT, mask_BTP, adapter=None, known=NOTHING):
        return self.prefix_layers(self.embed(tokens_BT), positions_BT, mask_BTP, adapter, known)

    def unembed(self, hidden_BTD):
        if self.config.tied_embeddings:
            return contract("BTD,VD->BTV", hidden_BTD, self.embedding, self.config.dtype)
        return self.unembedding(hidden_BTD)

    def __call__(self, tokens_BT):  # for `init`: it uses every parameter
        positions_BT, mask_BTP = _positions(self.config, tokens_BT)
        hidden_BTD, _ = self.prefix(tokens_BT, positions_BT, mask_BTP)
        hidden_BTD, _ = self.suffix_layers(hidden_BTD, positions_BT, mask_BTP, None, NOTHING)
        return self.unembed(self.final_norm(hidden_BTD))


def _positions(config: BackboneConfig, x_BT, positions_BT=None, known: Known = NOTHING):
    """Positions (0, 1, ... unless given) and mask_BTP: a token attends to positions up to its own, in its window.

    Of a context, whose length may differ from sequence to sequence, only what is before the first position counts.
    """
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(x_BT.shape[1]), x_BT.shape[:2])
    if known.context is not None:
        places_1P = jnp.arange(known.context["keys"].shape[2])[None]
        before_BP = jnp.where(places_1P < positions_BT[:, :1], places_1P, jnp.iinfo(jnp.int32).max)
        slots_B1P = jnp.concatenate([before_BP, positions_BT], axis=1)[:, None]
    else:
        slots_B1P = jnp.arange(x_BT.shape[1] if known.cache is None else known.cache["keys"].shape[2])[None, None]
    return positions_BT, _mask(config, slots_B1P, positions_BT)


def _mask(config: BackboneConfig, slots_B1P, positions_BT):
    """mask_BTP: which of these slots each token attends to."""
    mask_BTP = slots_B1P <= positions_BT[:, :, None]
    if config.sliding_window:
        mask_BTP &= slots_B1P > positions_BT[:, :, None] - config.sliding_window
    return mask_BTP


def init(decoder: Decoder, key: jax.Array) -> Params:
    """Random parameters, split as `decoder` is."""
    params = dict(decoder.init(key, jnp.zeros((1, 1), jnp.int32))["params"])
    return {**params, "suffix_layers": _apart(params["suffix_layers"])}


def _apart(stack: Params) -> Params:
    """The layers of a stack, by their numbers."""
    count = jax.tree.leaves(stack)[0].shape[0]
    return {str(layer): jax.tree.map(lambda x, layer=layer: x[layer], stack) for layer in range(count)}


def axes(config: BackboneConfig, params: Params) -> Any:
    """The names of the axes of every parameter; heads that the mesh cannot divide stay whole."""
    divided = {name: (layer.input_axis, layer.output_axis) for name, layer in LINEAR_LAYERS.items()}
    divided |= {"embedding": ("vocab", None), "unembedding": (None, "vocab")}

    def of(path, leaf):
        names = [key.key for key in path if not key.key.endswith("_layers")]
        last = divided.get(names[-2] if names[-1] == "weight" else names[-1], (None,))
        last = tuple(
            None if getattr(config, f"num_{name}", 0) % sharding.num_shards(name or "mlp") else name for name in last
        )
        return (None,) * (leaf.ndim - len(last)) + last

    return jax.tree_util.tree_map_with_path(of, params)


def put(decoder: Decoder, params: Params) -> Params:
    """Puts parameters, whole or split, on the devices, each part where it is used."""
    return jax.tree.map(lambda x, names: sharding.put(x, *names), params, axes(decoder.config, params))


def prefix(
    decoder: Decoder,
    params: Params,
    tokens_BT,
    positions_BT=None,
    adapter: Adapter | None = None,
    known: Known = NOTHING,
):
    """The frozen layers: hidden_BTD at the input of the first memory layer, and the cache with these tokens in it.

    With a context, `positions_BT` is given too; the tokens follow it.
    """
    arguments = *_positions(decoder.config, tokens_BT, positions_BT, known), adapter, known
    return decoder.apply({"params": params}, tokens_BT, *arguments, method="prefix")


def suffix(
    decoder: Decoder,
    params: Params,
    hidden_BTD,
    positions_BT=None,
    adapter: Adapter | None = None,
    known: Known = NOTHING,
    at_BA=None,
):
    """The memory layers: the normed hidden_BTD that `unembed` takes, and the cache with these tokens written.

    With `at_BA`, the output is that of the tokens with these indices alone. The layers are not scanned: they are few,
    and so the first one's input gets no gradient that nobody needs, and the last one leaves out what nobody reads.
    """
    hidden_BTD = sharding.constrain(hidden_BTD, "batch", None, None)
    arguments = _positions(decoder.config, hidden_BTD, positions_BT, known)
    block, caches = Block(decoder.config), []
    for layer in range(decoder.memory_layers):
        own = jax.tree.map(lambda x, layer=layer: x[layer], (adapter, known))
        last = at_BA if layer == decoder.memory_layers - 1 else None

        def apply(hidden_BTD, weights, own, last=last):
            return block.apply({"params": weights}, hidden_BTD, *arguments, *own, last)

        apply = jax.checkpoint(apply) if decoder.remat else apply
        hidden_BTD, written = apply(hidden_BTD, params["suffix_layers"][str(layer)], own)
        caches.append(written)
    hidden_BTD = RMSNorm(decoder.config.norm_eps).apply({"params": params["final_norm"]}, hidden_BTD)
    return hidden_BTD, jax.tree.map(lambda *layers: jnp.stack(layers), *caches)


def early(decoder: Decoder, params: Params, tokens_BT, positions_BT=None, known: Known = NOTHING, *, layers: int):
    """hidden_BTD after the first `layers` layers of the prefix, and those alone are computed."""
    hidden_BTD = decoder.apply({"params": params}, tokens_BT, method="embed")
    positions_BT, mask_BTP = _positions(decoder.config, tokens_BT, positions_BT, known)
    block = Block(decoder.config)

    def apply(hidden_BTD, layer):
        # By its index, as a scan over all layers does it: a slice of the first ones would be copied.
        stacks = params["prefix_layers"], known
        weights, own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stacks)
        return block.apply({"params": weights}, hidden_BTD, positions_BT, mask_BTP, None, own)[0], None

    return jax.lax.scan(apply, hidden_BTD, jnp.arange(layers))[0]


def as_room(cache: Cache, length: int) -> Room:
    """The keys and values of a cache as `step` reads them, with room for `length` tokens."""

    def room(x_LBPGW):
        x_LBGPW = jnp.moveaxis(x_LBPGW, 2, 3)
        return placed_room(jnp.pad(x_LBGPW, [(0, 0)] * 3 + [(0, length - x_LBGPW.shape[3]), (0, 0)]))

    return jax.tree.map(room, cache)


def placed_room(x_LBGPW):
    """The keys or values of a room, divided as those of a cache are."""
    return sharding.constrain(x_LBGPW, None, "batch", "kv_heads", None, None)


def step(
    decoder: Decoder,
    params: Params,
    tokens_B,
    positions_B,
    rooms: tuple[Room, Room],
    adapters: tuple[Adapter | None, Adapter | None] = (None, None),
    *,
    reach: int,
):
    """One more token of each of B sequences: hidden_B1D that `unembed` takes, and the rooms of both parts with it.

    Rooms may have more sequences than B and more positions than `reach`. Only the first of each are read, so that a
    step takes no longer than its sequences need.
    """
    hidden_B1D = decoder.apply({"params": params}, tokens_B[:, None], method="embed")
    positions_B1, block = positions_B[:, None], Block(decoder.config)
    mask_B1P = _mask(decoder.config, jnp.arange(reach)[None, None], positions_B1)

    def apply(hidden_B1D, weights, adapter, room, layer):
        # By its index, so that what is not read is not copied either.
        def read(x_LSGPW):
            _, _, G, _, W = x_LSGPW.shape
            return jax.lax.dynamic_slice(x_LSGPW, (layer, 0, 0, 0, 0), (1, tokens_B.size, G, reach, W))[0]

        known = Known(room=jax.tree.map(read, room))
        return block.apply({"params": weights}, hidden_B1D, positions_B1, mask_B1P, adapter, known)

    def scanned(hidden_B1D, layer):
        stacks = params["prefix_layers"], adapters[0]
        own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stacks)
        return apply(hidden_B1D, *own, rooms[0], layer)

    num_prefix = decoder.config.num_layers - decoder.memory_layers
    hidden_B1D, prefix_new = jax.lax.scan(scanned, hidden_B1D, jnp.arange(num_prefix))
    suffix_new = []
    for layer in range(decoder.memory_layers):
        adapter = jax.tree.map(lambda x, layer=layer: x[layer], adapters[1])
        hidden_B1D, new = apply(hidden_B1D, params["suffix_layers"][str(layer)], adapter, rooms[1], layer)
        suffix_new.append(new)
    every_new = prefix_new, jax.tree.map(lambda *layers: jnp.stack(layers), *suffix_new)

    def written(room_LSGPW, new_LBG1W):
        # The axes that are indexed come first in what is set there: B before the layers.
        new_BLGW = jnp.moveaxis(new_LBG1W[:, :, :, 0], 1, 0)
        return room_LSGPW.at[:, jnp.arange(tokens_B.size), :, positions_B].set(new_BLGW)

    normed_B1D = RMSNorm(decoder.config.norm_eps).apply({"params": params["final_norm"]}, hidden_B1D)
    return normed_B1D, jax.tree.map(written, rooms, every_new)


def unembed(decoder: Decoder, params: Params, hidden_BTD):
    """logits_BTV in float32."""
    return decoder.apply({"params": params}, hidden_BTD, method="unembed")


def empty_cache(config: BackboneConfig, num_layers: int, batch: int, length: int) -> Cache:
    """Room for `length` tokens of `batch` sequences in `num_layers` layers."""
    shape = (num_layers, batch, length, config.num_kv_heads, config.head_dim)

    def room():
        return sharding.constrain(jnp.zeros(shape, config.dtype), None, "batch", None, "kv_heads", None)

    return {"keys": room(), "values": room()}


def split_layers(params: Params, memory_layers: int) -> Params:
    """Whole parameters (one stack of `layers`) split into prefix and suffix."""
    params = dict(params)
    layers = params.pop("layers")
    params["prefix_layers"] = jax.tree.map(lambda x: x[: x.shape[0] - memory_layers], layers)
    params["suffix_layers"] = _apart(jax.tree.map(lambda x: x[x.shape[0] - memory_layers :], layers))
    return params


def join_layers(params: Params) -> Params:
    """The inverse of `split_layers`."""
    params = dict(params)
    prefix, apart = params.pop("prefix_layers"), params.pop("suffix_layers")
    suffix = (apart[str(layer)] for layer in range(len(apart)))
    return {**params, "layers": jax.tree.map(lambda a, *b: jnp.concatenate([a, jnp.stack(b)]), prefix, *suffix)}


def logits(config: BackboneConfig, params: Params, tokens_BT) -> jax.Array:
    """logits_BTV (float32) of the plain model; `params` whole, tokens right-padded."""
    return all_logits(Decoder(config, 1), split_layers(params, 1), jnp.asarray(tokens_BT))


def all_logits(decoder: Decoder, params: Params, tokens_BT) -> jax.Array:
    """The same of parameters that are split."""
    hidden_BTD, _ = suffix(decoder, params, prefix(decoder, params, tokens_BT)[0])
    return unembed(decoder, params, hidden_BTD)
