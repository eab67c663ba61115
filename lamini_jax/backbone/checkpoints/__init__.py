"""Formats of checkpoints, from which backbones are read: one module each, chosen by `backbone.path`.

A new format is a new module here, and nothing else changes. It has

    recognizes(path) -> bool        whether the checkpoint at `path` is of this format; it reads no weights
    resolve(asked) -> config        the BackboneConfig with what the checkpoint decides filled in; UserError for a field
                                    that was set to something else, and for a checkpoint that is not understood
    load_split(decoder) -> params   the parameters of `decoder.config`, split as the decoder is, on the devices;
                                    UserError if the checkpoint contradicts the config
    load_whole(path, dtype, max_seq_len) -> (config, params)    the same in one stack of layers
    load_tokenizer(config) -> Tokenizer
    fingerprint(path) -> str        a short name that only these weights have: `_fingerprint` makes one
    export(config, directory) -> None   writes weights and tokenizer in Hugging Face format

`huggingface` is tried last and recognizes every path: a directory, or a name on the Hub, which any text may be. Modules
whose names begin with an underscore are not formats; any format can use `_loading.load`, which reads tensor by tensor
straight into shards.
"""

from pathlib import Path
from types import ModuleType

from lamini_jax.backbone.tokenizer import Tokenizer
from lamini_jax.backbone.transformer import Params
from lamini_jax.config import BackboneConfig
from lamini_jax.errors import UserError
from lamini_jax.runtime.registry import Registry

FORMATS = Registry(__name__, "backbone.path")
_LAST = "huggingface"


def format_of(path: str) -> ModuleType:
    """The module that reads the checkpoint at a `backbone.path`."""
    others = (FORMATS[name] for name in FORMATS.names() if name != _LAST)
    return next((module for module in others if module.recognizes(path)), FORMATS[_LAST])


def resolve(asked: BackboneConfig) -> BackboneConfig:
    """The config with everything that the checkpoint at its path decides.

    Raises UserError for a checkpoint that is not understood, and for a field that was set to something else.
    """
    return format_of(asked.path).resolve(asked)


def load_whole(path: str, dtype: str = "float32", max_seq_len: int = 256) -> tuple[BackboneConfig, Params]:
    """The config and the whole parameters of a checkpoint, on the devices of the ambient mesh.

    Raises UserError for what is missing, damaged, of another shape or not understood.
    """
    return format_of(path).load_whole(path, dtype, max_seq_len)


def load_tokenizer(config: BackboneConfig) -> Tokenizer:
    """The tokenizer of the backbone that `config` names. Raises UserError if it is missing or damaged."""
    return format_of(config.path).load_tokenizer(config)


def export(config: BackboneConfig, directory: Path) -> None:
    """Writes the backbone that `config` names in Hugging Face format, with the values, context length and tokens of its
    checkpoint, whatever the run's dtype and max_seq_len. Raises UserError if the weights do not read back equal.
    """
    source = format_of(config.path)
    source.export(config, directory)
    if FORMATS[_LAST].fingerprint(str(directory)) != source.fingerprint(config.path):
        raise UserError(f"{directory}: what was written differs from what was read; try again, or check the disk")
