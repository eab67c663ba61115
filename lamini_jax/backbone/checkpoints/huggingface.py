"""Backbones in Hugging Face format: a directory, or a name on the Hub, with config.json and safetensors.

The modules of `families` are the models that are supported.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from absl import logging
from safetensors.numpy import save_file

from lamini_jax.backbone import tokenizer, transformer
from lamini_jax.backbone.checkpoints import _config_json, _fingerprint, _loading, _names, _safetensors
from lamini_jax.backbone.checkpoints._names import EMBEDDING, HEAD
from lamini_jax.backbone.json_file import one_line, shown
from lamini_jax.backbone.tokenizer import CheckpointTokenizer
from lamini_jax.backbone.transformer import Params
from lamini_jax.config import BackboneConfig
from lamini_jax.errors import UserError

# The files of a repository on the Hub that are needed: no pickled weights, and no copies of weights under other names.
_FILES = ("*.json", "*.jinja", "model*.safetensors")
# Files of a checkpoint other than its weights and its tokenizer, by the beginnings of their names.
_PAPERS = ("config.json", "LICENSE", "NOTICE", "USE_POLICY")


def recognizes(path: str) -> bool:
    """True: this format is tried last, and `locate` raises UserError for what is not a checkpoint."""
    return True


def resolve(asked: BackboneConfig) -> BackboneConfig:
    """The config with everything that the checkpoint at its path decides; a directory's path becomes absolute.

    Raises UserError for a checkpoint that is not understood, and for a field that was set to something else.
    """
    directory = locate(asked.path)
    path = directory / "config.json"
    others = sorted(directory.glob("*.gguf"))
    if others and not path.exists():
        raise UserError(f"{path}: no such file; to read {others[0].name}, give its own path: {others[0]}")
    fields, longest = _config_json.read(path)
    fields["tied_embeddings"] = _is_tied(directory, fields["tied_embeddings"])
    config = _config_json.fill_in(asked, path, fields, longest)
    local = _local(asked.path)
    return config if local is None else dataclasses.replace(config, path=str(local))


def load_split(decoder: transformer.Decoder) -> Params:
    """The parameters split as the decoder is, on the devices. Raises UserError if config.json contradicts it."""
    _check_unchanged(decoder.config)
    return _load(decoder.config, _loading.split_shapes(decoder))


def load_whole(path: str, dtype: str, max_seq_len: int) -> tuple[BackboneConfig, Params]:
    """The config and the whole parameters, on the devices. Raises UserError for what is missing or damaged."""
    config = resolve(BackboneConfig(path=path, dtype=dtype, max_seq_len=max_seq_len))
    return config, _load(config, _loading.whole_shapes(config))


def load_tokenizer(config: BackboneConfig) -> CheckpointTokenizer:
    """The checkpoint's tokenizer. Raises UserError if it is missing, damaged or larger than the vocabulary."""
    return tokenizer.load(locate(config.path), config.vocab_size, config.system)


def fingerprint(path: str) -> str:
    """A short name for the weights: the same however they are divided into files and whatever their number format."""
    return _fingerprint.fingerprint(_safetensors.open_tensors(_safetensors.find(locate(path))))


def export(config: BackboneConfig, directory: Path) -> None:
    """Copies the checkpoint: config, weights and tokenizer as they are, and the license.

    Raises UserError if config.json contradicts `config`.
    """
    _check_unchanged(config)
    source = locate(config.path)
    files = _safetensors.find(source)
    for path in [*files, *(path for path in source.iterdir() if path.name.startswith(_PAPERS))]:
        if path.is_file():
            shutil.copyfile(path, directory / path.name)
    if [path.name for path in files] != [_safetensors.SINGLE]:
        index = json.dumps(_safetensors.index_of(files), indent=1)
        (directory / _safetensors.INDEX).write_text(index + "\n")
    load_tokenizer(config).save(directory)


