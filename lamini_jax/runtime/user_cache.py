"""The directory in which commands keep what later ones need again: compiled programs, and what calibration has read.

None of these decides a result, and they may be removed at any time. Scopes that the user has trained are in it, too.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

_COMPILED_BYTES = 2 * 10**9  # the programs used least recently are removed beyond this
_COMPILED_SECONDS = 0.01  # what takes less to compile is not kept; a start needs forty programs that take little more


def default() -> str:
    """Where it is unless a flag says otherwise: the place of caches on this system."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lamini_jax")


_directory = default()


def use(directory: str) -> None:
    """Keeps everything in this directory from now on, compiled programs included.

    Nothing is kept if the name is empty or nothing can be written there.
    """
    global _directory
    import jax

    with contextlib.suppress(OSError):
        os.makedirs(directory, exist_ok=True)
    _directory = directory if os.access(directory, os.W_OK) else ""
    if _directory:
        jax.config.update("jax_compilation_cache_dir", os.path.join(directory, "compiled"))
        jax.config.update("jax_compilation_cache_max_size", _COMPILED_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _COMPILED_SECONDS)


def folder(name: str) -> Path | None:
    """Where things of one kind are kept, whether or not it exists yet; None if nothing is."""
    return Path(_directory, name) if _directory else None


def array(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of this name, which must say all that it depends on; made and kept if it is not there.

    A file that cannot be read is made again, and one that cannot be written is not kept.
    """
    import jax

    path = Path(_directory, f"{name}.npy")
    if not _directory or jax.process_count() > 1:  # several processes compute together, or none of them does
        return make()
    with contextlib.suppress(OSError, ValueError, EOFError), path.open("rb") as file:
        return np.lib.format.read_array(file)
    made = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
            np.save(f"{unfinished}/{path.name}", made)
            os.replace(f"{unfinished}/{path.name}", path)
    return made
