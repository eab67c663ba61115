"""A short name for weights that depends on every one of them, and only on their names and their values."""

import concurrent.futures
import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from lamini_jax.backbone.checkpoints._names import EMBEDDING, HEAD

_AT_ONCE = 2**22  # numbers that are hashed at once, a few threads of them
_THREADS = 8
_BYTES = hashlib.sha256().digest_size


def fingerprint(tensors: Mapping[str, Any]) -> str:
    """The name for tensors under their names in the files: arrays, or objects that are read in slices as arrays are.

    It does not depend on how they are stored: on the files, on the format of the numbers as long as their values are
    the same, or on whether a head that equals the embedding is stored too. Every process calls it, and reads a part.
    """
    names = sorted(tensors)
    digests = np.zeros((len(names), _BYTES), np.uint8)
    mine = range(jax.process_index(), len(names), jax.process_count())
    with concurrent.futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda number: _digest(tensors[names[number]]), mine)
        for number, digest in zip(mine, found, strict=True):
            digests[number] = np.frombuffer(digest, np.uint8)
    if jax.process_count() > 1:
        digests = multihost_utils.process_allgather(digests).max(axis=0)
    by_name = {name: digest.tobytes().hex() for name, digest in zip(names, digests, strict=True)}
    head = by_name.pop(HEAD, None)
    if head is not None and by_name.setdefault(EMBEDDING, head) != head:
        by_name[HEAD] = head
    return hashlib.sha256(json.dumps(by_name, sort_keys=True).encode()).hexdigest()[:16]


def _digest(tensor: Any) -> bytes:
    shape = tuple(map(int, tensor.shape))
    digest = hashlib.sha256(json.dumps(shape).encode())
    if not shape:
        _update(digest, tensor[...])
        return digest.digest()
    rows = max(1, _AT_ONCE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        _update(digest, tensor[start : min(start + rows, shape[0])])
    return digest.digest()


def _update(digest: Any, part: np.ndarray) -> None:
    """Adds numbers in the narrowest of bfloat16, float32 and float64 that holds them exactly, and its name."""
    name, bits = _narrowest(np.ascontiguousarray(part))
    digest.update(name)
    digest.update(bits.reshape(-1).view(np.uint8))


def _narrowest(part: np.ndarray) -> tuple[bytes, np.ndarray]:
    if part.dtype == np.float64:
        with np.errstate(over="ignore"):
            rounded = part.astype(np.float32)
        if not np.array_equal(rounded, part):
            return b"float64", part
        part = rounded
    if part.dtype != ml_dtypes.bfloat16:
        bits = part.astype(np.float32).view(np.uint32)
        if (bits & 0xFFFF).any():
            return b"float32", bits
        part = (bits >> 16).astype(np.uint16)
    return b"bfloat16", part
