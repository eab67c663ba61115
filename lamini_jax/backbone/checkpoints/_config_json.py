"""config.json, which describes a model in Hugging Face format, as a BackboneConfig and back.

Whatever in it would change the result and is not understood is refused by name.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamini_jax.backbone import json_file
from lamini_jax.backbone.checkpoints.families import FAMILIES
from lamini_jax.config import BackboneConfig
from lamini_jax.errors import UserError

_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_UNDERSTOOD = frozenset(
    (
        *_NEEDED,
        *"model_type num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling rope_parameters".split(),
        *"tie_word_embeddings sliding_window use_sliding_window max_window_layers layer_types hidden_act".split(),
        *"attention_bias mlp_bias max_position_embeddings".split(),
    )
)
# Names, the tokenizer's own tokens, and what matters in training alone.
_HARMLESS = frozenset(
    "_name_or_path architectures attention_dropout bos_token_id dtype eos_token_id initializer_range pad_token_id "
    "pretraining_tp torch_dtype transformers_version unk_token_id use_cache".split()
)
_ROPE_FIELDS = {"rope_type", "type", "rope_theta", "factor"}
_LLAMA3_FIELDS = {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def read(path: Path) -> tuple[dict[str, Any], int | None]:
    """The fields of BackboneConfig that a config.json decides, and the longest sequence that it allows.

    Raises UserError for what is missing, or not understood.
    """
    values = json_file.read(path)
    return _fields(path, values), values.get("max_position_embeddings")


def write(path: Path, config: BackboneConfig) -> None:
    """The inverse of `read`. Raises UserError for a config that no checkpoint of its family has."""
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
    }
    for name, value in _fields(path, values).items():
        if getattr(c, name) != value:
            raise UserError(f"--config.backbone.{name}={getattr(c, name)}: a {c.family} checkpoint has {value}")
    path.write_text(json.dumps(values, indent=1) + "\n")


def _fields(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    name = values.get("model_type")
    if name not in FAMILIES.names():
        raise UserError(f"{path}: model_type {name!r} is not supported; one of {', '.join(FAMILIES.names())} is")
    values = {**FAMILIES[name].DEFAULTS, **values}
    block = FAMILIES[name].block_fields(values)
    _refuse_others(path, values, "sliding_attention" if block["sliding_window"] else "full_attention")
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
        "tied_embeddings": bool(values.get("tie_word_embeddings")),
        **block,
        **_rope_fields(path, values),
    }


def _refuse_others(path: Path, values: Mapping[str, Any], layer_type: str) -> None:
    """Raises UserError for a model that is not ours, naming the first field that says so."""

    def refuse(name: str, why: str = "is not supported"):
        raise UserError(f"{path}: {name} {json.dumps(values[name])} {why}")

    for name in _NEEDED:
        if not isinstance(values.get(name), int):
            raise UserError(f"{path}: has no number {name}")
    for name in values:
        if name not in _UNDERSTOOD | _HARMLESS and values[name] not in (None, False):
            refuse(name, "is not understood, and could change the result")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            refuse(name)
    if values["num_attention_heads"] % (values.get("num_key_value_heads") or values["num_attention_heads"]):
        refuse("num_key_value_heads", "does not divide num_attention_heads")
    if values.get("hidden_act", "silu") != "silu":
        refuse("hidden_act")
    if values.get("use_sliding_window") and values.get("max_window_layers", 0) < values["num_hidden_layers"]:
        refuse("use_sliding_window", "in some of the layers is not supported")
    if set(values.get("layer_types") or ()) - {layer_type}:
        refuse("layer_types")


def _rope_fields(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields of the rotary positions; older files name them apart, newer ones in rope_parameters."""
    parts = [values.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path}: rope_scaling {json.dumps(parts[0] or parts[1])} is not an object")
    rope = parts[0] | parts[1]
    kind = rope.get("rope_type", rope.get("type", "default"))
    defaults = {field.name: field.default for field in dataclasses.fields(BackboneConfig)}
    fields = {name: value for name, value in defaults.items() if name.startswith("rope_")}
    fields["rope_theta"] = float(rope.get("rope_theta", values.get("rope_theta") or 10_000.0))
    known = _ROPE_FIELDS | (_LLAMA3_FIELDS if kind == "llama3" else set())
    if kind not in ("default", "linear", "llama3") or any(rope[name] for name in rope.keys() - known):
        raise UserError(f"{path}: rope_scaling {json.dumps(rope)} is not supported; kinds linear and llama3 are")
    if kind == "default":
        return fields
    try:
        fields |= {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
        if kind == "llama3":
            fields["rope_low_freq_factor"] = float(rope["low_freq_factor"])
            fields["rope_high_freq_factor"] = float(rope["high_freq_factor"])
            fields["rope_original_max_seq_len"] = int(rope["original_max_position_embeddings"])
    except KeyError as error:
        raise UserError(f"{path}: rope_scaling of kind {kind} has no {error.args[0]}") from None
    return fields


def _rope_scaling(config: BackboneConfig) -> dict[str, Any] | None:
    """The inverse of `_rope_fields`, but for the theta."""
    if config.rope_scaling == "none":
        return None
    rope = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        rope["low_freq_factor"] = config.rope_low_freq_factor
        rope["high_freq_factor"] = config.rope_high_freq_factor
        rope["original_max_position_embeddings"] = config.rope_original_max_seq_len
    return rope
