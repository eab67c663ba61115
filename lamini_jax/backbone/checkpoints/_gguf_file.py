"""One file in GGUF, llama.cpp's format: metadata by key, then tensors, which are read in parts and as numbers.

The header is read here, because its counts and lengths are untrusted: the gguf library, which this module uses to
turn blocks of quantized numbers into numbers, believes them.
"""

import dataclasses
import functools
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lamini_jax.backbone.checkpoints import _safetensors
from lamini_jax.backbone.json_file import one_line, shown
from lamini_jax.errors import UserError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of the tensors in the file, unless its metadata says otherwise
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
# Types of metadata that have a fixed size -> how `struct` reads one.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_NUMBERS_AT_ONCE = 2**20  # that are dequantized at once, so that what is computed on the way stays in the CPU's cache


class Storage(NamedTuple):
    """How a tensor's numbers are stored: blocks of so many numbers and bytes; `plain` if each is a number of numpy."""

    name: str
    numbers: int
    bytes: int
    plain: Any = None


STORAGES = {
    0: Storage("F32", 1, 4, np.dtype("<f4")),
    1: Storage("F16", 1, 2, np.dtype("<f2")),
    30: Storage("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
    2: Storage("Q4_0", 32, 18),
    3: Storage("Q4_1", 32, 20),
    6: Storage("Q5_0", 32, 22),
    7: Storage("Q5_1", 32, 24),
    8: Storage("Q8_0", 32, 34),
    10: Storage("Q2_K", 256, 84),
    11: Storage("Q3_K", 256, 110),
    12: Storage("Q4_K", 256, 144),
    13: Storage("Q5_K", 256, 176),
    14: Storage("Q6_K", 256, 210),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, read in parts. UserError if the file cannot be read, or a part holds NaN or infinity.

    `order` says which stored row is which of the tensor's rows; None: they are stored as they are.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int  # in bytes, from the beginning of the file
    order: np.ndarray | None = None

    @property
    def dtype(self) -> str:
        """The name of its storage, also of one that cannot be read."""
        return STORAGES[self.type].name if self.type in STORAGES else _name_of(self.type)

    def __getitem__(self, index) -> np.ndarray:
        rows, *columns = index if isinstance(index, tuple) else (index,)
        if len(self.shape) == 1:
            return self._stored_rows(0, 1)[0][rows]
        count = self.shape[0]
        if self.order is None:
            start, stop, _ = rows.indices(count)
            part = self._stored_rows(start, stop)
        else:
            wanted = self.order[rows]
            part = self._stored_rows(wanted.min(), wanted.max() + 1)[wanted - wanted.min()]
        return part[:, columns[0]] if columns else part

    def _stored_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of numbers; a tensor with one axis is one row."""
        storage, width = STORAGES[self.type], self.shape[-1]
        row_bytes = width // storage.numbers * storage.bytes
        count, offset = int(stop - start) * row_bytes, self.offset + int(start) * row_bytes
        try:
            content = np.fromfile(self.file, np.uint8, count, offset=offset)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read ({one_line(error)})") from None
        if content.size < count:
            raise UserError(f"{self.file}: has become shorter while it was read")
        numbers = _numbers(content, storage, self.file)
        if not _safetensors.is_finite(numbers, storage.name if storage.plain else "F32"):
            raise UserError(f"{self.file}: tensor {shown(self.name)} holds NaN or infinity; download it again")
        return numbers.reshape(-1, width)


class File(NamedTuple):
    """The contents of a file, without its tensors' numbers."""

    path: Path
    metadata: dict[str, Any]  # texts, numbers, and lists of them
    tensors: dict[str, Tensor]


def read(path: Path) -> File:
    """The metadata and the tensors of a file. Raises UserError if it is missing, damaged, truncated or split."""
    try:
        about = path.stat()
        if not path.is_file():
            raise UserError(f"{path}: is not a file")
        return _read(path, about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from None


def _library(path: Path):
    """The gguf library. Raises UserError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path}: its weights are quantized; pip install gguf to read them") from None
    return gguf


@functools.lru_cache(maxsize=4)
def _read(path: Path, size: int, changed: int) -> File:
    """A file of this size, last changed then: loading asks several times for what takes a moment to read."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{path}: is not a GGUF file; download it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(path, content).file()


class _Reader:
    """Reads the header from its beginning; every length is compared with what is left of the file before it is used."""

    def __init__(self, path: Path, content: mmap.mmap):
        self._path, self._content, self._position = path, content, len(MAGIC)

    def file(self) -> File:
        """The whole header. Raises UserError for what it cannot be."""
        (version,) = self._numbers("I")
        if version not in _VERSIONS:
            swapped = " of big-endian numbers" if version & 0xFFFF == 0 else ""
            raise UserError(f"{self._path}: is GGUF version {version}{swapped}; versions 2 and 3 can be read")
        tensors, values = self._numbers("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self._text()
            if key in metadata:
                raise self._damage(f"has {shown(key)} twice")
            (kind,) = self._numbers("I")
            metadata[key] = self._value(kind, key)
        self._refuse_parts(metadata)
        infos = [self._tensor_info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._damage(f"general.alignment {shown(alignment)} is not a power of two")
        start = -(-self._position // alignment) * alignment
        found = {}
        for name, shape, kind, offset in infos:
            if name in found:
                raise self._damage(f"has tensor {shown(name)} twice")
            found[name] = Tensor(self._path, name, shape, kind, start + offset)
            self._check_extent(found[name])
        return File(self._path, metadata, found)

    def _refuse_parts(self, metadata: dict[str, Any]) -> None:
        count = metadata.get("split.count", 0)
        if type(count) is int and count > 1:
            join = "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
            raise UserError(f"{self._path}: is one of {count} parts of a model; join them with llama.cpp's {join}")

    def _check_extent(self, tensor: Tensor) -> None:
        if tensor.type not in STORAGES:
            return  # refused where it is needed, by its name
        storage, numbers = STORAGES[tensor.type], math.prod(tensor.shape)
        if not tensor.shape or not numbers or tensor.shape[-1] % storage.numbers:
            raise self._damage(f"tensor {shown(tensor.name)} is {storage.name} of shape {shown(list(tensor.shape))}")
        if tensor.offset + numbers // storage.numbers * storage.bytes > len(self._content):
            raise self._truncated()

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        (axes,) = self._numbers("I")
        if axes > 4:
            raise self._damage(f"tensor {shown(name)} has {axes} axes")
        sizes = self._numbers("Q" * axes)
        return name, sizes[::-1], *self._numbers("IQ")

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _SCALARS:
            return _as_written(kind, self._numbers(_SCALARS[kind]))[0]
        if kind != _ARRAY:
            raise self._damage(f"{shown(key)} is of type {kind}, which GGUF does not have")
        kind, count = self._numbers("IQ")
        if kind == _STRING:
            self._check_room(8 * count)  # at least the length of each
            return [self._text() for _ in range(count)]
        if kind not in _SCALARS:
            raise self._damage(f"{shown(key)} is a list of type {kind}, which cannot be read")
        self._check_room(count * struct.calcsize(_SCALARS[kind]))
        return _as_written(kind, self._numbers(f"{count}{_SCALARS[kind]}"))

    def _text(self) -> str:
        (length,) = self._numbers("Q")
        self._check_room(length)
        start, self._position = self._position, self._position + length
        try:
            return self._content[start : self._position].decode()
        except UnicodeDecodeError:
            raise self._damage(f"has text at byte {start} that is not UTF-8") from None

    def _numbers(self, form: str) -> tuple:
        form = f"<{form}"
        size = struct.calcsize(form)
        self._check_room(size)
        self._position += size
        return struct.unpack_from(form, self._content, self._position - size)

    def _check_room(self, size: int) -> None:
        if size > len(self._content) - self._position:
            raise self._truncated()

    def _truncated(self) -> UserError:
        return self._damage(f"is truncated: it has {len(self._content):,} bytes, and its header speaks of more")

    def _damage(self, what: str) -> UserError:
        return UserError(f"{self._path}: {what}; download it again")


def _as_written(kind: int, values: tuple) -> list:
    """Numbers of the metadata; of float32 the shortest decimal that rounds to it, as people wrote it: 1e-05."""
    return [float(str(np.float32(value))) for value in values] if kind == _FLOAT32 else list(values)


def _numbers(content: np.ndarray, storage: Storage, file: Path) -> np.ndarray:
    """The numbers in some bytes: in the storage's own format if numpy has it, otherwise in float32."""
    if storage.plain is not None:
        return content.view(storage.plain)
    gguf = _library(file)
    kind = gguf.GGMLQuantizationType[storage.name]
    blocks = content.reshape(-1, storage.bytes)
    numbers = np.empty((len(blocks), storage.numbers), np.float32)
    step = _NUMBERS_AT_ONCE // storage.numbers
    # Damaged scales are NaN or infinite: `Tensor` reports them, numpy need not.
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            row = blocks[start : start + step].reshape(1, -1)  # one row: the library takes 16 of them at a time
            numbers[start : start + step] = gguf.dequantize(row, kind).reshape(-1, storage.numbers)
    return numbers


def _name_of(kind: int) -> str:
    """The name of a storage that cannot be read, from the gguf library if that is there."""
    try:
        import gguf

        return gguf.GGMLQuantizationType(kind).name
    except (ImportError, ValueError):
        return f"type {kind}"
