"""Saving and restoring a run: the only file that knows Orbax.

A checkpoint holds what a run has changed and what it cannot compute again: `tables`, which are on the devices,
`arrays`, which every host has, and a `record`, which is JSON. It counts only once `manifest-STEP.json`, which lists the
sizes and hashes of its files, is written next to it; the files are compared with that list before anything is read.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from lamini_jax.errors import OTHER_RUN, UserError
from lamini_jax.runtime import paths, processes, sharding

# Saving takes about this share of a run's time at most, and there are at least so many seconds between two saves.
_SHARE = 0.1
_SECONDS = 15.0
# Orbax treats a path with one of these as a pattern of names: it writes nothing readable there, and only logs that. A
# path that is not UTF-8 it cannot write at all.
_PATTERN = frozenset("*?[]\\")
_ALGORITHMS = {32: "md5", 64: "sha256"}  # of a manifest's hashes, by how many digits they have


class Saved(NamedTuple):
    """A checkpoint that was read. Tables are flat lists of leaves, sharded over the devices of the current mesh."""

    step: int
    tables: dict[str, list[jax.Array]]
    arrays: dict[str, Any]
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: two are kept, and a half-written one is never mistaken for a complete one."""

    def __init__(self, directory: Path, patient: bool = False):
        """The first save is due at once or, of a `patient` run, after as long as between two saves."""
        _quieten_storage()
        self._directory = directory
        self._path = directory if paths.is_remote(directory) else _without_pattern(directory.absolute())
        # Not compressed: trained floats hardly get smaller, and compressing takes most of a save's time and memory.
        handlers = {"tree": ocp.PyTreeCheckpointHandler(use_compression=False), "record": ocp.JsonCheckpointHandler()}
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(self._path, options=options, item_handlers=handlers)
        self._saved_at, self._cost = time.monotonic() if patient else -math.inf, 0.0

    def save(self, step: int, tables: dict[str, Any], arrays: dict[str, Any], record: dict[str, Any]) -> None:
        """Saves, once per step; the checkpoint counts when this returns. Raises UserError if it fails (a full disk)."""
        started = time.monotonic()
        tree = {"tables": {name: jax.tree.leaves(table) for name, table in tables.items()}, "arrays": arrays}
        arguments = ocp.args.Composite(tree=ocp.args.PyTreeSave(tree), record=ocp.args.JsonSave(record))
        with self._saving():
            if step == self.latest_step():
                return
            for unfinished in set(self._manager.all_steps()) - set(self._whole_steps()):
                self._manager.delete(unfinished)
            self._manager.save(step, args=arguments)
            self._manager.wait_until_finished()
            if processes.is_primary():
                self._write_manifest(step)
        processes.barrier(f"saved {step}")
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started

    def check_room(self, tables: dict[str, Any]) -> None:
        """Raises UserError if the disk has no room for such tables, two to keep while a third is written."""
        if paths.is_remote(self._path):
            return
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tables))
        needed = (3 - min(len(self._manager.all_steps()), 2)) * size
        free = shutil.disk_usage(self._path).free
        if free < needed:
            missing = f"{needed / 1e9:.2f} GB for checkpoints and {free / 1e9:.2f} GB are free"
            raise UserError(f"{self._directory}: the disk is too small: it takes {missing}")

    def due(self) -> bool:
        """Whether enough time has passed since the last save: the same on every host."""
        return processes.broadcast(time.monotonic() - self._saved_at > max(_SECONDS, self._cost / _SHARE))

    def latest(self) -> Saved | None:
        """The newest complete checkpoint, or None. Raises UserError if it is damaged or cannot be read."""
        step = self.latest_step()
        if step is None:
            return None
        if damage := self._find_damage(step):
            raise UserError(f"{self._directory / str(step)}: {damage}; remove it to continue from the one before")

        def described(leaf):
            names = ("experts", *(None,) * (len(leaf.shape) - 2), "columns")[: len(leaf.shape)]
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.sharding_of(names, leaf.shape))

        try:
            tree = ocp.PyTreeCheckpointer().metadata(self._path / str(step) / "tree").item_metadata
            if tree is None:
                raise ValueError("the list of its arrays is damaged")
            target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
            target = {**target, "tables": jax.tree.map(described, tree["tables"])}
            like = ocp.checkpoint_utils.construct_restore_args(target)
            wanted = {"tree": ocp.args.PyTreeRestore(target, restore_args=like), "record": ocp.args.JsonRestore()}
            restored = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        except (OSError, ValueError, KeyError) as error:
            reason = paths.failure(error)
            said = f"({reason})" if reason else f"({str(error).splitlines()[0]}); remove it"
            raise UserError(f"{self._directory / str(step)}: cannot be read {said}") from error
        return Saved(step, restored["tree"]["tables"], restored["tree"]["arrays"], dict(restored["record"]))

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return max(self._whole_steps(), default=None)

    def close(self) -> None:
        """Closes Orbax's manager, after which nothing can be saved."""
        with self._saving():
            self._manager.close()

    def _whole_steps(self) -> list[int]:
        """The steps that have a manifest; a run that ended while it saved leaves a checkpoint without one."""
        names = self._names()
        return [step for step in self._manager.all_steps() if self._manifest(step).name in names]

    def _names(self) -> set[str]:
        """The names in the directory of checkpoints. Listed, because `exists` may take a failure for an absence."""
        try:
            return {path.name for path in self._path.iterdir()}
        except FileNotFoundError:  # in a bucket a directory begins with its first object
            return set()

    def _manifest(self, step: int) -> Path:
        return self._path / f"manifest-{step}.json"

    def _write_manifest(self, step: int) -> None:
        names = self._names()
        for name in names:
            manifest = re.fullmatch(r"manifest-(\d+)\.json", name)
            if manifest and manifest[1] not in names:
                (self._path / name).unlink()
        files = paths.files_below(self._path / str(step)).items()
        # A bucket knows the MD5 of its objects; to compute another hash, all that was saved would have to come back.
        algorithm = "md5" if paths.is_remote(self._path) else "sha256"
        described = {name: [file.size, _digest(file, algorithm)] for name, file in files}
        paths.write(self._manifest(step), json.dumps(described))

    def _find_damage(self, step: int) -> str:
        """What differs from the manifest; empty if nothing does."""
        try:
            expected = json.loads(self._manifest(step).read_text())
            found = paths.files_below(self._path / str(step))
            wrong = expected.keys() ^ found.keys()
            for name in expected.keys() & found.keys():
                size, digest = expected[name]
                if found[name].size != size or _digest(found[name], _ALGORITHMS[len(digest)]) != digest:
                    wrong.add(name)
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            if paths.failure(error):
                raise
            return f"its files cannot be checked ({error})"
        return f"its file {min(wrong)} is missing or damaged" if wrong else ""

    @contextlib.contextmanager
    def _saving(self):
        try:
            yield
        except Exception as error:
            remote = paths.failure(error)
            # The storage below Orbax reports a full disk as a ValueError.
            if not remote and not isinstance(error, OSError) and "os_error_code" not in str(error):
                raise
            full = os.strerror(errno.ENOSPC) if "No space left" in str(error) else str(error).splitlines()[0]
            remedy = "run again" if remote else "make room and run again"
            whole = f"the checkpoint before this one is complete; {remedy} to continue from it"
            raise UserError(f"{self._directory}: cannot save ({remote or full}); {whole}") from error


