"""What a Hugging Face checkpoint computes, in plain float64 numpy: one sequence, one head, one position at a time.

A linear layer may have a LoRA that acts from some position on.

It reads the files by itself and shares no code with the package.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def logits(directory: Path, tokens_BT: np.ndarray, loras_B: list[dict] | None = None) -> np.ndarray:
    """logits_BTV of the model in this directory.

    `loras_B` are the LoRAs of each sequence, from a linear layer's name to its (down_KI, up_KO, first position).
    """
    config = json.loads((directory / "config.json").read_text())
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= _tensors(file)
    added_B = [{f"{name}.lora": lora for name, lora in loras.items()} for loras in loras_B or [{}] * len(tokens_BT)]
    pairs = zip(tokens_BT, added_B, strict=True)
    return np.stack([_sequence(config, tensors | added, tokens_T) for tokens_T, added in pairs])


def transformers_logits(directory: Path, tokens_BT: np.ndarray) -> np.ndarray:
    """The same from the library that these files are made for; the test is skipped where it is not installed."""
    why = "compares with transformers: pip install -e .[parity]"
    transformers = pytest.importorskip("transformers", reason=why)
    torch = pytest.importorskip("torch", reason=why)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(directory, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()


def relative_error(found, expected) -> float:
    """The largest difference, relative to the largest value expected."""
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


def _tensors(file: Path) -> dict[str, np.ndarray]:
    """A safetensors file: the length of a header, the header in JSON, then the bytes that it speaks of."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, about in header.items():
        first, last = (start + offset for offset in about["data_offsets"])
        values = np.frombuffer(content[first:last], _DTYPES[about["dtype"]])
        tensors[name] = values.reshape(about["shape"]).astype(np.float64)
    return tensors


def _sequence(config, tensors, tokens_T):
    eps = config["rms_norm_eps"]
    embedding_VD = tensors.get("model.embed_tokens.weight", tensors.get("lm_head.weight"))
    x_TD = embedding_VD[tokens_T]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        block = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        x_TD = x_TD + _attention(config, block, layer, _norm(x_TD, block["input_layernorm.weight"], eps))
        x_TD = x_TD + _mlp(block, _norm(x_TD, block["post_attention_layernorm.weight"], eps))
    unembedding_VD = tensors.get("lm_head.weight", embedding_VD)
    return _norm(x_TD, tensors["model.norm.weight"], eps) @ unembedding_VD.T


def _norm(x_TD, scale_D, eps):
    return x_TD / np.sqrt((x_TD**2).mean(axis=-1, keepdims=True) + eps) * scale_D


def _mlp(block, x_TD):
    gate_TF = _linear(block, "mlp.gate_proj", x_TD)
    up_TF = _linear(block, "mlp.up_proj", x_TD)
    return _linear(block, "mlp.down_proj", gate_TF / (1 + np.exp(-gate_TF)) * up_TF)


def _attention(config, block, layer, x_TD):
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    group = heads // config.get("num_key_value_heads", heads)
    frequencies = rotary_frequencies(config, width)
    q_THW, k_TGW, v_TGW = (
        _linear(block, f"self_attn.{name}_proj", x_TD).reshape(len(x_TD), -1, width) for name in "qkv"
    )
    if config["model_type"] == "qwen3":
        q_THW = _norm(q_THW, block["self_attn.q_norm.weight"], config["rms_norm_eps"])
        k_TGW = _norm(k_TGW, block["self_attn.k_norm.weight"], config["rms_norm_eps"])
    window = _window(config, layer) or len(x_TD)
    mixed_THW = np.empty_like(q_THW)
    for head in range(heads):
        q_TW = _rotated(q_THW[:, head], frequencies)
        k_TW = _rotated(k_TGW[:, head // group], frequencies)
        for position in range(len(x_TD)):
            seen = slice(max(0, position + 1 - window), position + 1)
            scores_S = k_TW[seen] @ q_TW[position] / np.sqrt(width)
            weights_S = np.exp(scores_S - scores_S.max())
            mixed_THW[position, head] = weights_S @ v_TGW[seen, head // group] / weights_S.sum()
    return _linear(block, "self_attn.o_proj", mixed_THW.reshape(len(x_TD), -1))


def _linear(block, name, x_TI):
    y_TO = x_TI @ block[f"{name}.weight"].T + block.get(f"{name}.bias", 0.0)
    if f"{name}.lora" in block:
        down_KI, up_KO, first = block[f"{name}.lora"]
        y_TO[first:] += x_TI[first:] @ down_KI.T @ up_KO
    return y_TO


def _window(config, layer):
    """How many tokens a token of this layer sees, itself included; None: all before it."""
    if config["model_type"] == "mistral":
        return config["sliding_window"]
    if config.get("use_sliding_window") and layer >= config["max_window_layers"]:
        return config["sliding_window"]
    return None


def _rotated(x_TW, frequencies):
    """Coordinates i and i + W/2 are one complex number, turned by the position times its frequency."""
    half = len(frequencies)
    turns = np.exp(1j * np.outer(np.arange(len(x_TW)), frequencies))
    turned = (x_TW[:, :half] + 1j * x_TW[:, half:]) * turns
    return np.concatenate([turned.real, turned.imag], axis=1)


def rotary_frequencies(config: dict, width: int) -> list[float]:
    """Radians per token of each pair of coordinates of a head, after the config's scaling."""
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10_000.0),
        **(config.get("rope_scaling") or {}),
    }
    plain = [rope["rope_theta"] ** (-2 * i / width) for i in range(width // 2)]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return plain
    if kind == "linear":
        return [frequency / rope["factor"] for frequency in plain]
    assert kind == "llama3", kind
    return [_llama3(frequency, rope) for frequency in plain]


def _llama3(frequency, rope):
    """Llama 3.1: what turns often within the original context stays, what hardly turns is slowed, between: both mix."""
    turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = min(1.0, max(0.0, (turns - low) / (high - low)))
    return kept * frequency + (1 - kept) * frequency / rope["factor"]
