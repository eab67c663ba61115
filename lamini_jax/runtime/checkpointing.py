"""Saving and restoring a run: the only file that knows Orbax.

A checkpoint holds what a run changed and what it cannot derive again: `tables`, which lie on the devices, `arrays`,
which every host has, and a `record`, which JSON holds. It counts from the moment on that a manifest with the sizes and
hashes of its files stands beside it; they are compared before anything is read.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import sys
import tempfile
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
# Orbax takes a path with one of these for a pattern: it writes nothing readable there, and only logs that.
_PATTERN = frozenset("*?[]\\")


class Saved(NamedTuple):
    """A checkpoint. Tables are flat lists of leaves, spread over the devices of today's mesh."""

    step: int
    tables: dict[str, list[jax.Array]]
    arrays: dict[str, Any]
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: two are kept, and a half-written one is never taken for a whole one."""

    def __init__(self, directory: Path):
        _quieten_storage()
        self._directory, self._path = directory, _without_pattern(directory.absolute())
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(self._path, options=options)
        self._saved_at, self._cost = -math.inf, 0.0  # the first epoch is saved at once

    def save(self, step: int, tables: dict[str, Any], arrays: dict[str, Any], record: dict[str, Any]) -> None:
        """Saves, once per step; it counts when this returns. Raises UserError if that failed (a full disk)."""
        if step == self.latest_step():
            return
        for unfinished in set(self._manager.all_steps()) - set(self._whole_steps()):
            self._manager.delete(unfinished)
        started = time.monotonic()
        tree = {"tables": {name: jax.tree.leaves(table) for name, table in tables.items()}, "arrays": arrays}
        arguments = ocp.args.Composite(tree=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record))
        with self._saving():
            self._manager.save(step, args=arguments)
            self._manager.wait_until_finished()
            if processes.is_primary():
                self._write_manifest(step)
        processes.barrier(f"saved {step}")
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started

    def due(self) -> bool:
        """Whether enough time has passed since the last save: the same on every host."""
        return processes.broadcast(time.monotonic() - self._saved_at > max(_SECONDS, self._cost / _SHARE))

    def latest(self) -> Saved | None:
        """The newest whole checkpoint, or None. Raises UserError if it is damaged or cannot be read."""
        step = self.latest_step()
        if step is None:
            return None
        if damage := self._find_damage(step):
            raise UserError(f"{self._directory / str(step)}: {damage}; remove it to continue from the one before")

        def described(leaf):
            names = ("experts", *(None,) * (len(leaf.shape) - 2), "columns")[: len(leaf.shape)]
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.sharding_of(names, leaf.shape))

        try:
            tree = ocp.StandardCheckpointer().metadata(self._path / str(step) / "tree").item_metadata
            if tree is None:
                raise ValueError("the list of its arrays is damaged")
            target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
            target = {**target, "tables": jax.tree.map(described, tree["tables"])}
            arguments = ocp.args.Composite(tree=ocp.args.StandardRestore(target), record=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=arguments)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self._directory / str(step)}: cannot be read ({reason}); remove it") from error
        return Saved(step, restored["tree"]["tables"], restored["tree"]["arrays"], dict(restored["record"]))

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint that counts."""
        return max(self._whole_steps(), default=None)

    def close(self) -> None:
        """Ends saving."""
        with self._saving():
            self._manager.close()

    def _whole_steps(self) -> list[int]:
        """Those with a manifest; another one was being written when a run ended."""
        return [step for step in self._manager.all_steps() if self._manifest(step).is_file()]

    def _manifest(self, step: int) -> Path:
        return self._path / f"manifest-{step}.json"

    def _write_manifest(self, step: int) -> None:
        for old in self._path.glob("manifest-*.json"):
            if not (self._path / old.stem.removeprefix("manifest-")).is_dir():
                old.unlink()
        unfinished = self._path / f"unfinished-{step}.json"
        with open(unfinished, "w") as file:
            json.dump(self._files(step), file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(self._manifest(step))

    def _files(self, step: int) -> dict[str, list]:
        """The size and the hash of every file of a checkpoint."""
        directory, files = self._path / str(step), {}
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(directory).as_posix()] = [path.stat().st_size, digest]
        return files

    def _find_damage(self, step: int) -> str:
        """What differs from the manifest; empty if nothing does."""
        try:
            expected, found = json.loads(self._manifest(step).read_text()), self._files(step)
        except (OSError, ValueError) as error:
            return f"its files cannot be checked ({error})"
        wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        return f"its file {min(wrong)} is missing or damaged" if wrong else ""

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


def _without_pattern(directory: Path) -> Path:
    """A path to the directory in which Orbax finds no pattern: itself, or a link with a name of its own."""
    if not _PATTERN & set(str(directory)):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    link = Path(tempfile.gettempdir()) / f"lamini_jax-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:32]}"
    with contextlib.suppress(FileExistsError):
        link.symlink_to(directory)
    if os.readlink(link) != str(directory):
        raise UserError(f"{link}: leads elsewhere than to {directory}; remove it")
    return link


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
