"""Backbones in Hugging Face format: config.json and safetensors, read into our parameters and written from them.

Llama, Mistral, Qwen 2 and Qwen 3 have the same block. Whatever in a config.json would change the result and is not
understood is refused by name.
"""

import dataclasses
import gc
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lamini_jax import backbone, sharding
from lamini_jax.config import BackboneConfig
from lamini_jax.errors import UserError

# What a config.json of each family means where it is silent.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
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
# Which of our fields a checkpoint does not decide.
_OUR_OWN = ("path", "context", "dtype")

_WHOLE = {
    "embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "unembedding/weight": "lm_head.weight",
}
_IN_A_LAYER = {
    "attention_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "q_norm/scale": "self_attn.q_norm.weight",
    "k_norm/scale": "self_attn.k_norm.weight",
    **{f"{name}/weight": f"self_attn.{name}.weight" for name in backbone.LINEAR_LAYERS[:4]},
    **{f"{name}/bias": f"self_attn.{name}.bias" for name in backbone.LINEAR_LAYERS[:3]},
    **{f"{name}/weight": f"mlp.{name}.weight" for name in backbone.LINEAR_LAYERS[4:]},
}
# What of a repository on the Hub is needed; never weights that are pickles.
_FILES = ("*.json", "*.jinja", "*.safetensors")
_ROWS = 16  # of each tensor that go into a fingerprint
_DTYPES = ("F32", "F16", "BF16", "F64")


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


def resolve(asked: BackboneConfig) -> BackboneConfig:
    """The config with everything that the checkpoint at its path decides.

    Raises UserError for a checkpoint that is not understood, and for a field that was set to something else.
    """
    path = locate(asked.path) / "config.json"
    fields, longest = _read_config(path)
    for field in dataclasses.fields(asked):
        wish = getattr(asked, field.name)
        if field.name in fields and wish not in (field.default, fields[field.name]):
            raise UserError(f"--config.backbone.{field.name}={wish}: {path} says {fields[field.name]}")
    if longest is not None and asked.context > longest:
        raise UserError(f"--config.backbone.context={asked.context}: {path} allows {longest}")
    return dataclasses.replace(asked, **fields)


def load_backbone(
    path: str | os.PathLike, dtype: str = "float32", context: int = 256
) -> tuple[BackboneConfig, backbone.Params]:
    """The config and the whole parameters of a checkpoint, on the devices of the ambient mesh.

    Tensor by tensor, straight into shards: the host never holds more than one twice. Raises UserError for what is
    missing, damaged, of another shape or not understood.
    """
    config = resolve(BackboneConfig(path=os.fspath(path), dtype=dtype, context=context))
    decoder = backbone.Decoder(config, 1)
    shapes = jax.eval_shape(lambda: backbone.join(backbone.init(decoder, jax.random.key(0))))
    return config, _load(config, shapes)


def load_cut(decoder: backbone.Decoder) -> backbone.Params:
    """The parameters of the checkpoint at the decoder's path, cut as the decoder is. Raises UserError if it changed."""
    if resolve(decoder.config) != decoder.config:
        raise UserError(f"--config.backbone.path={decoder.config.path}: its config.json is not what it was")
    return _load(decoder.config, jax.eval_shape(lambda: backbone.init(decoder, jax.random.key(0))))


def fingerprint(path: Path) -> str:
    """A short name for the weights in a safetensors file, or in those of a checkpoint however they are spread.

    It sees some rows of every tensor: whatever was trained further, or merged, has another.
    """
    parts = {}
    for file in map(_opened, [path] if path.is_file() else weight_files(path)):
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_slice(name)
            digest = hashlib.sha256(f"{name} {tensor.get_dtype()} {tensor.get_shape()}".encode())
            for row in np.linspace(0, tensor.get_shape()[0] - 1, _ROWS).astype(int).tolist():
                digest.update(tensor[row : row + 1].tobytes())
            parts[name] = digest.hexdigest()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


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
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: has no weight_map")
    files = [directory / name for name in sorted(set(weight_map.values()))]
    for path in files:
        if not path.exists():
            raise UserError(f"{path}: no such file, but {index.name} names it; download it again")
    return files


def save_backbone(directory: Path, config: BackboneConfig, params: backbone.Params) -> None:
    """Writes whole parameters as a checkpoint that `load_backbone` and other libraries read."""
    flat = {"/".join(path): leaf for path, leaf in flatten_dict(params).items()}
    tensors = {name: _to_file(key, flat[key]) for key, name in _WHOLE.items() if key in flat}
    for key in _IN_A_LAYER:
        for number, layer in enumerate(flat.get(f"layers/{key}", ())):
            tensors[_in_layer(number, key)] = _to_file(key, layer)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(_config_json(config), indent=1) + "\n")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if the file is missing or holds none."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object")
    return value


