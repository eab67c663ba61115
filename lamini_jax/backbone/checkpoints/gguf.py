"""Backbones in one file in GGUF, llama.cpp's format: Llama and Mistral, Qwen 2 and Qwen 3, quantized or not.

Its metadata describes the model and the tokenizer. Quantized weights become numbers of `backbone.dtype` when they are
read.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lamini_jax.backbone import transformer
from lamini_jax.backbone.checkpoints import (
    _config_json,
    _fingerprint,
    _gguf_file,
    _gguf_metadata,
    _gguf_tensors,
    _gguf_tokenizer,
    _loading,
    _names,
    _safetensors,
)
from lamini_jax.backbone.checkpoints._gguf_file import File, Tensor
from lamini_jax.backbone.json_file import one_line
from lamini_jax.backbone.tokenizer import CheckpointTokenizer
from lamini_jax.backbone.transformer import Params
from lamini_jax.config import BackboneConfig
from lamini_jax.errors import UserError
from lamini_jax.runtime import user_cache

_SHARD_BYTES = 4 * 2**30  # of a file that `export` writes: the host holds one


def recognizes(path: str) -> bool:
    """Whether the path is that of a file that begins as GGUF does, or is named so."""
    path = os.path.expanduser(path)
    if path.lower().endswith(".gguf"):
        return not os.path.isdir(path)
    try:
        with open(path, "rb") as file:
            return file.read(len(_gguf_file.MAGIC)) == _gguf_file.MAGIC
    except (OSError, ValueError):
        return False


def resolve(asked: BackboneConfig) -> BackboneConfig:
    """The config with everything that the file decides; its path becomes absolute.

    Raises UserError for a file that is not understood, and for a field that was set to something else.
    """
    file = _open(asked.path)
    fields, longest = _gguf_metadata.fields(file)
    return dataclasses.replace(_config_json.fill_in(asked, file.path, fields, longest), path=str(file.path))


def load_split(decoder: transformer.Decoder) -> Params:
    """The parameters split as the decoder is, on the devices. Raises UserError if the file contradicts its config."""
    _check_unchanged(decoder.config)
    return _load(decoder.config, _loading.split_shapes(decoder))


def load_whole(path: str, dtype: str, max_seq_len: int) -> tuple[BackboneConfig, Params]:
    """The config and the whole parameters, on the devices. Raises UserError for what is missing or damaged."""
    config = resolve(BackboneConfig(path=path, dtype=dtype, max_seq_len=max_seq_len))
    return config, _load(config, _loading.whole_shapes(config))


def load_tokenizer(config: BackboneConfig) -> CheckpointTokenizer:
    """The tokenizer in the metadata. Raises UserError if there is none, or one that is not understood."""
    return _gguf_tokenizer.load(_open(config.path), config.vocab_size, config.system)


def fingerprint(path: str) -> str:
    """A short name for the weights as numbers: the same as that of the same numbers in Hugging Face format.

    It is kept for a file of this content, because making numbers of it takes seven times as long as reading it.
    """
    config = resolve(BackboneConfig(path=path, max_seq_len=1))

    def make() -> np.ndarray:
        return np.array(_fingerprint.fingerprint(_tensors(config)))

    return str(user_cache.array(f"fingerprints/{_digest(config.path)}", make))


def export(config: BackboneConfig, directory: Path) -> None:
    """Writes the numbers of the weights, and config and tokenizer from the metadata. UserError if it has changed."""
    _check_unchanged(config)
    _, longest = _gguf_metadata.fields(_open(config.path))
    whole = dataclasses.replace(config, max_seq_len=longest, dtype="float32")
    _config_json.write(directory / "config.json", whole)
    tensors = _tensors(config)
    shards = _shards(tensors)
    files = [directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [directory / _safetensors.SINGLE]
    for path, names in zip(files, shards, strict=True):
        save_file({name: np.ascontiguousarray(tensors[name][:]) for name in names}, path, metadata={"format": "pt"})
    if len(files) > 1:
        (directory / _safetensors.INDEX).write_text(json.dumps(_safetensors.index_of(files), indent=1) + "\n")
    load_tokenizer(config).save(directory)


def _shards(tensors: dict[str, Tensor]) -> list[list[str]]:
    """The names of tensors, divided into files of a size that the host can hold."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        numbers = 4 * int(np.prod(tensor.shape))
        if shards[-1] and size + numbers > _SHARD_BYTES:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += numbers
    return shards


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from None


def _open(path: str) -> File:
    return _gguf_file.read(Path(os.path.abspath(os.path.expanduser(path))))


def _tensors(config: BackboneConfig) -> dict[str, Tensor]:
    return _gguf_tensors.find(_open(config.path), config, _loading.whole_shapes(config))


def _check_unchanged(config: BackboneConfig) -> None:
    if dataclasses.replace(resolve(config), path=config.path) != config:
        raise UserError(f"--config.backbone.path={config.path}: its metadata has changed")


def _load(config: BackboneConfig, shapes: Any) -> Params:
    tensors = _gguf_tensors.find(_open(config.path), config, shapes)

    def open_tensor(key: str, layer: int | None, shape: tuple[int, ...]) -> _loading.ReadPart:
        tensor = tensors[_names.tensor_name(key, layer)]
        if not _names.is_transposed(key):
            return lambda index: tensor[index]
        return lambda index: tensor[index[::-1]].T

    return _loading.load(config, shapes, open_tensor)
