"""The array of experts: one row of R floats each, a rank-1 LoRA for every memory layer.

A row holds the M down vectors (of the target's input width I), then the M up vectors (of its output width O). Up
vectors start at zero: an expert that nobody has trained adds exactly nothing. Down vectors start as random signs, which
project as well as Gaussian numbers do (Achlioptas 2003) and cost one random bit each.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lamini_jax.backbone import Adapter, LowRank, linear_shapes
from lamini_jax.config import BackboneConfig, MemoryConfig


class RowShape(NamedTuple):
    """What a row is made of."""

    layers: int
    input_width: int
    output_width: int

    @property
    def floats(self) -> int:
        return self.layers * (self.input_width + self.output_width)


def row_shape(backbone: BackboneConfig, memory: MemoryConfig) -> RowShape:
    """The shape of the experts on `memory.target`."""
    return RowShape(memory.layers, *linear_shapes(backbone)[memory.target])


@functools.partial(jax.jit, static_argnames=("shape", "num_experts"))
def init(key: jax.Array, shape: RowShape, num_experts: int):
    """rows_NR. A row is a function of the key and its id, made where it lies; nothing else of size N is built."""

    def row(expert_id):
        width = shape.layers * shape.input_width
        words = jax.random.bits(jax.random.fold_in(key, expert_id), (-(-width // 32),), jnp.uint32)
        bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
        down = jnp.where(bits.reshape(-1)[:width] == 1, 1.0, -1.0) * shape.input_width**-0.5
        return jnp.pad(down, (0, shape.layers * shape.output_width))

    return jax.lax.map(row, jnp.arange(num_experts), batch_size=min(num_experts, 1024))


def gather(rows_NR, expert_ids):
    """The rows of some experts; zeros for ids that are out of range."""
    return rows_NR.at[expert_ids].get(mode="fill", fill_value=0)


def gather_trained(expert_ids_S, rows_SR, expert_ids):
    """`gather` from the trained rows alone (ascending ids): all others add nothing, so serving needs no more."""
    places = jnp.searchsorted(expert_ids_S, expert_ids)
    found = expert_ids_S.at[places].get(mode="clip") == expert_ids
    return gather(rows_SR, jnp.where(found, places, expert_ids_S.size))


def scatter(rows_NR, expert_ids_U, rows_UR):
    """The bank with some rows replaced; ids that are out of range are passed over."""
    return rows_NR.at[expert_ids_U].set(rows_UR, mode="drop")


def split(rows, shape: RowShape) -> dict[str, jax.Array]:
    """Rows (..., R) as {"down": (..., M, I), "up": (..., M, O)}."""
    cut = shape.layers * shape.input_width
    return {
        "down": rows[..., :cut].reshape(*rows.shape[:-1], shape.layers, shape.input_width),
        "up": rows[..., cut:].reshape(*rows.shape[:-1], shape.layers, shape.output_width),
    }


def merge(parts: dict[str, jax.Array]):
    """The inverse of `split`."""
    flat = [parts[name].reshape(*parts[name].shape[:-2], -1) for name in ("down", "up")]
    return jnp.concatenate(flat, axis=-1)


def adapter(rows_BKR, gates_BK, shape: RowShape, target: str) -> Adapter:
    """The rank-K adapter of the suffix: W x + sum_k gate_k up_k (down_k . x) in each memory layer (Figure 4)."""
    parts = split(rows_BKR, shape)
    down_MBKI = jnp.moveaxis(parts["down"], 2, 0)
    up_MBKO = jnp.moveaxis(parts["up"] * gates_BK[:, :, None, None], 2, 0)
    return {target: LowRank(down_MBKI, up_MBKO)}
