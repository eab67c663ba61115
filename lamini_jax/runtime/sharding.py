"""The mesh of devices, and which axis of an array is divided along which axis of the mesh.

A command calls `set_mesh` once, which makes the mesh ambient (`jax.set_mesh`). With a single device there is no mesh,
and the functions here change nothing. Axes of arrays have names, and only RULES says along which axis of the mesh each
is divided. What the compiler can shard by itself (the backbone) only gets constraints; tables of experts and of facts,
which must never be sent whole, are in `sharded_tables.py`.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

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


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for another thread: there it is called with the mesh that is ambient here, which threads do not
    inherit."""
    mesh = jax.sharding.get_mesh()

    @functools.wraps(function)
    def call(*arguments, **options):
        with contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh):
            return function(*arguments, **options)

    return call


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """The mesh of all devices, data before model. Raises UserError if it does not use them all."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.model]
    if sizes.count(-1) == 1:
        known = max(sizes)
        sizes[sizes.index(-1)] = len(devices) // max(known, 1)
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise UserError(
            f"--config.execution.mesh.data={config.data} --config.execution.mesh.model={config.model}: there are "
            f"{len(devices)} devices, and data x model must be their number (-1: what the other leaves)",
            status=DEVICES,
        )
    # Auto axes, not Explicit ones, which jax.make_mesh prefers: Linen's layers do not support those.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def set_mesh(config: MeshConfig, devices=None) -> contextlib.AbstractContextManager:
    """Makes the mesh ambient, from now on or as a context; with a single device there is none."""
    mesh = make_mesh(config, devices)
    return contextlib.nullcontext() if mesh.size == 1 else jax.set_mesh(mesh)


def current_mesh():
    """The ambient mesh (an abstract one), or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def num_shards(name: str) -> int:
    """The number of shards of an axis of this name."""
    mesh, axes = current_mesh(), RULES[name]
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in np.atleast_1d(axes))


def round_up(count: int, name: str) -> int:
    """`count` rounded up to a multiple of the number of shards of an axis of this name."""
    return -(-count // num_shards(name)) * num_shards(name)


def pad_rows(table, axis_name: str, fill=0) -> np.ndarray:
    """A table padded with rows of `fill`, so that the shards of its first axis, which has this name, are equal."""
    missing = round_up(len(table), axis_name) - len(table)
    return np.pad(table, [(0, missing), *[(0, 0)] * (np.ndim(table) - 1)], constant_values=fill)


def divisible_axes(names: Names, shape: tuple[int, ...]) -> Names:
    """The names of an array's axes, or of its first ones, with None for those that their shards do not divide."""
    return tuple(name if name and n % num_shards(name) == 0 else None for name, n in zip(names, shape, strict=False))


def partition_spec(names: Names) -> P:
    """The PartitionSpec of an array whose axes have these names."""
    return P(*(name and RULES[name] for name in names))


def constrain(x, *names: str | None):
    """Inside jit: `x` sharded by its axes' names (without names: a whole copy on every device)."""
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(divisible_axes(names, x.shape) if names else ()))


def put(x, *names: str | None):
    """Puts an array that every host has on the devices; each device gets only its own part."""
    if current_mesh() is None:
        return jnp.asarray(x)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding_of(names, x.shape), lambda index: x[index])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def zeros(shape: tuple[int, ...], dtype, names: Names):
    """An array of zeros, each part made on its own device."""
    return constrain(jnp.zeros(shape, dtype), *names)


def sharding_of(names: Names, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The sharding of an array of this shape whose axes have these names."""
    if current_mesh() is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(jax.sharding.get_mesh(), partition_spec(divisible_axes(names, shape) if names else ()))
