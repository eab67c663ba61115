"""From the metadata of a GGUF file to a BackboneConfig, by way of what a config.json would say of the same model.

A key that could change the result is refused with an error that names it.
"""

from typing import Any

import numpy as np

from lamini_jax.backbone.checkpoints import _config_json, _loading
from lamini_jax.backbone.checkpoints import _config_keys as keys
from lamini_jax.backbone.checkpoints._gguf_file import STORAGES, File, Tensor
from lamini_jax.backbone.json_file import shown
from lamini_jax.errors import UserError

ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# llama.cpp has no architecture of its own for Mistral: it is Llama, with a window if there is one.
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Keys of an architecture -> the key of config.json with the same meaning, and what its value must be.
_KEYS = {
    "block_count": ("num_hidden_layers", keys.COUNT),
    "context_length": ("max_position_embeddings", keys.COUNT),
    "embedding_length": ("hidden_size", keys.COUNT),
    "feed_forward_length": ("intermediate_size", keys.COUNT),
    "attention.head_count": ("num_attention_heads", keys.COUNT),
    "attention.head_count_kv": ("num_key_value_heads", keys.COUNT),
    "attention.key_length": ("head_dim", keys.COUNT),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", keys.NOT_NEGATIVE),
    "rope.freq_base": ("rope_theta", keys.POSITIVE),
}
_OPTIONAL = ("attention.head_count_kv", "attention.key_length", "rope.freq_base")
_WINDOW = "attention.sliding_window"
_SCALING, _FACTOR, _OLD_FACTOR = "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"
# Keys that repeat what others say, or say what only training and other programs need.
_CHECKED = ("vocab_size", "attention.value_length", "rope.dimension_count")
_HARMLESS = (
    "expert_used_count",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
)
# Values with which any key says that the model does not have what it is about.
_SILENT = (False, 0, "", "none", [])
# Llama 3.1's rotary scaling: a file has only the divisors that come of it. All published ones have these two factors,
# and an original context that is a power of two.
_LOW, _HIGH, _CONTEXTS = 1.0, 4.0, [2**power for power in range(4, 24)]


def fields(file: File) -> tuple[dict[str, Any], int]:
    """The fields of BackboneConfig that a file decides, and the longest sequence that it allows.

    Raises UserError for what is missing, of a wrong type or not understood.
    """
    path, about = file.path, _about(file)
    values = {"model_type": file.metadata["general.architecture"], "vocab_size": _vocab_size(file)}
    for key, (name, kind) in _KEYS.items():
        if key in about:
            keys.check_kind(path, key, about[key], kind)
            values[name] = about[key]
        elif key not in _OPTIONAL:
            raise UserError(f"{path}: has no {key} in its metadata")
    heads = values["num_attention_heads"]
    values.setdefault("num_key_value_heads", heads)
    if "head_dim" not in values and values["hidden_size"] % heads:
        raise UserError(f"{path}: embedding_length {values['hidden_size']} is no multiple of attention.head_count")
    head_dim = values.setdefault("head_dim", values["hidden_size"] // heads)
    if about.get(_WINDOW):
        keys.check_kind(path, _WINDOW, about[_WINDOW], keys.COUNT)
        values |= {"model_type": "mistral", "sliding_window": about[_WINDOW]}
    for key, expected in zip(_CHECKED, (values["vocab_size"], head_dim, head_dim), strict=True):
        if about.get(key, expected) != expected:
            raise UserError(f"{path}: {key} {keys.json_of(about[key])} is not supported; expected {expected}")
    values["rope_scaling"] = _rope_scaling(file, about, head_dim, values.get("rope_theta", 10_000.0))
    head = file.tensors.get(HEAD)
    values["tie_word_embeddings"] = head is None or _are_equal(head, file.tensors[EMBEDDING])
    return _config_json.fields(path, values), values["max_position_embeddings"]


def _about(file: File) -> dict[str, Any]:
    """The metadata of the architecture, without its name. Raises UserError for what is not supported."""
    path, metadata = file.path, file.metadata
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if kind != "model":
        raise UserError(f"{path}: holds {shown(kind)} and not a model")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UserError(f"{path}: architecture {keys.json_of(architecture)} is not supported; one of {known} is")
    start = f"{architecture}."
    about = {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}
    if about.get("expert_count") not in (None, 0):
        raise UserError(f"{path}: expert_count {shown(about['expert_count'])}: mixtures of experts are not supported")
    known = {*_KEYS, *_CHECKED, *_HARMLESS, _SCALING, _FACTOR, _OLD_FACTOR}
    if architecture == "llama":
        known.add(_WINDOW)
    for key, value in about.items():
        if key not in known and value not in _SILENT and (key, value) != ("attention.causal", True):
            raise UserError(
                f"{path}: {shown(key)} {keys.json_of(value)} is not understood, and could change the result"
            )
    return about


def _vocab_size(file: File) -> int:
    embedding = file.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{file.path}: has no tensor {EMBEDDING} with two axes")
    return embedding.shape[0]


def _are_equal(head: Tensor, embedding: Tensor) -> bool:
    readable = head.type in STORAGES and embedding.type in STORAGES
    return readable and _loading.are_equal(head, embedding)


def _rope_scaling(file: File, about: dict[str, Any], head_dim: int, theta: float) -> dict[str, Any] | None:
    """What config.json says as rope_scaling."""
    path, kind = file.path, about.get(_SCALING, "linear")  # as llama.cpp reads a factor without a kind
    factor = about.get(_FACTOR, about.get(_OLD_FACTOR, 1.0))
    keys.check_kind(path, _FACTOR if _FACTOR in about else _OLD_FACTOR, factor, keys.NOT_NEGATIVE)
    if kind not in ("none", "linear"):
        raise UserError(f"{path}: {_SCALING} {keys.json_of(kind)} is not supported; none and linear are")
    linear = {"rope_type": "linear", "factor": factor} if kind == "linear" and factor not in (0, 1) else None
    if ROPE_FACTORS not in file.tensors:
        return linear
    if linear:
        raise UserError(f"{path}: scales rotary positions twice, with {ROPE_FACTORS} and by {_FACTOR}")
    return _llama3(file.tensors[ROPE_FACTORS], head_dim, theta)


def _llama3(tensor: Tensor, head_dim: int, theta: float) -> dict[str, Any] | None:
    """The rotary scaling with which one divides each frequency by these factors."""
    where = f"{tensor.file}: tensor {ROPE_FACTORS}"
    if tensor.shape != (head_dim // 2,) or tensor.dtype != "F32":
        raise UserError(f"{where} is {tensor.dtype} of shape {list(tensor.shape)}; expected [{head_dim // 2}], in F32")
    divisors_F = tensor[:].astype(np.float64)
    factor = float(divisors_F.max())
    if divisors_F.min() <= 0:
        raise UserError(f"{where} holds {divisors_F.min()}, by which no frequency can be divided")
    if (divisors_F == factor).all():
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    turns_F = theta ** (-2 * np.arange(head_dim // 2) / head_dim) / (2 * np.pi)  # of a frequency, per token
    for context in _CONTEXTS:
        kept_F = np.clip((context * turns_F - _LOW) / (_HIGH - _LOW), 0, 1)
        if np.allclose(1 / divisors_F, kept_F + (1 - kept_F) / factor, rtol=1e-4, atol=0):
            scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": _LOW, "high_freq_factor": _HIGH}
            return {**scaling, "original_max_position_embeddings": context}
    raise UserError(f"{where} is not understood: these are not the factors of Llama 3.1's rotary scaling")