def locate(path: str) -> Path:
    """The directory of a checkpoint; a name on the Hub is downloaded. Raises UserError if there is none."""
    directory = _local(path)
    if directory is not None:
        return directory
    missing = f"--config.backbone.path={path if path.isprintable() else repr(path)}: no such directory"
    moved = "where the backbone of a memory has moved, give --backbone=DIR to ask and export"
    if os.path.exists(path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise UserError(f"{missing}; {moved}")
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise UserError(f"{missing}; pip install -e .[hf] to look for it on the Hub") from None
    try:
        return Path(snapshot_download(path, allow_patterns=list(_FILES)))
    except (OSError, ValueError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        reason = one_line(error)[:300]
        raise UserError(f"{missing}, nor on the Hub ({reason})") from None


def save_backbone(directory: Path, config: BackboneConfig, params: Params, **token_ids: int) -> None:
    """Writes whole parameters as a checkpoint that `load_whole` and other libraries read.

    `token_ids` are special tokens for its config.json: `eos_token_id=2`. Raises UserError for a config that no
    checkpoint of its family has.
    """
    tensors = dict(_names.to_files(params))
    directory.mkdir(parents=True, exist_ok=True)
    _config_json.write(directory / "config.json", config, **token_ids)
    save_file(tensors, directory / _safetensors.SINGLE, metadata={"format": "pt"})


def _local(path: str) -> Path | None:
    """The absolute path of a directory, with `~` expanded; None if there is no such directory."""
    path = os.path.expanduser(path)
    return Path(os.path.abspath(path)) if os.path.isdir(path) else None


def _check_unchanged(config: BackboneConfig) -> None:
    if dataclasses.replace(resolve(config), path=config.path) != config:
        raise UserError(f"--config.backbone.path={config.path}: its config.json has changed")


def _load(config: BackboneConfig, shapes: Any) -> Params:
    """Parameters of these shapes from the checkpoint at `config.path`; names and shapes are checked before reading."""
    directory = locate(config.path)
    tensors = _safetensors.open_tensors(_safetensors.find(directory))
    unread = set(tensors) - ({HEAD} if config.tied_embeddings else set())

    def open_tensor(key: str, layer: int | None, shape: tuple[int, ...]) -> _loading.ReadPart:
        name, transposed = _names.tensor_name(key, layer), _names.is_transposed(key)
        if config.tied_embeddings and name == EMBEDDING and name not in tensors:
            name = HEAD  # of two equal tensors, either may have been left out
        if name not in tensors:
            raise UserError(f"{directory}: has no tensor {name}")
        unread.discard(name)
        tensor, expected = tensors[name], shape[::-1] if transposed else shape
        if tensor.shape != expected or tensor.dtype not in _safetensors.DTYPES:
            wanted = f"expected shape {list(expected)}, in {', '.join(_safetensors.DTYPES)}"
            raise UserError(f"{tensor.file}: tensor {name} is {tensor.dtype} of shape {list(tensor.shape)}; {wanted}")
        return lambda index: tensor[index[::-1]].T if transposed else tensor[index]

    for part in _loading.parts(config, shapes):
        open_tensor(*part)
    if unread:
        name = min(unread)
        where = f"{tensors[name].file}: tensor {shown(name)}"
        raise UserError(f"{where} is not understood, and could change the result")
    return _loading.load(config, shapes, open_tensor)


def _is_tied(directory: Path, flag: bool) -> bool:
    """Whether the head is the embedding: the tensors decide if both are stored, otherwise config.json's flag.

    It is the same in transformers 5 (`PreTrainedModel.tie_weights`: "both are present in the checkpoints with different
    values, so we will NOT tie them"); up to version 4 the flag decided. A head that equals the embedding counts as the
    embedding, so that the model is the same however it was saved.
    """
    if not any(directory.glob("*.safetensors")):
        return flag  # `_load` reports it when weights are needed
    tensors = _safetensors.open_tensors(_safetensors.find(directory))
    if HEAD not in tensors or EMBEDDING not in tensors:
        return flag
    same = _loading.are_equal(tensors[HEAD], tensors[EMBEDDING])
    if flag and not same:
        _warn_of_own_head(directory)
    return same


@functools.cache
def _warn_of_own_head(directory: Path) -> None:
    message = "%s: tie_word_embeddings is true, but %s differs from %s; that head is used, as in transformers 5"
    logging.warning(message, directory / "config.json", HEAD, EMBEDDING)
