"""Random keys: made from the seed on the devices that keep them, and checked by a hash when they are made again.

Keys are random signs, scaled to unit length. Signs spread as well as random directions do, and no device rounds them:
the same seed makes the same keys on all devices. Files keep a hash of them and not the keys.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.errors import UserError
from lamini_jax.runtime import sharding

_SAMPLE = 4096  # rows that are hashed: enough, since other random keys differ in each of them


def random_signs(seed: int, struct: jax.ShapeDtypeStruct, axes: sharding.Names):
    """Keys of this shape along these axes, of unit length along the last."""
    return _draw(np.uint32(seed), struct, axes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(seed, struct: jax.ShapeDtypeStruct, axes: sharding.Names):
    """Each key is made on its device, and is the same whatever N is rounded up to."""
    *leading, key_dim = struct.shape
    key = jax.random.fold_in(jax.random.key(seed), 4)
    words = jax.random.bits(key, (*leading, -(-key_dim // 32)), jnp.uint32)
    shifts = jnp.arange(32, dtype=jnp.uint32).reshape((1,) * len(struct.shape) + (-1,))
    bits = (words[..., None] >> shifts) & 1
    bits = bits.reshape(*leading, -1)[..., :key_dim]
    length = key_dim**-0.5
    return sharding.constrain(jnp.where(bits == 1, length, -length).astype(struct.dtype), *axes)


def fingerprint(keys, num_rows: int) -> dict[str, str]:
    """A hash of some of the first `num_rows` rows, evenly spaced: the same on any mesh and in every process."""
    count = min(num_rows, _SAMPLE)
    index_X = (np.arange(count, dtype=np.int64) * num_rows // count).astype(np.int32)
    rows_XC = np.asarray(sample(keys, index_X)).astype("<f4")
    return {"keys_sha256": hashlib.sha256(rows_XC.tobytes()).hexdigest()}


@jax.jit
def sample(keys, index_X):
    """Some rows of keys (..., C), on every device; of sharded keys only these rows are sent."""
    return sharding.constrain(keys.reshape(-1, keys.shape[-1])[index_X])


def verify(found: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises UserError if keys that were made again are not those that were saved."""
    if not isinstance(saved, Mapping) or any(saved.get(name) != value for name, value in found.items()):
        raise UserError("this version of jax makes other random keys from the same seed; use the one that tuned")
