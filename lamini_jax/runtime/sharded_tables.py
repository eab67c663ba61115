"""Tables whose rows are divided over the mesh's `data` axis and must never be sent whole: experts, facts, slots.

Each shard works on its own part (`on_shards`), and the shards exchange the rows that a batch needs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lamini_jax.runtime import sharding

# Rows of each shard that are written, or exchanged, at a time.
_CHUNK = 256


class Shard(NamedTuple):
    """A shard's view of a table and of a batch, both divided over `data`; without a mesh, the only shard."""

    sharded: bool

    def index(self, axis: str):
        return jax.lax.axis_index(axis) if self.sharded else 0

    def all_gather(self, x_bX):
        """The whole batch, from its parts x_bX."""
        return jax.lax.all_gather(x_bX, "data", tiled=True) if self.sharded else x_bX

    def reduce_scatter(self, x_BX):
        """Each shard's part of the sum over all shards."""
        return jax.lax.psum_scatter(x_BX, "data", tiled=True) if self.sharded else x_BX

    def local_rows(self, ids, rows: int):
        """The rows in this shard of ids of the whole table; for ids of other shards `rows`, which is out of range."""
        local = ids - self.index("data") * rows
        return jnp.where((local >= 0) & (local < rows), local, rows)


def on_shards(function: Callable, in_axes: Any, out_axes: Any) -> Callable:
    """`function(shard, *arguments)` on each shard's part of the arguments; axes are given as pytree prefixes of names.

    The number of shards must divide the size of every named axis; an axis that is not sharded has the name None.
    """
    if sharding.current_mesh() is None:
        return functools.partial(function, Shard(False))

    def specs(axes):
        return jax.tree.map(sharding.partition_spec, axes, is_leaf=_is_names)

    def local(*arguments):
        return function(Shard(True), *arguments)

    return jax.shard_map(local, in_specs=specs(in_axes), out_specs=specs(out_axes), check_vma=False)


def gather_rows(tables, index_BX, axes: Any):
    """Rows of tables that are divided over `data`, for each index of a batch; zeros for what is out of range.

    Each shard looks up its own rows and sends every shard of the batch those that it needs: traffic is proportional to
    the batch. `axes` are those of the tables, a pytree prefix.
    """
    count = index_BX.shape[0]
    index_BX = jnp.pad(index_BX, [(0, sharding.round_up(count, "batch") - count), *[(0, 0)] * (index_BX.ndim - 1)])

    def local(shard, tables, index_bX):
        index_BX = shard.all_gather(index_bX)

        def rows(table):
            return table.at[shard.local_rows(index_BX, table.shape[0])].get(mode="fill", fill_value=0)

        return jax.tree.map(lambda table: shard.reduce_scatter(rows(table)), tables)

    batch = ("batch",) + (None,) * (index_BX.ndim - 1)
    out_axes = jax.tree.map(lambda names: batch + names[1:], axes, is_leaf=_is_names)
    rows = on_shards(local, (axes, batch), out_axes)(tables, index_BX)
    return jax.tree.map(lambda x: x[:count], rows)


@functools.partial(jax.jit, static_argnames="axes", donate_argnums=0)
def write_rows(tables, blocks, start, axes: Any):
    """The tables with a block of rows replaced in each shard, beginning at the shard's row `start`."""

    def local(_, tables, blocks, start):
        def replaced(table, block):
            return jax.lax.dynamic_update_slice_in_dim(table, block.astype(table.dtype), start, axis=0)

        return jax.tree.map(replaced, tables, blocks)

    return on_shards(local, (axes, axes, ()), axes)(tables, blocks, start)


def whole(table: jax.Array) -> np.ndarray:
    """A table of moderate size on every host."""
    return np.asarray(table if jax.process_count() == 1 else multihost_utils.process_allgather(table, tiled=True))


def row_chunks(rows: int, name: str):
    """(start, index): the indices of a sharded table's rows, a chunk of every shard at a time, from its row `start`."""
    index_by_shard = np.arange(rows, dtype=np.int32).reshape(sharding.num_shards(name), -1)
    for start in range(0, index_by_shard.shape[1], _CHUNK):
        yield start, index_by_shard[:, start : start + _CHUNK].reshape(-1)


def _is_names(axes) -> bool:
    """Whether this is a plain tuple of names, and not one of optax's named tuples, which may be empty."""
    return type(axes) is tuple and all(name is None or isinstance(name, str) for name in axes)
