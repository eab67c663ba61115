"""The FLOPs of memorizing a fact (those of matrix products), and how many parameters it changes: counted by hand.

A compiler counts the layers of a scan once, so its count is compared with that of one layer of each part.
"""

from lamini_jax.backbone import linear_layers
from lamini_jax.config import BackboneConfig, Config, router_layer


def per_fact(
    config: Config, method: str, tokens: int, answer: int, depth: tuple[int, int] | None = None, remat: bool = False
) -> int:
    """FLOPs of one step (forward and backward) for one fact: the whole model (`full`), `lora` or `mome`.

    The fact has `tokens` tokens, of which `answer` have logits; `depth` replaces the numbers of layers of prefix and
    suffix. The backward pass costs a product for the activations, and one more for what is trained and for attention,
    where both factors have gradients. Memory that acts on answers computes the suffix of their tokens alone. With
    `remat`, memory tuning computes the suffix forward twice.
    """
    c, memory = config.backbone, config.memory
    prefix, suffix = depth or (c.num_layers - memory.num_layers, memory.num_layers)
    shapes = linear_layers.linear_shapes(c)
    weights = sum(i * o for i, o in shapes.values())
    attention = 2 * tokens * c.num_heads * c.head_dim
    unembedding = answer * c.embed_dim * c.vocab_size
    if method == "full":
        products = 3 * (prefix + suffix) * tokens * (weights + attention) + 3 * unembedding
    elif method == "lora":
        adapters = config.lora.rank * sum(i + o for i, o in shapes.values())
        products = (prefix + suffix) * tokens * (2 * weights + 3 * attention + 3 * adapters) + 2 * unembedding
    else:
        experts = memory.top_k * sum(shapes[memory.target])
        again = weights + attention + experts if remat else 0
        computed = answer if memory.positions == "answer" else tokens
        products = suffix * computed * (2 * weights + 3 * attention + 3 * experts + again) + 2 * unembedding
    return 2 * products


def before_first_step(config: Config, tokens: int) -> int:
    """FLOPs that memory tuning spends on a fact before its first step: a lookup, and the layers that are read for it,
    for the prefix's output and, where memory acts on answers, for the suffix's keys and values."""
    c = config.backbone
    weights = sum(i * o for i, o in linear_layers.linear_shapes(c).values())
    kept = c.num_layers - (config.memory.num_layers if config.memory.positions == "all" else 0)
    reading = (router_layer(config) + kept) * tokens * (weights + 2 * tokens * c.num_heads * c.head_dim)
    return 2 * (reading + config.memory.num_experts * config.router.key_dim)


def trained_parameters(config: Config, method: str) -> int:
    """Parameters that a step on one fact changes."""
    c = config.backbone
    shapes = linear_layers.linear_shapes(c)
    if method == "full":
        tables = 1 if c.tied_embeddings else 2
        per_layer = sum(i * o for i, o in shapes.values()) + 2 * c.embed_dim
        return c.num_layers * per_layer + tables * c.vocab_size * c.embed_dim + c.embed_dim
    if method == "lora":
        return config.lora.rank * lora_rank_parameters(c)
    return config.memory.num_layers * config.memory.top_k * sum(shapes[config.memory.target])


def lora_rank_parameters(config: BackboneConfig) -> int:
    """Parameters of a LoRA of rank 1 on every linear layer."""
    return config.num_layers * sum(map(sum, linear_layers.linear_shapes(config).values()))
