"""Saving and restoring a run: the only file that knows Orbax.

A checkpoint holds what a run changed and what it cannot derive again: `tables`, which lie on the devices, `arrays`,
which every host has, and a `record`, which JSON holds.
"""

import contextlib
import errno
import functools
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from lamini_jax.errors import OTHER_RUN, UserError
from lamini_jax.runtime import processes, sharding

# Saving may take this share of the time of a run; a run so short that it would take more saves less often.
_SHARE = 0.1
_SECONDS = 15.0


class Saved(NamedTuple):
    """A checkpoint. Tables are flat lists of leaves, spread over the devices of today's mesh."""

    tables: dict[str, list[jax.Array]]
    arrays: dict[str, Any]
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: two are kept, and a half-written one is never taken for a whole one."""

    def __init__(self, directory: Path):
        _quieten_storage()
        self._directory = directory
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        self._saved_at, self._cost = -math.inf, 0.0  # the first epoch is saved at once

    def save(self, step: int, tables: dict[str, Any], arrays: dict[str, Any], record: dict[str, Any]) -> None:
        """Saves in the background, once per step. Raises UserError if a save failed (a full disk)."""
        if step in self._manager.all_steps():
            return
        started = time.monotonic()
        tree = {"tables": {name: jax.tree.leaves(table) for name, table in tables.items()}, "arrays": arrays}
        arguments = ocp.args.Composite(tree=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record))
        with self._saving():
            self._manager.save(step, args=arguments)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started

    def due(self) -> bool:
        """Whether enough time has passed since the last save: the same on every host."""
        return processes.broadcast(time.monotonic() - self._saved_at > max(_SECONDS, self._cost / _SHARE))

    def latest(self) -> Saved | None:
        """The newest whole checkpoint, or None. Raises UserError if it cannot be read."""
        step = self._manager.latest_step()
        if step is None:
            return None

        def described(leaf):
            names = ("experts", *(None,) * (len(leaf.shape) - 2), "columns")[: len(leaf.shape)]
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.sharding_of(names, leaf.shape))

        try:
            tree = ocp.StandardCheckpointer().metadata(self._directory.absolute() / str(step) / "tree").item_metadata
            if tree is None:
                raise ValueError("the list of its arrays is damaged")
            target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
            target = {**target, "tables": jax.tree.map(described, tree["tables"])}
            arguments = ocp.args.Composite(tree=ocp.args.StandardRestore(target), record=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=arguments)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self._directory / str(step)}: cannot be read ({reason}); remove it") from error
        return Saved(restored["tree"]["tables"], restored["tree"]["arrays"], dict(restored["record"]))

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


@functools.cache
def _quieten_storage() -> None:
    """What Orbax logs it also raises, and that becomes one line: no tracebacks of its threads beside it."""
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    report = sys.unraisablehook

    def report_unless_late(unraisable):
        # The storage below Orbax reports to an event loop that a failed save has closed; the save said what failed.
        if "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    sys.unraisablehook = report_unless_late


def restore_like(tree: Any, saved: list[Any]) -> Any:
    """The saved leaves as a tree. Raises UserError if there are others, or of other shapes."""
    expected, structure = jax.tree.flatten(tree)
    shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in (expected, saved)]
    if shapes[0] != shapes[1]:
        message = f"the checkpoint has arrays of shapes {shapes[1]} and this run needs {shapes[0]}"
        raise UserError(message, status=OTHER_RUN)
    return jax.tree.unflatten(structure, saved)
