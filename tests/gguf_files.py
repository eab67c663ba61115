"""GGUF files of the random checkpoints in `checkpoints.py`, written by the gguf library, for tests to import."""

import json
from pathlib import Path

import gguf
import numpy as np
from checkpoints import BEGIN, END, END_OF_TURN, SPECIAL_TOKENS
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType
from safetensors.numpy import load_file

NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    **{f"self_attn.{x}_proj.{part}": f"attn_{x}.{part}" for x in "qkv" for part in ("weight", "bias")},
    **{f"self_attn.{x}_norm.weight": f"attn_{x}_norm.weight" for x in "qk"},
    **{f"mlp.{x}_proj.weight": f"ffn_{x}.weight" for x in ("gate", "up", "down")},
}
GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
# Words of Llama 3, for tokenizers that were trained with others.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def write(path: Path, directory: Path, storage=Type.F32, change=None) -> Path:
    """The checkpoint in a directory as a GGUF file, its matrices in this storage.

    `change(metadata, tensors)` may change what is written: values by key, and pairs of an array and its storage.
    """
    config = json.loads((directory / "config.json").read_text())
    metadata = describe(config)
    if (directory / "tokenizer.json").exists():
        metadata |= byte_level(directory)
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        tensors[name_of(name)] = stored(permuted(config, name, tensor.astype(np.float32)), storage)
    if (factors := rope_factors(config)) is not None:
        tensors["rope_freqs.weight"] = factors, Type.F32
    if change:
        change(metadata, tensors)
    return save(path, metadata, tensors)


def save(path: Path, metadata: dict, tensors: dict) -> Path:
    writer = gguf.GGUFWriter(path, metadata.get("general.architecture", "llama"))
    writer.kv_data[0].clear()
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32"}
            writer.add_key_value(key, value, GGUFValueType[kinds[type(value)]])
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=None if array.dtype.kind == "f" else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def describe(config: dict) -> dict:
    """What the metadata says of the model."""
    architecture = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    config = {"rope_theta": 10_000.0, **config}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    about = {KEYS[key]: config[key] for key in KEYS if config.get(key)}
    scaling = config.get("rope_scaling") or {}
    if scaling.get("type") == "linear":
        about |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling["factor"]}
    if config["model_type"] == "mistral" and config["sliding_window"]:
        about["attention.sliding_window"] = config["sliding_window"]
    about["rope.dimension_count"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    about["vocab_size"] = config["vocab_size"]
    general = {"general.architecture": architecture, "general.name": "Random", "general.quantization_version": 2}
    return {**general, **{f"{architecture}.{key}": value for key, value in about.items()}}


def byte_level(directory: Path, pre="llama-bpe") -> dict:
    """What the metadata says of the tokenizer in a directory, which is then given the words of Llama 3."""
    content = json.loads((directory / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": WORDS}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    vocabulary = content["model"]["vocab"]
    texts = [*sorted(vocabulary, key=vocabulary.get), *SPECIAL_TOKENS]
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [1] * len(vocabulary) + [3] * len(SPECIAL_TOKENS),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": BEGIN,
        "tokenizer.ggml.eos_token_id": END_OF_TURN,
        "tokenizer.ggml.eot_token_id": END_OF_TURN,
        "tokenizer.ggml.eom_token_id": END,
        "tokenizer.chat_template": settings["chat_template"],
    }


def name_of(name: str) -> str:
    """The name in GGUF of a tensor."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}"


def permuted(config: dict, name: str, tensor: np.ndarray) -> np.ndarray:
    """As llama.cpp stores queries and keys of Llama: the halves of each head, one row of each in turn."""
    heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}.get(name.split(".")[-2][:1])
    if config["model_type"] not in ("llama", "mistral") or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    count = config.get(heads) or config["num_attention_heads"]
    halves = np.split(tensor.reshape(count, -1, tensor.shape[1]), 2, axis=1)
    return np.stack(halves, axis=2).reshape(tensor.shape)


def stored(tensor: np.ndarray, storage: Type) -> tuple[np.ndarray, Type]:
    """A matrix in this storage; a vector as it is, as llama.cpp leaves it."""
    if tensor.ndim == 1 or storage == Type.F32:
        return tensor, Type.F32
    if storage == Type.F16:
        return tensor.astype(np.float16), storage
    return gguf.quantize(tensor, storage), storage


# K-quants, which the library only reads: where the two half-precision scales of a block are.
SCALES = {Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}


def random_blocks(shape: tuple[int, int], storage: Type, rng: np.random.Generator) -> np.ndarray:
    """Random blocks of a storage, with scales that are numbers of a usual size."""
    numbers, size = gguf.GGML_QUANT_SIZES[storage]
    blocks = rng.integers(256, size=(shape[0] * shape[1] // numbers, size)).astype(np.uint8)
    for start in SCALES[storage]:
        scales = rng.uniform(0.5e-3, 1.5e-3, size=(len(blocks), 1)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks.reshape(shape[0], -1)


def rope_factors(config: dict) -> np.ndarray | None:
    """The divisors of the frequencies in Llama 3.1's scaling."""
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") != "llama3":
        return None
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for pair in range(width // 2):
        turns = scaling["original_max_position_embeddings"] * config["rope_theta"] ** (-2 * pair / width) / (2 * np.pi)
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(scaling["factor"])
        else:
            smooth = (turns - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)
