"""The array of experts: one row of R floats each, a rank-1 LoRA for every memory layer.

A row is a down vector (of the target's input width I) and an up vector (of its output width O) for each of M layers:
experts_NR is {"down": (N, M, I), "up": (N, M, O)}. Up vectors start at zero, so an untrained expert adds exactly
nothing. Down vectors start as random signs, which project as well as Gaussian numbers do (Achlioptas 2003) and need
only one random bit each. On a mesh, experts are divided over `data` and columns over `model`; N is rounded up to a
multiple of the shards, and the additional experts are never selected. On TPUs the columns of a shard should be a
multiple of 128, as those of large models are: otherwise XLA keeps the array in a layout that it copies in every step.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.backbone.linear_layers import LINEAR_LAYERS, Adapter, LowRank, linear_shapes
from lamini_jax.config import BackboneConfig, MemoryConfig
from lamini_jax.errors import DEVICES, UserError
from lamini_jax.runtime import sharded_tables, sharding

PARTS = ("down", "up")
AXES = ("experts", None, "columns")  # the axes of both parts of experts_NR


class ExpertShape(NamedTuple):
    """The shape of an expert."""

    layers: int
    input_width: int
    output_width: int

    @property
    def floats(self) -> int:
        return self.layers * (self.input_width + self.output_width)

    def parts(self, *leading: int) -> dict[str, tuple[int, ...]]:
        """The shapes of both parts of a row, or of rows with these leading axes."""
        return {
            "down": (*leading, self.layers, self.input_width),
            "up": (*leading, self.layers, self.output_width),
        }


def check_target(target: str) -> None:
    """Raises UserError if `memory.target` is not a linear layer of a block."""
    if target not in LINEAR_LAYERS:
        raise UserError(f"--config.memory.target={target}: must be one of {', '.join(LINEAR_LAYERS)}")


def expert_shape(backbone: BackboneConfig, memory: MemoryConfig) -> ExpertShape:
    """The shape of the experts on `memory.target`. Raises UserError if the mesh cannot divide their columns."""
    check_target(memory.target)
    shape, shards = (
        ExpertShape(memory.num_layers, *linear_shapes(backbone)[memory.target]),
        sharding.num_shards("columns"),
    )
    if shape.input_width % shards or shape.output_width % shards:
        widths = f"{shape.input_width} and {shape.output_width}, the widths of {memory.target}"
        raise UserError(
            f"--config.execution.mesh.model: {shards} shards of the model must divide {widths}", status=DEVICES
        )
    return shape


@functools.partial(jax.jit, static_argnames=("shape", "num_experts", "dtype"))
def init(seed, shape: ExpertShape, num_experts: int, dtype: str = "float32"):
    """experts_NR. A row depends on the seed and its id, and is made on its device; nothing else has size N."""
    rows = sharding.round_up(num_experts, "experts") // sharding.num_shards("experts")

    def local(shard):
        return _fresh(shard, seed, shard.index("data") * rows + jnp.arange(rows), shape, dtype)

    return sharded_tables.on_shards(local, (), AXES)()


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def fresh(seed, expert_ids_S, shape: ExpertShape, dtype: str = "float32"):
    """experts_SR: the rows that `init` makes for some experts only; the shards must divide S."""

    def local(shard, ids_s):
        return _fresh(shard, seed, ids_s, shape, dtype)

    return sharded_tables.on_shards(local, (AXES[:1],), AXES)(expert_ids_S)


def _fresh(shard: sharded_tables.Shard, seed, expert_ids_s, shape: ExpertShape, dtype: str):
    """One shard's part of the rows of experts that nothing has trained."""
    columns = {name: part[-1] // sharding.num_shards("columns") for name, part in shape.parts().items()}
    first_column = shard.index("model") * columns["down"]
    scale = shape.input_width**-0.5
    key = jax.random.fold_in(jax.random.key(seed), 2)

    def row(expert_id):
        width = shape.layers * shape.input_width
        words = jax.random.bits(jax.random.fold_in(key, expert_id), (-(-width // 32),), jnp.uint32)
        bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
        signs_MI = bits.reshape(-1)[:width].reshape(shape.layers, shape.input_width)
        signs_MI = jax.lax.dynamic_slice_in_dim(signs_MI, first_column, columns["down"], axis=1)
        return jnp.where(signs_MI == 1, scale, -scale).astype(dtype)

    down = jax.lax.map(row, expert_ids_s, batch_size=min(expert_ids_s.shape[0], 1024))
    return {"down": down, "up": jnp.zeros((expert_ids_s.shape[0], shape.layers, columns["up"]), dtype)}


def gather(experts_NR, expert_ids_BX, most: int | None = None):
    """The rows of some experts; zeros for ids that are out of range. `most` is that of `sharded_tables.exchange`."""
    return sharded_tables.gather_rows(experts_NR, expert_ids_BX, AXES, most)


def gather_trained(expert_ids_S, experts_SR, expert_ids_BK):
    """`gather` from the trained experts only (ascending ids): all others add nothing, so serving does not need them."""
    slots_BK = jnp.searchsorted(expert_ids_S, expert_ids_BK)
    trained_BK = expert_ids_S.at[slots_BK].get(mode="clip") == expert_ids_BK
    return gather(experts_SR, jnp.where(trained_BK, slots_BK, np.iinfo(np.int32).max))


def adapter(rows_BKR, gates_BK, target: str) -> Adapter:
    """The rank-K adapter of the suffix: W x + sum_k gate_k up_k (down_k . x) in each memory layer (Figure 4)."""
    down_MBKI = jnp.moveaxis(rows_BKR["down"], 2, 0)
    up_MBKO = jnp.moveaxis(rows_BKR["up"] * gates_BK[:, :, None, None].astype(rows_BKR["up"].dtype), 2, 0)
    return {target: LowRank(down_MBKI, up_MBKO)}
