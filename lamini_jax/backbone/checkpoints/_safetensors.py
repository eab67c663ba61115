"""Files in the format of the safetensors library: which files of a directory hold its weights, and how to read them."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lamini_jax.backbone import json_file
from lamini_jax.backbone.json_file import one_line, shown
from lamini_jax.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Formats of numbers in a file -> the type that reads their bits, and the bits that only infinity and NaN have all set.
_EXPONENTS = {
    "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
DTYPES = tuple(_NUMPY)
_CHECKED_AT_ONCE = 2**20  # numbers that are checked at once, so that it takes little memory


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, read in parts. UserError if a part holds NaN or infinity, or its format is not known."""

    file: Path
    name: str
    _slice: Any  # the library's object that reads parts of it

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._slice.get_shape())

    @property
    def dtype(self) -> str:
        return self._slice.get_dtype()

    def __getitem__(self, index) -> np.ndarray:
        if self.dtype not in DTYPES:
            raise UserError(f"{self.file}: tensor {shown(self.name)} is {self.dtype}; expected {', '.join(DTYPES)}")
        part = self._slice[index]
        if not is_finite(part, self.dtype):
            why = "as float32; these weights are damaged, or overflowed in training"
            raise UserError(f"{self.file}: tensor {shown(self.name)} holds NaN or infinity {why}")
        return part


def open_file(path: Path):
    """A file whose tensors can be read one by one and in parts. Raises UserError if it is damaged."""
    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({one_line(error)}); download it again") from None


def open_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors in some files by their names, without the buffers that old checkpoints carry."""
    tensors = {}
    for path in files:
        file = open_file(path)
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if not name.endswith("rotary_emb.inv_freq"):
                tensors[name] = Tensor(path, name, file.get_slice(name))
    return tensors


def find(directory: Path) -> list[Path]:
    """The files with the weights of a checkpoint: the whole file, the shards of an index, or shards that are all there.

    They are tried in this order, as in the transformers library, which lacks the last: an index left over next to a
    whole file does no harm. Raises UserError if a file is missing, or if there are only pickles.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.exists():
        return [single]
    sets = _sets_of_shards(directory)
    if index.exists():
        files = [directory / name for name in sorted(set(_weight_map(index).values()))]
        missing = [path for path in files if not path.exists()]
        if not missing:
            return files
        if not any(map(_is_complete, sets)):
            raise UserError(f"{missing[0]}: no such file, but {index.name} names it; download it again")
    complete = [shards for shards in sets if _is_complete(shards)]
    if len(complete) > 1:
        first, second, *_ = (sorted(shards.values())[0].name for shards in complete)
        raise UserError(f"{directory}: has two checkpoints, from {first} and from {second}; keep one of them")
    if complete:
        return [path for _, path in sorted(complete[0].items())]
    if sets:
        raise UserError(
            f"{_first_missing(max(sets, key=len))}: no such file, but other shards are there; download it again"
        )
    raise UserError(_why_none(directory))


def index_of(files: Iterable[Path]) -> dict[str, Any]:
    """The contents of the index of some shards."""
    tensors = open_tensors(files)
    sizes = [int(np.prod(tensor.shape)) * np.dtype(_NUMPY[tensor.dtype]).itemsize for tensor in tensors.values()]
    names = {name: tensor.file.name for name, tensor in sorted(tensors.items())}
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": names}


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map = json_file.read(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise UserError(f"{index}: weight_map has {shown(name)}, which is not a safetensors file next to it")
    return weight_map


def _sets_of_shards(directory: Path) -> list[dict[int, Path]]:
    """Files named as shards, by their numbers: one set for each total number of shards that names mention."""
    sets: dict[int, dict[int, Path]] = {}
    for path in sorted(directory.glob("model-*-of-*.safetensors")):
        if match := re.fullmatch(r"model-(\d{5})-of-(\d{5})\.safetensors", path.name):
            sets.setdefault(int(match[2]), {})[int(match[1])] = path
    return list(sets.values())


def _is_complete(shards: Mapping[int, Path]) -> bool:
    return shards.keys() == set(range(1, _count(shards) + 1))


def _count(shards: Mapping[int, Path]) -> int:
    return int(next(iter(shards.values())).stem[-5:])


def _first_missing(shards: Mapping[int, Path]) -> Path:
    number = next(number for number in range(1, _count(shards) + 2) if number not in shards)
    path = next(iter(shards.values()))
    return path.with_name(f"model-{number:05d}-{path.name[12:]}")


def _why_none(directory: Path) -> str:
    """The message for a directory without weights: what it has instead."""
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        return (
            f"{directory / pickles[0]}: is a pickle, which can run code when it is read; "
            "convert it to safetensors where you trust it"
        )
    if (directory / "adapter_model.safetensors").exists():
        return f"{directory}: is an adapter without its model; merge the two, and name the directory of the result"
    others = sorted(path.name for pattern in ("*.safetensors", "*.gguf") for path in directory.glob(pattern))
    found = f"; {others[0]} holds weights under other names, or a part of them" if others else ""
    return f"{directory / SINGLE}: no such file, and no shards of it{found}"


def is_finite(part: np.ndarray, dtype: str) -> bool:
    """Whether all numbers are finite, in float32 too, which sums are computed in."""
    if dtype == "F64":
        with np.errstate(over="ignore"):
            part, dtype = part.astype(np.float32), "F32"
    unsigned, exponent = _EXPONENTS[dtype]
    bits = np.ascontiguousarray(part).reshape(-1).view(unsigned)
    pieces = (bits[start : start + _CHECKED_AT_ONCE] for start in range(0, bits.size, _CHECKED_AT_ONCE))
    return not any(((piece & exponent) == exponent).any() for piece in pieces)
