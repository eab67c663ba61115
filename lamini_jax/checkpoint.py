"""Saving and restoring a run: the only file that knows Orbax.

A checkpoint holds what tuning changed and what it cannot derive again: the selected experts' rows and optimizer state,
the router, the losses of each fact, the epoch (which is the data position) and the config. Rows that no fact selected
and the keys are functions of the seed; a checksum shows that they came out the same.
"""

import contextlib
import errno
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lamini_jax import processes, sharding, tuning
from lamini_jax.errors import OTHER_RUN, UserError

# What Orbax logs it also raises, and what it raises becomes one line below: no traceback of its threads beside it.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

_report = sys.unraisablehook


def _report_unless_late(unraisable):
    """The storage below Orbax goes on reporting to a loop that a failed save has closed; the save said what failed."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        _report(unraisable)


sys.unraisablehook = _report_unless_late

# Saving may take this share of the time of a run; a run so short that it would take more saves less often.
_SHARE = 0.1
_SECONDS = 15.0

# The fields of tuning.Log: arrays go to Orbax as such, the rest as JSON.
_PER_FACT = ("total_F", "worst_F", "likeliest_F", "active_F")
_HISTORY = ("loss", "certified", "seconds", "full_recall", "lost", "steps", "batches")


class Saved(NamedTuple):
    """A checkpoint: what lies on the devices, what every host has, where the run stood, and what else there was."""

    tables: dict[str, list[jax.Array]]
    arrays: dict[str, np.ndarray]
    log: tuning.Log
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: two are kept, and a half-written one is never taken for a whole one."""

    def __init__(self, directory: Path):
        self._directory = directory
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        self._saved_at, self._cost = -math.inf, 0.0  # the first epoch is saved at once

    def save(
        self, tables: dict[str, Any], arrays: dict[str, np.ndarray], log: tuning.Log, extra: dict[str, Any]
    ) -> None:
        """Saves in the background, once per step; `extra` is JSON. Raises UserError if a save failed (a full disk)."""
        if log.steps in self._manager.all_steps():
            return
        started = time.monotonic()
        history = {name: getattr(log, name) for name in _HISTORY} | extra
        per_fact = {name: getattr(log, name) for name in _PER_FACT}
        tables = {name: jax.tree.leaves(tree) for name, tree in tables.items()}
        tree = {"tables": tables, "arrays": arrays, "log": per_fact}
        arguments = ocp.args.Composite(tree=ocp.args.StandardSave(tree), history=ocp.args.JsonSave(history))
        with self._saving():
            self._manager.save(log.steps, args=arguments)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started

    def due(self) -> bool:
        """Whether enough time has passed since the last save: the same on every host."""
        return processes.agree(time.monotonic() - self._saved_at > max(_SECONDS, self._cost / _SHARE))

    def latest(self) -> Saved | None:
        """The newest whole checkpoint, or None. Tables are flat lists, spread over the devices of today's mesh."""
        step = self._manager.latest_step()
        if step is None:
            return None

        def spread(leaf):
            names = ("experts", *(None,) * (len(leaf.shape) - 2), "columns")[: len(leaf.shape)]
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.layout(names, leaf.shape))

        try:
            tree = ocp.StandardCheckpointer().metadata(self._directory.absolute() / str(step) / "tree").item_metadata
            if tree is None:
                raise ValueError("the list of its arrays is damaged")
            target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
            target = {**target, "tables": jax.tree.map(spread, tree["tables"])}
            arguments = ocp.args.Composite(tree=ocp.args.StandardRestore(target), history=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=arguments)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self._directory / str(step)}: cannot be read ({reason}); remove it") from error
        tree, history = restored["tree"], dict(restored["history"])
        log = tuning.Log(**tree["log"], **{name: history.pop(name) for name in _HISTORY if name in history})
        return Saved(tree["tables"], tree["arrays"], log, history)

    def close(self) -> None:
        """Waits for the last save. Raises UserError if it failed."""
        with self._saving():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _saving(self):
        try:
            yield
        except (OSError, ValueError) as error:  # the storage below Orbax reports a full disk as a ValueError
            if not isinstance(error, OSError) and "os_error_code" not in str(error):
                raise
            reason = os.strerror(errno.ENOSPC) if "No space left" in str(error) else str(error).splitlines()[0]
            whole = "the checkpoint before this one is whole; make room and run again to continue from it"
            raise UserError(f"{self._directory}: cannot save ({reason}); {whole}") from error


@jax.jit
def _checksum(array, rows):
    bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    places = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):  # of each element, counted row by row
        places = places * size + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    hashes = bits ^ (places * np.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # the finalizer of MurmurHash3
        hashes = (hashes ^ (hashes >> shift)) * np.uint32(factor)
    counted = jax.lax.broadcasted_iota(jnp.int32, array.shape, 0) < rows
    return jnp.sum(jnp.where(counted, hashes, 0), dtype=jnp.uint32)


def checksum(array, rows: int | None = None) -> int:
    """A number that changes with any bit of an array of floats, or of its first so many rows."""
    return int(_checksum(array, np.int32(array.shape[0] if rows is None else rows)))


def verify(found: int, expected: int) -> None:
    """Raises UserError if keys made from the seed are not those that a checkpoint was trained with."""
    if found != expected:
        raise UserError("this version of jax makes other random keys from the same seed; use the one that tuned")


def like(tree: Any, saved: list[Any]) -> Any:
    """The saved leaves as a tree. Raises UserError if there are others, or of other shapes (but for how many slots)."""
    expected, structure = jax.tree.flatten(tree)
    shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in (expected, saved)]
    if shapes[0] != shapes[1]:
        message = f"the checkpoint has arrays of shapes {shapes[1]} and this run needs {shapes[0]}"
        raise UserError(message, status=OTHER_RUN)
    return jax.tree.unflatten(structure, saved)
