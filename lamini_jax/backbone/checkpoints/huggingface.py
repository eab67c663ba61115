"""Backbones in Hugging Face format: a directory, or a name on the Hub, with config.json and safetensors.

Which models they may be, `families` says.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from lamini_jax.backbone import json_file, tokenizer, transformer
from lamini_jax.backbone.checkpoints import _config_json, _loading, _safetensors
from lamini_jax.backbone.tokenizer import CheckpointTokenizer
from lamini_jax.backbone.transformer import LINEAR_LAYERS, Params
from lamini_jax.config import BackboneConfig
from lamini_jax.errors import UserError

# Our names of parameters -> those of the files, for what is there once and for what each layer has.
_GLOBAL_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "unembedding/weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attention_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "q_norm/scale": "self_attn.q_norm.weight",
    "k_norm/scale": "self_attn.k_norm.weight",
    **{
        f"{name}/{part}": f"{layer.half}.{name}.{part}"
        for name, layer in LINEAR_LAYERS.items()
        for part in ("weight", "bias")
    },
}
# What of a repository on the Hub is needed; never weights that are pickles.
_FILES = ("*.json", "*.jinja", "*.safetensors")
_DTYPES = ("F32", "F16", "BF16", "F64")


def recognizes(path: str) -> bool:
    """Whatever no other format does: `locate` says what is wrong with it."""
    return True


def resolve(asked: BackboneConfig) -> BackboneConfig:
    """The config with everything that the checkpoint at its path decides.

    Raises UserError for a checkpoint that is not understood, and for a field that was set to something else.
    """
    path = locate(asked.path) / "config.json"
    fields, longest = _config_json.read(path)
    for field in dataclasses.fields(asked):
        wanted = getattr(asked, field.name)
        if field.name in fields and wanted not in (field.default, fields[field.name]):
            raise UserError(f"--config.backbone.{field.name}={wanted}: {path} says {fields[field.name]}")
    if longest is not None and asked.max_seq_len > longest:
        raise UserError(f"--config.backbone.max_seq_len={asked.max_seq_len}: {path} allows {longest}")
    return dataclasses.replace(asked, **fields)


def load_split(decoder: transformer.Decoder) -> Params:
    """The parameters split as the decoder is, on the devices. Raises UserError if config.json says something else."""
    if resolve(decoder.config) != decoder.config:
        raise UserError(f"--config.backbone.path={decoder.config.path}: its config.json is not what it was")
    return _load(decoder.config, _loading.split_shapes(decoder))


def load_whole(path: str, dtype: str, max_seq_len: int) -> tuple[BackboneConfig, Params]:
    """The config and the whole parameters, on the devices. Raises UserError for what is missing or damaged."""
    config = resolve(BackboneConfig(path=path, dtype=dtype, max_seq_len=max_seq_len))
    return config, _load(config, _loading.whole_shapes(config))


def load_tokenizer(config: BackboneConfig) -> CheckpointTokenizer:
    """The tokenizer beside the weights. Raises UserError if it is missing, damaged or larger than the vocabulary."""
    return tokenizer.load(locate(config.path), config.vocab_size)


def fingerprint(path: str) -> str:
    """A short name for the weights, however they are spread over files."""
    return _safetensors.fingerprint(weight_files(locate(path)))


def locate(path: str) -> Path:
    """The directory of a checkpoint; a name on the Hub is downloaded. Raises UserError if there is none."""
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise UserError(f"--config.backbone.path={path}: no such directory")
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        message = f"--config.backbone.path={path}: no such directory; pip install -e .[hf] to look for it on the Hub"
        raise UserError(message) from None
    try:
        return Path(snapshot_download(path, allow_patterns=list(_FILES)))
    except (OSError, ValueError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--config.backbone.path={path}: no such directory, nor on the Hub ({reason})") from None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises UserError if one is missing, or if there are pickles alone."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if not index.exists():
        if single.exists():
            return [single]
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
        if pickles:
            raise UserError(
                f"{directory / pickles[0]}: is a pickle, which can run code when it is read; "
                "convert it to safetensors where you trust it"
            )
        raise UserError(f"{single}: no such file")
    weight_map = json_file.read(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: has no weight_map")
    files = [directory / name for name in sorted(set(weight_map.values()))]
    for path in files:
        if not path.exists():
            raise UserError(f"{path}: no such file, but {index.name} names it; download it again")
    return files


def save_backbone(directory: Path, config: BackboneConfig, params: Params) -> None:
    """Writes whole parameters as a checkpoint that `load_whole` and other libraries read.

    Raises UserError for a config that no checkpoint of its family has.
    """
    flat = {"/".join(path): leaf for path, leaf in flatten_dict(params).items()}
    tensors = {_tensor_name(key): _to_file(key, flat[key]) for key in _GLOBAL_NAMES if key in flat}
    for key in _LAYER_NAMES:
        for number, layer in enumerate(flat.get(f"layers/{key}", ())):
            tensors[_tensor_name(key, number)] = _to_file(key, layer)
    directory.mkdir(parents=True, exist_ok=True)
    _config_json.write(directory / "config.json", config)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _load(config: BackboneConfig, shapes: Any) -> Params:
    """Parameters of these shapes from the checkpoint at `config.path`."""
    directory = locate(config.path)
    files = map(_safetensors.open_file, weight_files(directory))
    file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)
    unread = set(file_of)

    def open_tensor(key: str, layer: int | None, shape: tuple[int, ...]) -> _loading.ReadPart:
        name, transposed = _tensor_name(key, layer), _is_transposed(key)
        if name not in file_of:
            raise UserError(f"{directory}: has no tensor {name}")
        unread.discard(name)
        tensor, expected = file_of[name].get_slice(name), list(shape[::-1] if transposed else shape)
        if tensor.get_shape() != expected or tensor.get_dtype() not in _DTYPES:
            found = f"is {tensor.get_dtype()} of shape {tensor.get_shape()}"
            raise UserError(f"{directory}: tensor {name} {found}; expected shape {expected}, in {', '.join(_DTYPES)}")
        return lambda index: tensor[index[::-1]].T if transposed else tensor[index]

    params = _loading.load(config, shapes, open_tensor)
    unread -= {name for name in unread if name.endswith("rotary_emb.inv_freq")}
    unread -= {_tensor_name("unembedding/weight")} if config.tied_embeddings else set()
    if unread:
        raise UserError(f"{directory}: tensor {min(unread)} is not understood, and could change the result")
    return params


def _tensor_name(key: str, layer: int | None = None) -> str:
    return _GLOBAL_NAMES[key] if layer is None else f"model.layers.{layer}.{_LAYER_NAMES[key]}"


def _is_transposed(key: str) -> bool:
    """Whether files have it as (output, input)."""
    return key.endswith("/weight")


def _to_file(key: str, leaf) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(leaf).T if _is_transposed(key) else np.asarray(leaf))