def _digest(file: paths.File, algorithm: str) -> str:
    """The hash of a file, read only if its storage does not know it."""
    if algorithm == "md5" and file.md5:
        return file.md5
    with file.path.open("rb") as content:
        return hashlib.file_digest(content, algorithm).hexdigest()


def _without_pattern(directory: Path) -> Path:
    """A path to the directory that Orbax does not treat as a pattern: its own, or that of a temporary link to it."""
    as_utf8 = str(directory).encode("utf-8", "replace").decode()  # with question marks for what is not UTF-8
    if not _PATTERN & set(as_utf8):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    link = Path(tempfile.gettempdir()) / f"lamini_jax-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:32]}"
    with contextlib.suppress(FileExistsError):
        link.symlink_to(directory)
    if os.readlink(link) != str(directory):
        raise UserError(f"{link}: does not point to {directory}; remove it")
    return link


@functools.cache
def _quieten_storage() -> None:
    """Hides what Orbax logs, because it also raises it and that becomes one line, and tracebacks of its threads."""
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    report = sys.unraisablehook

    def report_unless_late(unraisable):
        # Orbax's storage may report to an event loop that a failed save has closed; the save has raised its own error.
        if "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    sys.unraisablehook = report_unless_late


def restore_like(tree: Any, saved: list[Any]) -> Any:
    """The saved leaves as a tree. Raises UserError if their number or their shapes are not those of the tree."""
    expected, structure = jax.tree.flatten(tree)
    shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in (expected, saved)]
    if shapes[0] != shapes[1]:
        message = f"the checkpoint has arrays of shapes {shapes[1]} and this run needs {shapes[0]}"
        raise UserError(message, status=OTHER_RUN)
    return jax.tree.unflatten(structure, saved)
