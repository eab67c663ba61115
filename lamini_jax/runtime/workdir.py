"""Work directories: each belongs to one run, and no file that is written here is ever seen half-written."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from lamini_jax.errors import OTHER_RUN, Busy, UserError
from lamini_jax.runtime import cli, paths, processes

_NAMED, _SHOWN = 8, 40  # a message names so many differences, with so many characters of each value


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` to a file that is never seen half-written. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file, once for all processes, that is never seen half-written. Raises UserError if it cannot be."""
    if not processes.is_primary():
        return
    try:
        paths.write(paths.as_path(path), text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def write_json_lines(path: str | os.PathLike, values: Iterable[Any]) -> None:
    """Writes values one per line, into a file that is never seen half-written."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def check_output(flag: str, path: str) -> None:
    """Raises UserError if the file that a command will write at its end cannot be written."""
    remote = paths.is_remote(path)
    target = paths.as_path(path) if remote else Path(os.path.realpath(path))
    if target.is_dir():
        raise UserError(f"--{flag}={path}: is a directory; name a file")
    if not remote and not target.parent.is_dir():
        raise UserError(f"--{flag}={path}: its directory does not exist")
    replaced = target.parent if target.is_file() or not target.exists() else target
    if not paths.is_writable(replaced):
        raise UserError(f"--{flag}={path}: cannot be written (no permission)")
    if remote:
        return
    try:
        with tempfile.TemporaryFile(dir=target.parent) as probe:
            probe.write(b"0" * 4096)
    except OSError as error:
        if target.is_file() or not target.exists():
            raise UserError(f"--{flag}={path}: cannot be written ({error.strerror})") from None


def environment() -> dict[str, str]:
    """What measurements depend on apart from the code: machine, devices and versions."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "devices": devices, **versions}


def open_workdir(workdir: str, identity: Mapping[str, Any], where: Mapping[str, str] | None = None) -> Path:
    """Returns the directory of a run, which is created if it does not exist and then belongs to this run.

    Its `config.json` keeps `identity`, all that the run's results depend on (the config as a dict, fingerprints of the
    data), and under "where" the paths of what may move, such as the backbone. Raises UserError if the directory cannot
    be used or belongs to a run with another identity.
    """
    if not workdir:
        raise UserError("--workdir is empty: name a directory")
    directory = paths.as_path(workdir)
    saved_path = directory / "config.json"
    identity, where = json.loads(json.dumps(identity)), dict(where or {})
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not paths.is_writable(directory):
            raise UserError(f"--workdir={workdir}: not writable")
        if not saved_path.exists():
            write_json(saved_path, {**identity, "where": where})
        processes.barrier("workdir")
        saved = json.loads(saved_path.read_text())
        if not isinstance(saved, dict):
            raise ValueError("not an object")
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--workdir={workdir}: is a file, or below one, and not a directory") from None
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        what = f"is no config of a run ({error})"
        raise UserError(f"{saved_path}: {what}; remove {workdir} or use another --workdir") from None
    found = saved.pop("where", None)
    if saved != identity:
        raise UserError(
            f"--workdir={workdir} holds a run that differs in {_differences(saved, identity)}; "
            "use another --workdir, or remove this one",
            OTHER_RUN,
        )
    if found != where:
        write_json(saved_path, {**identity, "where": where})
    return directory


@contextlib.contextmanager
def alone(directory: Path):
    """Inside this context no other run is at work in a directory. Raises Busy if one is there already.

    The lock ends with the process, however that ends, and leaves no file. Storage that has no locks is not guarded.
    """
    handle, taken = None, False
    try:
        if processes.is_primary():
            try:
                handle = os.open(directory, os.O_RDONLY)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                taken = isinstance(error, BlockingIOError)
        if processes.broadcast(taken):
            raise Busy(f"--workdir={directory}: another run is at work in it; wait, or use another --workdir")
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _differences(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    old, new = dict(cli.flatten(saved)), dict(cli.flatten(asked))
    changes = []
    for key in dict.fromkeys([*old, *new]):
        before, after = (json.dumps(values[key])[:_SHOWN] if key in values else "(absent)" for values in (old, new))
        if old.get(key, ...) != new.get(key, ...):
            changes.append(f"{key}: {before} -> {after}")
    more = f" and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
    return ", ".join(changes[:_NAMED]) + more
