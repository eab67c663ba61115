"""The mesh of devices, and which axis of an array lies along which axis of the mesh.

A command calls `use` once; from then on there is a mesh, which is ambient (`jax.set_mesh`), or with a single device
none, and then everything here gives back what it was given. Axes of arrays have names, and RULES alone says where each
goes. What the compiler can shard by itself is constrained and left to it (the backbone); what must never travel whole,
tables of experts and of facts, is `owned`: each shard works on its own part and the shards exchange rows.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lamini_jax.config import MeshConfig
from lamini_jax.errors import DEVICES, UserError

AXES = ("data", "model")
RULES = {
    "batch": "data",
    "facts": "data",
    "experts": "data",
    "columns": "model",  # of an expert's row, where the backbone's activations have the same ones
    "keys": AXES,
    "width": "model",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "vocab": "model",
}
Names = tuple[str | None, ...]
# Rows of each shard that are filled in, or exchanged, at a time.
_TURN = 256


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """The mesh of all devices, data before model. Raises UserError if it does not use them all."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.model]
    if sizes.count(-1) == 1:
        known = max(sizes)
        sizes[sizes.index(-1)] = len(devices) // max(known, 1)
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise UserError(
            f"--config.mesh.data={config.data} --config.mesh.model={config.model}: {len(devices)} devices are at hand, "
            "and data x model must be their number (-1: what the other leaves)",
            status=DEVICES,
        )
    # Auto axes, not Explicit ones, which jax.make_mesh prefers: Linen's layers know nothing of those.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def use(config: MeshConfig, devices=None) -> contextlib.AbstractContextManager:
    """Makes the mesh ambient, from now on or as a context; with a single device there is none."""
    mesh = make_mesh(config, devices)
    return contextlib.nullcontext() if mesh.size == 1 else jax.set_mesh(mesh)


def active():
    """The ambient mesh, abstract, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def size(name: str) -> int:
    """Among how many shards an axis of this name is divided."""
    mesh, axes = active(), RULES[name]
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in np.atleast_1d(axes))


def padded(count: int, name: str) -> int:
    """`count` rounded up to what the shards of an axis can have in equal parts."""
    return -(-count // size(name)) * size(name)


def fit(names: Names, shape: tuple[int, ...]) -> Names:
    """The names, of the first axes at least, without those of axes that their shards do not divide."""
    return tuple(name if name and n % size(name) == 0 else None for name, n in zip(names, shape, strict=False))


def spec(names: Names) -> P:
    """Where an array with these axes lies."""
    return P(*(name and RULES[name] for name in names))


def constrain(x, *names: str | None):
    """Inside jit: `x` laid out by its axes' names (none at all: whole, on every device)."""
    if active() is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(fit(names, x.shape) if names else ()))


def put(x, *names: str | None):
    """An array that every host has, on the devices; each gets its own part and no more."""
    if active() is None:
        return jnp.asarray(x)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, layout(names, x.shape), lambda index: x[index])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def zeros(shape: tuple[int, ...], dtype, names: Names):
    """An array to fill, made where it lies."""
    return constrain(jnp.zeros(shape, dtype), *names)


def layout(names: Names, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """Where an array lies, for who asks for devices."""
    if active() is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(jax.sharding.get_mesh(), spec(fit(names, shape) if names else ()))


class Shard(NamedTuple):
    """A shard's view of a table and of a batch, both divided over `data`; alone, if there is no mesh."""

    sharded: bool

    def index(self, axis: str):
        return jax.lax.axis_index(axis) if self.sharded else 0

    def collect(self, x_bX):
        """A batch whole, from its parts x_bX."""
        return jax.lax.all_gather(x_bX, "data", tiled=True) if self.sharded else x_bX

    def hand_out(self, x_BX):
        """Each shard's part of the sum over all shards."""
        return jax.lax.psum_scatter(x_BX, "data", tiled=True) if self.sharded else x_BX

    def places(self, ids, rows: int):
        """Where ids of the whole table are in this shard's `rows`; elsewhere is `rows`, which is out of range."""
        local = ids - self.index("data") * rows
        return jnp.where((local >= 0) & (local < rows), local, rows)


def owned(function: Callable, in_axes: Any, out_axes: Any) -> Callable:
    """`function(shard, *arguments)` on each shard's part of the arguments; axes are given as pytree prefixes of names.

    Only sizes that their shards divide: there are no names for what is not sharded but None.
    """
    if active() is None:
        return functools.partial(function, Shard(False))

    def specs(axes):
        return jax.tree.map(spec, axes, is_leaf=_is_names)

    def local(*arguments):
        return function(Shard(True), *arguments)

    return jax.shard_map(local, in_specs=specs(in_axes), out_specs=specs(out_axes), check_vma=False)


def take(tables, index_BX, axes: Any):
    """Rows of tables that are divided over `data`, for each index of a batch; zeros for what is out of range.

    Each shard finds its own rows among those asked for, and gives every shard of the batch what it needs: traffic is
    proportional to the batch. `axes` are those of the tables, a pytree prefix.
    """
    count = index_BX.shape[0]
    index_BX = jnp.pad(index_BX, [(0, padded(count, "batch") - count), *[(0, 0)] * (index_BX.ndim - 1)])

    def local(shard, tables, index_bX):
        index_BX = shard.collect(index_bX)

        def rows(table):
            return table.at[shard.places(index_BX, table.shape[0])].get(mode="fill", fill_value=0)

        return jax.tree.map(lambda table: shard.hand_out(rows(table)), tables)

    batch = ("batch",) + (None,) * (index_BX.ndim - 1)
    out_axes = jax.tree.map(lambda names: batch + names[1:], axes, is_leaf=_is_names)
    rows = owned(local, (axes, batch), out_axes)(tables, index_BX)
    return jax.tree.map(lambda x: x[:count], rows)


@functools.partial(jax.jit, static_argnames="axes", donate_argnums=0)
def write(tables, blocks, start, axes: Any):
    """The tables with a block of each shard's rows replaced, from its row `start` on."""

    def local(_, tables, blocks, start):
        def replaced(table, block):
            return jax.lax.dynamic_update_slice_in_dim(table, block.astype(table.dtype), start, axis=0)

        return jax.tree.map(replaced, tables, blocks)

    return owned(local, (axes, axes, ()), axes)(tables, blocks, start)


def turns(rows: int, name: str):
    """(start, index): the rows of a table divided over an axis, some of each shard's at a time."""
    index_PX = np.arange(rows, dtype=np.int32).reshape(size(name), -1)
    for start in range(0, index_PX.shape[1], _TURN):
        yield start, index_PX[:, start : start + _TURN].reshape(-1)


def _is_names(axes) -> bool:
    """A plain tuple of names, and not one of optax's, which may be empty."""
    return type(axes) is tuple and all(name is None or isinstance(name, str) for name in axes)
