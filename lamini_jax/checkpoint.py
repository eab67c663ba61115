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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lamini_jax import tuning
from lamini_jax.errors import UserError

# What Orbax logs it also raises, and what it raises becomes one line below: no traceback of its threads beside it.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

_report = sys.excepthook


def _report_unless_late(kind, error, trace):
    """The storage below Orbax goes on reporting to a loop that a failed save has closed; the save said what failed."""
    if kind is not RuntimeError or "Event loop is closed" not in str(error):
        _report(kind, error, trace)


sys.excepthook = _report_unless_late

# Saving may take this share of the time of a run; a run so short that it would take more saves less often.
_SHARE = 0.1
_SECONDS = 15.0

# The fields of tuning.Log: arrays go to Orbax, the rest to JSON.
_LOSSES = ("total_F", "worst_F", "likeliest_F")
_HISTORY = ("loss", "certified", "seconds", "full_recall")


class Checkpoints:
    """The checkpoints of one run: two are kept, and a half-written one is never taken for a whole one."""

    def __init__(self, directory: Path):
        self._directory = directory
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        self._saved_at, self._cost = -math.inf, 0.0  # the first epoch is saved at once

    def save(self, tree: Any, log: tuning.Log, extra: dict[str, Any]) -> None:
        """Saves in the background, once per epoch; `extra` is JSON. Raises UserError if a save failed (a full disk)."""
        if log.epoch in self._manager.all_steps():
            return
        started = time.monotonic()
        history = {name: getattr(log, name) for name in _HISTORY} | extra
        tree = {"state": tree, "losses": {name: getattr(log, name) for name in _LOSSES}}
        arguments = ocp.args.Composite(tree=ocp.args.StandardSave(tree), history=ocp.args.JsonSave(history))
        with self._saving():
            self._manager.save(log.epoch, args=arguments)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started

    def due(self) -> bool:
        """Whether enough time has passed since the last save."""
        return time.monotonic() - self._saved_at > max(_SECONDS, self._cost / _SHARE)

    def latest(self) -> tuple[Any, tuning.Log, dict[str, Any]] | None:
        """The newest whole checkpoint, on the host, or None."""
        step = self._manager.latest_step()
        if step is None:
            return None
        arguments = ocp.args.Composite(tree=ocp.args.StandardRestore(), history=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=arguments)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self._directory / str(step)}: cannot be read ({reason}); remove it") from error
        tree, history = restored["tree"], dict(restored["history"])
        losses = {name: np.array(value) for name, value in tree["losses"].items()}
        log = tuning.Log(**losses, **{name: history.pop(name) for name in _HISTORY})
        return tree["state"], log, history

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


def checksum(array) -> int:
    """A number that changes with any bit of an array of floats."""
    bits = jax.lax.bitcast_convert_type(array, jnp.uint32).reshape(-1)
    places = jax.lax.iota(jnp.uint32, bits.size)
    return int(jnp.sum(bits * (2 * places + 1), dtype=jnp.uint32))


def verify(keys, expected: int) -> None:
    """Raises UserError if keys made from the seed are not those that a checkpoint was trained with."""
    if checksum(keys) != expected:
        raise UserError("this version of jax makes other random keys from the same seed; use the one that tuned")


def leaves(tree: Any) -> list[Any]:
    """A pytree as Orbax keeps it best: a flat list, in the order of the tree."""
    return jax.tree.leaves(tree)


def like(tree: Any, saved: list[Any]) -> Any:
    """The inverse of `leaves`. Raises UserError if shapes differ."""
    expected, structure = jax.tree.flatten(tree)
    shapes = [tuple(leaf.shape) for leaf in expected], [tuple(leaf.shape) for leaf in saved]
    if shapes[0] != shapes[1]:
        raise UserError(f"the checkpoint has arrays of shapes {shapes[1]} and this run needs {shapes[0]}")
    return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in saved])
