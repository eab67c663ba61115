"""The backbone computes what the Llama papers say, in one part or in two, with an adapter as with merged weights."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamini_jax.backbone import linear_layers, transformer
from lamini_jax.backbone.linear_layers import LowRank

UNTIED = dataclasses.replace(helpers.BACKBONE, tied_embeddings=False)


def reference_logits(config, params, tokens_T):
    """One sequence, in plain numpy and float64, head by head and position by position."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    half, group = config.head_dim // 2, config.num_heads // config.num_kv_heads

    def norm(x_TD, scale_D):
        return x_TD / np.sqrt((x_TD**2).mean(axis=1, keepdims=True) + config.norm_eps) * scale_D

    def rotate(x_TW):
        """Pairs (i, i + W/2) as complex numbers, turned by position * theta^(-2i/W)."""
        turned_TW = np.empty_like(x_TW)
        for position, x_W in enumerate(x_TW):
            angles = position * config.rope_theta ** (-2 * np.arange(half) / config.head_dim)
            turned = (x_W[:half] + 1j * x_W[half:]) * np.exp(1j * angles)
            turned_TW[position] = np.concatenate([turned.real, turned.imag])
        return turned_TW

    def head(x_TO, number):
        return x_TO[:, number * config.head_dim : (number + 1) * config.head_dim]

    x_TD = params["embedding"][tokens_T]
    for layer in range(config.num_layers):
        p = jax.tree.map(lambda x: x[layer], params["layers"])  # noqa: B023 (called at once)
        h_TD = norm(x_TD, p["attention_norm"]["scale"])
        q, k, v = (h_TD @ p[f"{name}_proj"]["weight"] for name in "qkv")
        mixed = np.zeros_like(q)
        for number in range(config.num_heads):
            q_TW, k_TW = rotate(head(q, number)), rotate(head(k, number // group))
            for position in range(len(tokens_T)):
                scores = k_TW[: position + 1] @ q_TW[position] / np.sqrt(config.head_dim)
                weights = np.exp(scores - scores.max())
                head(mixed, number)[position] = weights / weights.sum() @ head(v, number // group)[: position + 1]
        x_TD = x_TD + mixed @ p["o_proj"]["weight"]
        h_TD = norm(x_TD, p["mlp_norm"]["scale"])
        gate = h_TD @ p["gate_proj"]["weight"]
        x_TD = x_TD + (gate / (1 + np.exp(-gate)) * (h_TD @ p["up_proj"]["weight"])) @ p["down_proj"]["weight"]
    h_TD = norm(x_TD, params["final_norm"]["scale"])
    return h_TD @ (params["embedding"].T if config.tied_embeddings else params["unembedding"]["weight"])


def random_tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(256, size=(batch, length)).astype(np.int32)


def relative_error(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


logits = jax.jit(transformer.logits, static_argnums=0)


@pytest.mark.parametrize("config", [helpers.BACKBONE, UNTIED], ids=["tied", "untied"])
def test_logits_equal_a_plain_implementation(config):
    params, tokens_BT = helpers.random_params(config), random_tokens(2, 19)
    expected = np.stack([reference_logits(config, params, tokens_T) for tokens_T in tokens_BT])
    assert relative_error(logits(config, params, tokens_BT), expected) < 1e-4


def test_bfloat16_stays_close():
    params, tokens_BT = helpers.random_params(helpers.BACKBONE), random_tokens(2, 19)
    found = logits(dataclasses.replace(helpers.BACKBONE, dtype="bfloat16"), params, tokens_BT)
    assert found.dtype == jnp.float32
    assert 0 < relative_error(found, np.asarray(logits(helpers.BACKBONE, params, tokens_BT))) < 0.05


def test_later_tokens_change_nothing_before():
    params, tokens_BT = helpers.random_params(helpers.BACKBONE), random_tokens(2, 19)
    before = np.asarray(logits(helpers.BACKBONE, params, tokens_BT))
    for position in (1, 7, 18):
        changed_BT = tokens_BT.copy()
        changed_BT[:, position:] = 255 - changed_BT[:, position:]
        after = np.asarray(logits(helpers.BACKBONE, params, changed_BT))
        assert helpers.same_bits(after[:, :position], before[:, :position])
        assert (after[:, position] != before[:, position]).any()


def test_prefix_and_suffix_make_the_whole():
    params, tokens_BT = helpers.random_params(helpers.BACKBONE), random_tokens(2, 19)
    decoder, parts = transformer.Decoder(helpers.BACKBONE, 2), transformer.split_layers(params, 2)

    @jax.jit
    def in_two(parts, tokens_BT):
        hidden_BTD, _ = transformer.prefix(decoder, parts, tokens_BT)
        hidden_BTD, _ = transformer.suffix(decoder, parts, hidden_BTD)
        return transformer.unembed(decoder, parts, hidden_BTD)

    expected = np.asarray(logits(helpers.BACKBONE, params, tokens_BT))
    assert relative_error(in_two(parts, tokens_BT), expected) < 1e-5


@pytest.mark.parametrize("memory_layers", [1, 2, 3])
def test_split_and_join_are_inverse(memory_layers):
    params = helpers.random_params(UNTIED)
    parts = transformer.split_layers(params, memory_layers)
    assert len(parts["suffix_layers"]) == memory_layers
    assert helpers.same_bits(transformer.join_layers(parts), params)


def random_adapter(layers, rank, batch=None, seed=0):
    """Low-rank terms on every linear layer, one for the batch or one for each sequence."""
    rng = np.random.default_rng(seed)
    lead = (layers,) if batch is None else (layers, batch)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / 6, jnp.float32)

    shapes = linear_layers.linear_shapes(helpers.BACKBONE)
    return {name: LowRank(draw(*lead, rank, i), draw(*lead, rank, o)) for name, (i, o) in shapes.items()}


def merged(params, adapters, sequence=None):
    """Whole parameters with the low-rank products added to the weights."""
    layers = {**params["layers"]}
    for name in linear_layers.LINEAR_LAYERS:
        down, up = (
            np.concatenate([np.asarray(adapter[name][i], np.float64) for adapter in adapters]) for i in range(2)
        )
        if sequence is not None:
            down, up = down[:, sequence], up[:, sequence]
        weight = np.asarray(layers[name]["weight"], np.float64) + np.einsum("LKI,LKO->LIO", down, up)
        layers[name] = {"weight": weight.astype(np.float32)}
    return {**params, "layers": layers}


@pytest.mark.parametrize("batch", [None, 2], ids=["one for the batch", "one each"])
def test_adapter_equals_merged_weights(batch):
    params, tokens_BT = helpers.random_params(helpers.BACKBONE), random_tokens(2, 19)
    adapters = random_adapter(3, 5, batch, seed=0), random_adapter(1, 5, batch, seed=1)
    decoder, parts = transformer.Decoder(helpers.BACKBONE, 1), transformer.split_layers(params, 1)

    @jax.jit
    def adapted(parts, tokens_BT, adapters):
        hidden_BTD, _ = transformer.prefix(decoder, parts, tokens_BT, adapter=adapters[0])
        hidden_BTD, _ = transformer.suffix(decoder, parts, hidden_BTD, adapter=adapters[1])
        return transformer.unembed(decoder, parts, hidden_BTD)

    found = np.asarray(adapted(parts, tokens_BT, adapters))
    bare = np.asarray(logits(helpers.BACKBONE, params, tokens_BT))
    for sequence in range(2):
        together = merged(params, adapters, None if batch is None else sequence)
        expected = np.asarray(logits(helpers.BACKBONE, together, tokens_BT))[sequence]
        assert relative_error(found[sequence], expected) < 1e-4
        assert relative_error(bare[sequence], expected) > 0.1


def test_gradients_of_project_are_those_of_the_plain_product():
    rng = np.random.default_rng(0)
    x_BTI, weight_IO, cotangent_BTO = (rng.normal(size=shape) for shape in ((3, 7, 5), (5, 11), (3, 7, 11)))

    def loss(x_BTI, weight_IO):
        return jnp.sum(linear_layers.project(x_BTI, weight_IO, "float32") * cotangent_BTO.astype(np.float32))

    x_gradient, weight_gradient = jax.grad(loss, (0, 1))(x_BTI.astype(np.float32), weight_IO.astype(np.float32))
    assert relative_error(weight_gradient, np.einsum("BTI,BTO->IO", x_BTI, cotangent_BTO)) < 1e-6
    assert relative_error(x_gradient, np.einsum("BTO,IO->BTI", cotangent_BTO, weight_IO)) < 1e-6
