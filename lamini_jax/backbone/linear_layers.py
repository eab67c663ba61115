"""The linear layers of a block, and the low-rank terms that an adapter adds to them.

Letters: B sequences, T tokens, I and O the input and output width of a linear layer, K the rank of an adapter.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lamini_jax.config import BackboneConfig


class LowRank(NamedTuple):
    """A low-rank term of a linear layer: W x + up^T (down x). One for the batch (KI, KO) or one each (BKI, BKO)."""

    down: jax.Array
    up: jax.Array


Adapter = dict[str, LowRank]  # by the linear layer's name; every leaf has a leading axis over the layers of its part


class LinearLayer(NamedTuple):
    """A linear layer of a block: the half it is in, as checkpoints call it, and the names of its axes in `sharding`."""

    half: str
    input_axis: str | None  # None: the width of the residual stream
    output_axis: str | None


# Every linear layer of a block; each of them may carry an adapter.
LINEAR_LAYERS = {
    "q_proj": LinearLayer("self_attn", None, "heads"),
    "k_proj": LinearLayer("self_attn", None, "kv_heads"),
    "v_proj": LinearLayer("self_attn", None, "kv_heads"),
    "o_proj": LinearLayer("self_attn", "heads", None),
    "gate_proj": LinearLayer("mlp", None, "mlp"),
    "up_proj": LinearLayer("mlp", None, "mlp"),
    "down_proj": LinearLayer("mlp", "mlp", None),
}


def linear_shapes(config: BackboneConfig) -> dict[str, tuple[int, int]]:
    """Input and output width of every linear layer of a block."""
    c = config
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    widths = {None: c.embed_dim, "heads": heads, "kv_heads": kv_heads, "mlp": c.mlp_dim}
    return {name: (widths[layer.input_axis], widths[layer.output_axis]) for name, layer in LINEAR_LAYERS.items()}


class Linear(nn.Module):
    """A weight matrix, with or without a bias: operands in `dtype`, sums in float32."""

    shape: tuple[int, int]
    dtype: str
    use_bias: bool = False

    @nn.compact
    def __call__(self, x_BTI):
        start = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        weight_IO = self.param("weight", start, self.shape, self.dtype)
        y_BTO = project(x_BTI, weight_IO, self.dtype)
        if self.use_bias:
            y_BTO = y_BTO + self.param("bias", nn.initializers.zeros, self.shape[1:])[None, None]
        return y_BTO


def contract(equation: str, x, y, dtype: str):
    """An einsum in `dtype` with float32 sums; float32 is never rounded to less (GPUs and TPUs would)."""
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    return jnp.einsum(
        equation, x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x_BTI, weight_IO, dtype: str):
    """A linear layer, whose weight's gradient is one product.

    Left to itself, XLA's CPU backend transposes the whole batch inside a fused loop: a fifth of a step of all weights.
    """
    return contract("BTI,IO->BTO", x_BTI, weight_IO, dtype)


def _project_forward(x_BTI, weight_IO, dtype):
    return project(x_BTI, weight_IO, dtype), (x_BTI, weight_IO)


def _project_backward(dtype, saved, gradient_BTO):
    x_BTI, weight_IO = saved
    to_input_BTI = contract("BTO,IO->BTI", gradient_BTO, weight_IO, dtype)
    return to_input_BTI, contract("BTI,BTO->IO", x_BTI, gradient_BTO, dtype)


project.defvjp(_project_forward, _project_backward)


def low_rank(x_BTI, adapter: LowRank, dtype: str):
    """What an adapter adds to a linear layer of input x_BTI."""
    if adapter.down.ndim == 2:
        return project(project(x_BTI, adapter.down.T, dtype), adapter.up, dtype)
    hidden_BTK = contract("BTI,BKI->BTK", x_BTI, adapter.down, dtype)
    return contract("BTK,BKO->BTO", hidden_BTK, adapter.up, dtype)
