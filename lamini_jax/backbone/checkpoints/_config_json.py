"""From config.json, which describes a model in Hugging Face format, to a BackboneConfig and back.

`_config_keys` says what each key means; a key that could change the result is refused with an error that names it.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamini_jax.backbone import json_file
from lamini_jax.backbone.checkpoints import _config_keys as keys
from lamini_jax.backbone.checkpoints.families import FAMILIES
from lamini_jax.backbone.json_file import shown
from lamini_jax.config import BackboneConfig
from lamini_jax.errors import UserError

_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_SILU = ("silu", "swish")  # two names of one function
# Keys of rope_scaling and rope_parameters, and what their values must be.
_ROPE_KINDS = {
    "rope_type": keys.TEXT._replace(may_be_null=True),
    "type": keys.TEXT._replace(may_be_null=True),
    "rope_theta": keys.POSITIVE,
    "factor": keys.POSITIVE,
    "low_freq_factor": keys.POSITIVE,
    "high_freq_factor": keys.POSITIVE,
    "original_max_position_embeddings": keys.COUNT_OR_NULL,
}
# Other keys that may be there, with the values that change nothing.
_ROPE_NEUTRAL = {"partial_rotary_factor": 1, "attention_factor": 1, "mscale": 1}
_LLAMA3_NEEDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE_NEEDS = {"default": (), "linear": ("factor",), "llama3": _LLAMA3_NEEDS}


def read(path: Path) -> tuple[dict[str, Any], int | None]:
    """The fields of BackboneConfig that a config.json decides, and the longest sequence that it allows.

    Raises UserError for what is missing, of a wrong type or not understood.
    """
    values = json_file.read(path)
    return fields(path, values), values.get("max_position_embeddings")


def write(path: Path, config: BackboneConfig, **others: Any) -> None:
    """The inverse of `read`, with more keys. Raises UserError for a config that no checkpoint of its family has."""
    c, family = config, FAMILIES[config.family]
    values = {
        "architectures": [family.ARCHITECTURE],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.embed_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_dim,
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": _rope_scaling(c),
        "tie_word_embeddings": c.tied_embeddings,
        "hidden_act": "silu",
        "torch_dtype": c.dtype,
        **family.extra_values(c),
        **others,
    }
    for name, value in fields(path, values).items():
        if getattr(c, name) != value:
            raise UserError(f"--config.backbone.{name}={getattr(c, name)}: a {c.family} checkpoint has {value}")
    path.write_text(json.dumps(values, indent=1) + "\n")


def fill_in(asked: BackboneConfig, path: Path, found: Mapping[str, Any], longest: int | None) -> BackboneConfig:
    """The config with the fields found at `path`. Raises UserError for one that was set to something else, and for a
    `max_seq_len` above the longest sequence that is allowed.
    """
    for field in dataclasses.fields(asked):
        wanted = getattr(asked, field.name)
        if field.name in found and wanted not in (field.default, found[field.name]):
            raise UserError(f"--config.backbone.{field.name}={wanted}: {path} says {found[field.name]}")
    if longest is not None and asked.max_seq_len > longest:
        raise UserError(f"--config.backbone.max_seq_len={asked.max_seq_len}: {path} allows {longest}")
    return dataclasses.replace(asked, **found)


def fields(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of BackboneConfig that the values of a config.json decide. Raises UserError as `read` does."""
    name = values.get("model_type")
    if name not in FAMILIES.names():
        known = ", ".join(FAMILIES.names())
        raise UserError(f"{path}: model_type {keys.json_of(name)} is not supported; one of {known} is")
    keys.check(path, values)
    for key in _NEEDED:
        if key not in values:
            raise UserError(f"{path}: has no {key}")
    values = {**FAMILIES[name].DEFAULTS, **values}
    block = FAMILIES[name].block_fields(values)
    _refuse_others(path, values, block)
    heads = values["num_attention_heads"]
    return {
        "family": name,
        "vocab_size": values["vocab_size"],
        "num_layers": values["num_hidden_layers"],
        "embed_dim": values["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
        "mlp_dim": values["intermediate_size"],
        "norm_eps": float(values.get("rms_norm_eps", 1e-6)),
        "tied_embeddings": values.get("tie_word_embeddings") or False,
        **block,
        **_rope_fields(path, values),
    }


def _refuse_others(path: Path, values: Mapping[str, Any], block: Mapping[str, Any]) -> None:
    """Raises UserError for a model that is not supported, naming the first key that shows it."""

    def refuse(key: str, why: str = "is not supported"):
        raise UserError(f"{path}: {key} {keys.json_of(values[key])} {why}")

    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            refuse(key)
    for key in ("qkv_bias", "use_qkv_bias", "qk_norm", "use_qk_norm"):
        if values.get(key) not in (None, block[key.removeprefix("use_")]):
            refuse(key, f"is not what {values['model_type']} models have")
    heads, head_dim = values["num_attention_heads"], values.get("head_dim")
    if heads % (values.get("num_key_value_heads") or heads):
        refuse("num_key_value_heads", "does not divide num_attention_heads")
    if not head_dim and values["hidden_size"] % heads:
        refuse("hidden_size", f"is no multiple of num_attention_heads {heads}, and there is no head_dim")
    if (head_dim or values["hidden_size"] // heads) % 2:
        refuse("head_dim" if head_dim else "hidden_size", "makes heads of an odd width")
    if values.get("hidden_act", "silu") not in _SILU:
        refuse("hidden_act")
    has_window = values.get("use_sliding_window") and values.get("sliding_window", True) is not None
    if has_window and (values.get("max_window_layers") or 0) < values["num_hidden_layers"]:
        refuse("use_sliding_window", "in some of the layers is not supported")
    if set(values.get("layer_types") or ()) - {"sliding_attention" if block["sliding_window"] else "full_attention"}:
        refuse("layer_types")


def _rope_fields(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of BackboneConfig for rotary positions."""
    rope = _rope(path, values)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _ROPE_NEEDS:
        raise UserError(f"{path}: rope_scaling {keys.json_of(rope)} is not supported; kinds linear and llama3 are")
    for key in _ROPE_NEEDS[kind]:
        if rope.get(key) is None:
            raise UserError(f"{path}: rope_scaling of kind {kind} has no {key}")
    for key in sorted(rope.keys() - _ROPE_KINDS.keys()):
        if rope[key] not in (None, False, _ROPE_NEUTRAL.get(key)) or rope[key] is True:
            where = f"{path}: rope_scaling.{shown(key)} {keys.json_of(rope[key])}"
            raise UserError(f"{where} is not understood, and could change the result")
    defaults = {field.name: field.default for field in dataclasses.fields(BackboneConfig)}
    fields = {name: value for name, value in defaults.items() if name.startswith("rope_")}
    fields["rope_theta"] = float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0)
    if kind == "default":
        return fields
    fields |= {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        if low >= high:
            raise UserError(f"{path}: rope_scaling.low_freq_factor {low} is not below high_freq_factor {high}")
        fields |= {"rope_low_freq_factor": low, "rope_high_freq_factor": high}
        fields["rope_original_max_seq_len"] = rope["original_max_position_embeddings"]
    return fields


def _rope(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says about rotary positions: older files in rope_scaling, newer ones in rope_parameters."""
    rope = {}
    for name in ("rope_scaling", "rope_parameters"):
        for key, value in (values.get(name) or {}).items():
            if key in _ROPE_KINDS:
                keys.check_kind(path, f"{name}.{key}", value, _ROPE_KINDS[key])
            if rope.setdefault(key, value) != value:
                raise UserError(f"{path}: rope_scaling and rope_parameters have different values of {shown(key)}")
    return rope


def _rope_scaling(config: BackboneConfig) -> dict[str, Any] | None:
    """The inverse of `_rope_fields`, except for rope_theta."""
    if config.rope_scaling == "none":
        return None
    rope = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        rope["low_freq_factor"] = config.rope_low_freq_factor
        rope["high_freq_factor"] = config.rope_high_freq_factor
        rope["original_max_position_embeddings"] = config.rope_original_max_seq_len
    return rope
