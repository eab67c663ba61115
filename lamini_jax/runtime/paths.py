"""Where runs read and write: files of this machine, or objects in a bucket, gs://BUCKET/NAME.

`as_path` gives pathlib's path or, for a bucket, that of etils' epath, which has the same methods; what differs beyond
these is in this file only. A bucket has no directories to make or to rename, and an object is replaced whole or not at
all. pathlib stays for files, because epath's paths need a user name for the owner of a file and hide names with a `~`.
"""

import base64
import contextlib
import functools
import logging
import os
import re
import secrets
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lamini_jax.errors import UserError

_PATIENCE = 10  # seconds in which a bucket has to answer at the start
# Orbax takes some of these for a pattern of names and others for the end of a path; no object's name has line breaks.
_UNFIT = re.compile(r"[\x00-\x1f\x7f*?#\[\]\\]")
_LIBRARIES = frozenset(("gcsfs", "fsspec", "aiohttp", "google", "requests"))  # through which a bucket is reached


class File(NamedTuple):
    """A file or an object with its size, and the hash of its content where a bucket knows it."""

    path: Path
    size: int
    md5: str = ""  # in hexadecimal


def as_path(path: str | os.PathLike) -> Path:
    """A path of this machine or of a bucket. Raises UserError if the bucket cannot be used, and for other schemes."""
    text = os.fspath(path)
    if not text:
        raise UserError("an empty path: no such file")
    scheme, separator, name = text.partition("://")
    if re.match("gs:/[^/]", text):
        raise UserError(f"{text}: pathlib has dropped a slash of gs://; give it as a str")
    if not separator or not scheme.isalnum():
        return Path(text)
    if scheme != "gs" or not name.strip("/"):
        raise UserError(f"{text}: must be a path of this machine or gs://BUCKET/NAME")
    if unfit := _UNFIT.search(name):
        raise UserError(f"{text}: {unfit[0]!r} cannot be in a name in a bucket; name it otherwise")
    if fault := _fault_of(name.partition("/")[0]):
        raise UserError(f"{text}: {fault}")
    from etils import epath

    return epath.Path(text)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is one of a bucket."""
    return os.fspath(path).startswith("gs://")


def write(path: Path, text: str | bytes) -> None:
    """Writes a file that is never seen half-written. Raises OSError if it cannot be."""
    content = text.encode() if isinstance(text, str) else text
    if is_remote(path):
        path.write_bytes(content)
        return
    path = Path(os.path.realpath(path))  # a link stays, and the file that it points to is replaced
    if path.exists() and not path.is_file():  # a device or a pipe is written to
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_writable(directory: Path) -> bool:
    """Whether files can be made in a directory; in a bucket, by making one and removing it."""
    if not is_remote(directory):
        return os.access(directory, os.W_OK)
    probe = directory / f".{secrets.token_hex(4)}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError:
        return False
    return True


def files_below(directory: Path) -> dict[str, File]:
    """The files in a directory and below it, by their names relative to it, sorted."""
    if is_remote(directory):
        root = f"{os.fspath(directory)}/"
        found = ((f"gs://{name}", info) for name, info in _storage().find(root, detail=True).items())
        files = {
            path.removeprefix(root): File(as_path(path), info["size"], base64.b64decode(info.get("md5Hash", "")).hex())
            for path, info in found
        }
    else:
        paths = (path for path in directory.rglob("*") if path.is_file())
        files = {path.relative_to(directory).as_posix(): File(path, path.stat().st_size) for path in paths}
    return dict(sorted(files.items()))


@contextlib.contextmanager
def local_file(path: Path) -> Iterator[Path]:
    """A file of this machine with the content of a file: itself, or a copy for as long as this context lasts."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / path.name
        _storage().get_file(os.fspath(path), os.fspath(copy))
        yield copy


def upload(directory: Path, destination: Path) -> None:
    """Copies a directory into a bucket: its descriptions (JSON) last, so that what is incomplete has none."""
    files = files_below(directory).items()
    for name, file in sorted(files, key=lambda item: item[0].endswith(".json")):
        _storage().put_file(os.fspath(file.path), os.fspath(destination / name))


def remove(directory: Path) -> None:
    """Removes a directory with everything in it."""
    if is_remote(directory):
        directory.rmtree()
    else:
        shutil.rmtree(directory, ignore_errors=True)


def failure(error: BaseException) -> str | None:
    """What the storage of a bucket said, in one line; None for an error that does not come from there."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    if "gs://" in str(error) or any(name.partition(".")[0] in _LIBRARIES for name in frames):
        return _one_line(error)
    return None


@functools.cache
def _fault_of(bucket: str) -> str:
    """Why a bucket cannot be used, found by asking for what Orbax will ask for; empty if it can be."""
    os.environ.setdefault("EPATH_USE_TF", "false")  # epath would use TensorFlow wherever that is installed
    # gcsfs would ask of what kind the bucket is before everything it does, and warn where it may not know.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec.config
        import gcsfs  # noqa: F401 (fsspec loads it)
        from google.cloud import storage
    except ImportError as error:
        return f"{error.name} is not installed: pip install -e .[gcs]"
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs the traceback of what it raises too
    # Otherwise a process would never see what others write into a directory that it has listed before.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    try:
        storage.Client().get_bucket(bucket, timeout=_PATIENCE, retry=None)
    except Exception as error:  # of many libraries: no credentials, no permission, no network, no such bucket
        return f"the bucket cannot be used ({_one_line(error)})"
    return ""


def _storage():
    """The file system of gcsfs: the one that epath uses."""
    from etils.epath import backend

    return backend.fsspec_backend.fs("gs://")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
