"""Assembles parameters on the devices tensor by tensor, whatever the format that they are read from."""

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lamini_jax.backbone import transformer
from lamini_jax.config import BackboneConfig
from lamini_jax.runtime import sharded_tables, sharding

_ROWS_AT_ONCE = 1024  # that are compared at once

Index = tuple[slice, ...]
ReadPart = Callable[[Index], np.ndarray]  # a part of one tensor
# From the name of a parameter ("q_proj/weight"), the number of its layer (None: it is in no layer) and its shape there.
OpenTensor = Callable[[str, int | None, tuple[int, ...]], ReadPart]


@functools.lru_cache(maxsize=4)
def split_shapes(decoder: transformer.Decoder) -> Any:
    """The shapes of a backbone's parameters, split as `decoder` is; loading asks several times for what takes long."""
    return jax.eval_shape(lambda: transformer.init(decoder, jax.random.key(0)))


def whole_shapes(config: BackboneConfig) -> Any:
    """The shapes of a backbone's parameters in one stack of layers."""
    return jax.eval_shape(transformer.join_layers, split_shapes(transformer.Decoder(config, 1)))


def parts(config: BackboneConfig, shapes: Any) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
    """The arguments of `open_tensor` for every tensor that `load` opens."""
    for path, leaf in flatten_dict(shapes).items():
        name, first, stacked = _place(config, path, shapes)
        if not stacked:
            yield name, first, leaf.shape
        else:
            yield from ((name, first + row, leaf.shape[1:]) for row in range(leaf.shape[0]))


def load(config: BackboneConfig, shapes: Any, open_tensor: OpenTensor) -> transformer.Params:
    """Parameters of these shapes, each part read where it is kept; the host holds at most two copies of one tensor."""
    axes_of, params = flatten_dict(transformer.axes(config, shapes)), {}
    for path, leaf in flatten_dict(shapes).items():
        axes = sharding.divisible_axes(axes_of[path], leaf.shape)
        name, first, stacked = _place(config, path, shapes)
        if not stacked:
            params[path] = _array(open_tensor(name, first, leaf.shape), leaf.shape, leaf.dtype, axes)
            jax.block_until_ready(params[path])
            gc.collect(0)
            continue
        stack = sharding.zeros(leaf.shape, leaf.dtype, axes)
        for row in range(leaf.shape[0]):
            read = open_tensor(name, first + row, leaf.shape[1:])
            layer = _array(lambda index, read=read: read(index[1:])[None], (1, *leaf.shape[1:]), leaf.dtype, axes)
            # Without waiting, the host would read ahead and hold many tensors.
            stack = jax.block_until_ready(sharded_tables.write_rows(stack, layer, np.int32(row), axes))
            del layer
            gc.collect(0)  # jax frees the host's memory behind an array when it is next called, or here
        params[path] = stack
    return unflatten_dict(params)


def are_equal(first: Any, second: Any) -> bool:
    """Whether two tensors have the same values, whatever their formats; read in slices until they differ."""
    if first.shape != second.shape or not first.shape:
        return False
    count = first.shape[0]
    parts = (slice(start, min(start + _ROWS_AT_ONCE, count)) for start in range(0, count, _ROWS_AT_ONCE))
    return all(np.array_equal(first[part], second[part]) for part in parts)


def _place(config: BackboneConfig, path: tuple[str, ...], shapes: Any) -> tuple[str, int | None, bool]:
    """The name of a parameter ("q_proj/weight"), its (first) layer, and whether it is a stack of layers.

    The layer is None for what is in none.
    """
    part, *rest = path
    if part == "suffix_layers":
        number, *rest = rest
        return "/".join(rest), config.num_layers - len(shapes[part]) + int(number), False
    if part in ("prefix_layers", "layers"):
        return "/".join(rest), 0, True
    return "/".join(path), None, False


def _array(read: ReadPart, shape: tuple[int, ...], dtype, axes: sharding.Names) -> jax.Array:
    def part(index):
        return np.asarray(read(index), dtype, order="C")

    return jax.make_array_from_callback(shape, sharding.sharding_of(axes, shape), part)
