"""Files in the format of the safetensors library."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lamini_jax.errors import UserError

_ROWS = 16  # of each tensor that go into a fingerprint


def open_file(path: Path):
    """A file whose tensors can be read one by one and in parts. Raises UserError if it is damaged."""
    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); download it again") from None


def fingerprint(paths: Iterable[Path]) -> str:
    """A short name for the weights in some files, however they are spread over them.

    It depends on some rows of every tensor: weights that were trained further, or merged, have another.
    """
    digests = {}
    for file in map(open_file, paths):
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_slice(name)
            digest = hashlib.sha256(f"{name} {tensor.get_dtype()} {tensor.get_shape()}".encode())
            for row in np.linspace(0, tensor.get_shape()[0] - 1, _ROWS).astype(int).tolist():
                digest.update(tensor[row : row + 1].tobytes())
            digests[name] = digest.hexdigest()
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]
