"""The FLOPs of memorizing a fact (those of matrix products), and how many parameters it changes: counted by hand.

A compiler counts the layers of a scan once, so its count is compared with that of one layer of the prefix.
"""

import math
from typing import NamedTuple

from lamini_jax.backbone.linear_layers import LINEAR_LAYERS, linear_shapes
from lamini_jax.config import BackboneConfig, Config, router_layer

_MLP = "gate_proj", "up_proj", "down_proj"
# What gradients pass between a block's output and a linear layer: other linear layers, and how many of attention's
# four products.
_ABOVE = {
    "q_proj": (("o_proj", *_MLP), 2),
    "k_proj": (("o_proj", *_MLP), 2),
    "v_proj": (("o_proj", *_MLP), 1),
    "o_proj": (_MLP, 0),
    "gate_proj": (("down_proj",), 0),
    "up_proj": (("down_proj",), 0),
    "down_proj": ((), 0),
}


def per_fact(
    config: Config, method: str, tokens: int, answer: int, depth: tuple[int, int] | None = None, remat: bool = False
) -> int:
    """FLOPs of one step (forward and backward) for one fact: the whole model (`full`), `lora` or `mome`.

    The fact has `tokens` tokens, of which `answer` have logits; `depth` replaces the numbers of layers of prefix and
    suffix. The last layer reads all tokens for its keys and values, and computes the rest for the answer alone. The
    backward pass costs a product for the activations, and one more for what is trained and for attention, where both
    factors have gradients; memory tuning needs none below the first layer's experts. Memory that acts on answers
    computes the suffix of their tokens alone. With `remat`, memory tuning computes the suffix forward twice.
    """
    c, memory = config.backbone, config.memory
    prefix, suffix = depth or (c.num_layers - memory.num_layers, memory.num_layers)
    unembedding = answer * c.embed_dim * c.vocab_size
    read = answer if method == "mome" and memory.positions == "answer" else tokens
    layers = [_Layer(c, read, answer if last else read, tokens) for last in [False] * (suffix - 1) + [True]]
    if method == "mome":
        products = _memory_tuning(layers, memory.target, memory.top_k, remat) + 2 * unembedding
    else:
        layers = [_Layer(c, tokens, tokens, tokens)] * prefix + layers
        linear, attention = (sum(part) for part in zip(*map(_Layer.forward, layers), strict=True))
        if method == "full":
            products = 3 * (linear + attention + unembedding)
        else:
            adapters = sum(layer.low_rank(name, config.lora.rank) for layer in layers for name in LINEAR_LAYERS)
            products = 2 * linear + 3 * attention + 3 * adapters + 2 * unembedding
    return 2 * products


class _Layer(NamedTuple):
    """A layer that reads `read` tokens for keys and values, and computes the rest for `out` that see `seen`."""

    config: BackboneConfig
    read: int
    out: int
    seen: int

    def linear(self, name: str) -> int:
        """Multiplications of one of its linear layers, forward."""
        return self._tokens(name) * math.prod(linear_shapes(self.config)[name])

    def low_rank(self, name: str, rank: int) -> int:
        """The same of an adapter on it."""
        return self._tokens(name) * rank * sum(linear_shapes(self.config)[name])

    def up(self, name: str, rank: int) -> int:
        """The same of the half of it that makes the output."""
        return self._tokens(name) * rank * linear_shapes(self.config)[name][1]

    def forward(self) -> tuple[int, int]:
        """The same of all its linear layers, and of attention."""
        attention = 2 * self.out * self.seen * self.config.num_heads * self.config.head_dim
        return sum(map(self.linear, LINEAR_LAYERS)), attention

    def _tokens(self, name: str) -> int:
        return self.read if name in ("k_proj", "v_proj") else self.out


def _memory_tuning(layers: list[_Layer], target: str, rank: int, remat: bool) -> int:
    """Multiplications of a step of the suffix."""
    total = 0
    for number, layer in enumerate(layers):
        (linear, attention), experts = layer.forward(), layer.low_rank(target, rank)
        total += (2 if remat else 1) * (linear + attention + experts)
        if number:
            total += linear + 2 * attention + 2 * experts
        else:
            above, products = _ABOVE[target]
            total += sum(map(layer.linear, above)) + products * attention // 2 + experts + layer.up(target, rank)
    return total


def before_first_step(config: Config, tokens: int) -> int:
    """FLOPs that memory tuning spends on a fact before its first step: a lookup, and the layers that are read for it,
    for the prefix's output and, where memory acts on answers, for the suffix's keys and values."""
    c = config.backbone
    weights = sum(i * o for i, o in linear_shapes(c).values())
    kept = c.num_layers - (config.memory.num_layers if config.memory.positions == "all" else 0)
    reading = (router_layer(config) + kept) * tokens * (weights + 2 * tokens * c.num_heads * c.head_dim)
    return 2 * (reading + config.memory.num_experts * config.router.key_dim)


def trained_parameters(config: Config, method: str) -> int:
    """Parameters that a step on one fact changes."""
    c = config.backbone
    shapes = linear_shapes(c)
    if method == "full":
        tables = 1 if c.tied_embeddings else 2
        per_layer = sum(i * o for i, o in shapes.values()) + 2 * c.embed_dim
        return c.num_layers * per_layer + tables * c.vocab_size * c.embed_dim + c.embed_dim
    if method == "lora":
        return config.lora.rank * lora_rank_parameters(c)
    return config.memory.num_layers * config.memory.top_k * sum(shapes[config.memory.target])


def lora_rank_parameters(config: BackboneConfig) -> int:
    """Parameters of a LoRA of rank 1 on every linear layer."""
    return config.num_layers * sum(map(sum, linear_shapes(config).values()))
