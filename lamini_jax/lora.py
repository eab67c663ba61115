"""The baseline that the paper compares with: one LoRA on every linear layer of the frozen backbone (appendix A)."""

import jax

from lamini_jax.backbone import Adapter, Decoder, LowRank, linear_shapes


def init(decoder: Decoder, rank: int, key: jax.Array) -> dict[str, Adapter]:
    """Adapters of prefix and suffix. As in the experts, the down matrix starts random and the up matrix at zero."""
    config = decoder.config
    parts = {"prefix": config.num_layers - decoder.memory_layers, "suffix": decoder.memory_layers}
    shapes = linear_shapes(config)
    keys = iter(jax.random.split(key, len(parts) * len(shapes)))

    def low_rank(layers, input_width, output_width):
        bound = (3 / input_width) ** 0.5
        down = jax.random.uniform(next(keys), (layers, rank, input_width), minval=-bound, maxval=bound)
        return LowRank(down, jax.numpy.zeros((layers, rank, output_width)))

    return {part: {name: low_rank(layers, *shapes[name]) for name in shapes} for part, layers in parts.items()}
