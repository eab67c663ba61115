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


class Exchange(NamedTuple):
    """The way from a part of a batch to the shards of a table and back: X rows of the part, Y of what a shard is sent.

    A part asks each shard for at most `most` rows, so that what travels is proportional to that.
    """

    shard: Shard
    most: int
    places_X: Any  # of the part's rows among those that it sends, `most` to each shard; out of range for no shard's

    def send(self, x_X, fill):
        """x_Y: what this shard is sent, in the order of the batch, with `fill` between the parts."""
        if not self.shard.sharded:
            return x_X
        x_Y = jnp.full((self._length(), *x_X.shape[1:]), fill, x_X.dtype)
        return self._swap(x_Y.at[self.places_X].set(x_X, mode="drop"))

    def fetch(self, x_Y):
        """x_X: what each of the part's rows got from its shard; zeros for no shard's."""
        if not self.shard.sharded:
            return x_Y
        return self._swap(x_Y).at[self.places_X].get(mode="fill", fill_value=0)

    def _length(self) -> int:
        return self.most * sharding.num_shards("batch")

    def _swap(self, x_Y):
        return jax.lax.all_to_all(x_Y, "data", split_axis=0, concat_axis=0, tiled=True)


def exchange(shard: Shard, ids_X, rows: int, most: int) -> tuple[Exchange, Any]:
    """The exchange for these ids of a table that has `rows` rows in each shard, and rows_Y: those that are asked for.

    A row of `rows`, which is out of range, stands for none. No part may ask a shard for more than `most` rows.
    """
    shards = sharding.num_shards("batch") if shard.sharded else 1
    known_X = (ids_X >= 0) & (ids_X < rows * shards)
    rows_X = jnp.where(known_X, ids_X % rows, rows)
    if not shard.sharded:
        return Exchange(shard, ids_X.size, None), rows_X
    owner_XH = (ids_X // rows)[:, None] == jnp.arange(shards)[None]
    before_X = jnp.sum(jnp.cumsum(owner_XH, axis=0) * owner_XH, axis=1) - 1
    found = Exchange(shard, most, jnp.where(known_X, ids_X // rows * most + before_X, shards * most))
    return found, found.send(rows_X, rows)


def gather_rows(tables, index_BX, axes: Any, most: int | None = None):
    """Rows of tables that are divided over `data`, for each index of a batch; zeros for what is out of range.

    Each shard sends every part of the batch the rows that it needs. `axes` are those of the tables, a pytree prefix.
    With `most`, as in `exchange`, traffic is proportional to that; without, to the batch.
    """
    count = index_BX.shape[0]
    padding = [(0, sharding.round_up(count, "batch") - count), *[(0, 0)] * (index_BX.ndim - 1)]
    index_BX = jnp.pad(index_BX, padding, constant_values=-1)

    def exchanged(shard, tables, index_bX):
        found, rows_Y = exchange(shard, index_bX.reshape(-1), jax.tree.leaves(tables)[0].shape[0], most)

        def rows(table):
            rows_X = found.fetch(table.at[rows_Y].get(mode="fill", fill_value=0))
            return rows_X.reshape(*index_bX.shape, *table.shape[1:])

        return jax.tree.map(rows, tables)

    def summed(shard, tables, index_bX):
        index_BX = shard.all_gather(index_bX)

        def rows(table):
            return table.at[shard.local_rows(index_BX, table.shape[0])].get(mode="fill", fill_value=0)

        return jax.tree.map(lambda table: shard.reduce_scatter(rows(table)), tables)

    batch = ("batch",) + (None,) * (index_BX.ndim - 1)
    out_axes = jax.tree.map(lambda names: batch + names[1:], axes, is_leaf=_is_names)
    rows = on_shards(exchanged if most else summed, (axes, batch), out_axes)(tables, index_BX)
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
