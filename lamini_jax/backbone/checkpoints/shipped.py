"""The backbone inside the package, for an empty path: tiny, byte-level, in one safetensors file with our own names.

`experiments/pretrain_backbone.py` makes it.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lamini_jax.backbone import transformer
from lamini_jax.backbone.checkpoints import _fingerprint, _names, huggingface
from lamini_jax.backbone.tokenizer import ByteTokenizer
from lamini_jax.backbone.transformer import Params
from lamini_jax.config import BackboneConfig
from lamini_jax.errors import UserError

PATH = Path(__file__).parents[2] / "weights" / "tiny.safetensors"


def recognizes(path: str) -> bool:
    """Whether the path is empty."""
    return not path


def resolve(asked: BackboneConfig) -> BackboneConfig:
    """The config as it is. Raises UserError if it is not the shipped backbone's, whatever its dtype."""
    config, _ = load()
    if asked.system:
        raise UserError("--config.backbone.system: the backbone that ships reads questions alone; leave it empty")
    for field in dataclasses.fields(config):
        wanted, given = getattr(asked, field.name), getattr(config, field.name)
        if wanted != given and field.name != "dtype":
            raise UserError(f"--config.backbone.{field.name}={wanted}: the backbone that ships has {given}")
    return asked


def load_split(decoder: transformer.Decoder) -> Params:
    """The parameters split as the decoder is, on the devices. Raises UserError if the decoder has another config."""
    resolve(decoder.config)
    return transformer.put(decoder, transformer.split_layers(load()[1], decoder.memory_layers))


def load_whole(path: str, dtype: str, max_seq_len: int) -> tuple[BackboneConfig, Params]:
    """The config and the whole parameters, on the devices. Raises UserError for another `max_seq_len`."""
    config, params = load()
    config = resolve(dataclasses.replace(config, path=path, dtype=dtype, max_seq_len=max_seq_len))
    return config, transformer.put(transformer.Decoder(config, 1), params)


def load_tokenizer(config: BackboneConfig) -> ByteTokenizer:
    """The byte tokenizer."""
    return ByteTokenizer()


def fingerprint(path: str) -> str:
    """A short name for the weights, the same as that of their export to Hugging Face format."""
    return _fingerprint.fingerprint(dict(_names.to_files(load()[1])))


def export(config: BackboneConfig, directory: Path) -> None:
    """Writes it in Hugging Face format with its tokenizer, for other libraries to read."""
    tokens = {
        "bos_token_id": ByteTokenizer.begin_id,
        "eos_token_id": ByteTokenizer.stop_id,
        "pad_token_id": ByteTokenizer.pad_id,
    }
    huggingface.save_backbone(directory, *load(), **tokens)
    ByteTokenizer().save(directory)


def load() -> tuple[BackboneConfig, Params]:
    """The config and the whole parameters, on the host."""
    return read(PATH)


def read(path: Path) -> tuple[BackboneConfig, Params]:
    """What `save` wrote. Raises UserError if the file is missing or was not written by it."""
    try:
        with safe_open(path, framework="numpy") as file:
            config = BackboneConfig(**json.loads(file.metadata()["backbone"]))
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: is not a backbone saved by lamini_jax ({error})") from error
    return config, unflatten_dict({tuple(name.split("/")): value for name, value in flat.items()})


def save(path: Path, config: BackboneConfig, params: Params) -> None:
    """Writes whole parameters and their config as one safetensors file."""
    flat = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    save_file(flat, path, metadata={"backbone": json.dumps(dataclasses.asdict(config))})