def _read_config(path: Path) -> tuple[dict[str, Any], int | None]:
    """Our fields of a config.json, and the longest context that it allows."""
    values = read_json(path)
    family = values.get("model_type")
    if family not in _FAMILIES:
        raise UserError(f"{path}: model_type {family!r} is not supported; one of {', '.join(_FAMILIES)} is")
    values = {**_FAMILIES[family], **values}

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
    layers, heads = values["num_hidden_layers"], values["num_attention_heads"]
    window = (values.get("sliding_window") or 0) if family == "mistral" else 0
    if values.get("use_sliding_window") and values.get("max_window_layers", 0) < layers:
        refuse("use_sliding_window", "in some of the layers is not supported")
    if set(values.get("layer_types") or ()) - {"sliding_attention" if window else "full_attention"}:
        refuse("layer_types")
    fields = {
        "vocab_size": values["vocab_size"],
        "num_layers": layers,
        "width": values["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "head_width": values.get("head_dim") or values["hidden_size"] // heads,
        "mlp_width": values["intermediate_size"],
        "sliding_window": window,
        "norm_eps": float(values.get("rms_norm_eps", 1e-6)),
        "tied_embeddings": bool(values.get("tie_word_embeddings")),
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        **_rope(path, values),
    }
    return fields, values.get("max_position_embeddings")


def _rope(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
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
            fields["rope_low"], fields["rope_high"] = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
            fields["rope_original_context"] = int(rope["original_max_position_embeddings"])
    except KeyError as error:
        raise UserError(f"{path}: rope_scaling of kind {kind} has no {error.args[0]}") from None
    return fields


def _config_json(config: BackboneConfig) -> dict[str, Any]:
    """The inverse of `_read_config`."""
    c = config
    family = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "mistral" if c.sliding_window else "llama"
    rope = {"rope_type": "default" if c.rope_scaling == "none" else c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling == "llama3":
        rope |= {"low_freq_factor": c.rope_low, "high_freq_factor": c.rope_high}
        rope["original_max_position_embeddings"] = c.rope_original_context
    return {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_width,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None if c.rope_scaling == "none" else rope,
        "tie_word_embeddings": c.tied_embeddings,
        "hidden_act": "silu",
        "torch_dtype": c.dtype,
        **({"sliding_window": c.sliding_window} if c.sliding_window else {}),
    }


def _load(config: BackboneConfig, shapes: backbone.Params) -> backbone.Params:
    """Parameters of these shapes from the checkpoint at `config.path`."""
    directory = locate(config.path)
    tensors = {name: file for file in map(_opened, weight_files(directory)) for name in file.keys()}  # noqa: SIM118
    names_of, unread, loaded = flatten_dict(backbone.axes(config, shapes)), set(tensors), {}

    def read(name: str, key: str, leaf, names: sharding.Names):
        if name not in tensors:
            raise UserError(f"{directory}: has no tensor {name}")
        unread.discard(name)
        tensor, turned = tensors[name].get_slice(name), _turned(key)
        axes = 2 if turned or key == "embedding" else 1  # of the file's tensor; one of a layer has another before
        shape = leaf.shape[-axes:]
        expected = list(shape[::-1] if turned else shape)
        if tensor.get_shape() != expected or tensor.get_dtype() not in _DTYPES:
            found = f"is {tensor.get_dtype()} of shape {tensor.get_shape()}"
            raise UserError(f"{directory}: tensor {name} {found}; expected shape {expected}, in {', '.join(_DTYPES)}")

        def part(index):
            index = index[-axes:]
            part = tensor[index[::-1]].T if turned else tensor[index]
            part = np.asarray(part, leaf.dtype, order="C")
            return part.reshape(part.shape if len(leaf.shape) == axes else (1, *part.shape))

        return jax.make_array_from_callback(leaf.shape, sharding.layout(names, leaf.shape), part)

    for path, leaf in flatten_dict(shapes).items():
        names = sharding.fit(names_of[path], leaf.shape)
        part, in_layers, key = "/".join(path).rpartition("layers/")
        if not in_layers:
            loaded[path] = read(_WHOLE[key], key, leaf, names)
            continue
        first = config.num_layers - leaf.shape[0] if part == "suffix_" else 0
        layer = jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)
        stack = sharding.zeros(leaf.shape, leaf.dtype, names)
        for number in range(leaf.shape[0]):
            # Waited for, or the host would read ahead and hold many tensors.
            value = read(_in_layer(first + number, key), key, layer, names)
            stack = jax.block_until_ready(sharding.write(stack, value, np.int32(number), names))
            del value
            gc.collect(0)  # jax lets go of the host's memory behind an array when it is next called, or here
        loaded[path] = stack
    unread -= {name for name in unread if name.endswith("rotary_emb.inv_freq")}
    unread -= {_WHOLE["unembedding/weight"]} if config.tied_embeddings else set()
    if unread:
        raise UserError(f"{directory}: tensor {min(unread)} is not understood, and could change the result")
    return unflatten_dict(loaded)


def _in_layer(number: int, key: str) -> str:
    return f"model.layers.{number}.{_IN_A_LAYER[key]}"


def _turned(key: str) -> bool:
    """Whether files have it transposed, as (output, input)."""
    return key.endswith("/weight")


def _to_file(key: str, leaf) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(leaf).T if _turned(key) else np.asarray(leaf))


def _opened(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); download it again") from None
