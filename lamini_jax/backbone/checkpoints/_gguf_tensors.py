"""The tensors of a GGUF file under the names and in the order of rows that Hugging Face's format has."""

import dataclasses
from typing import Any

import numpy as np

from lamini_jax.backbone.checkpoints import _loading, _names
from lamini_jax.backbone.checkpoints._gguf_file import STORAGES, File, Tensor
from lamini_jax.backbone.checkpoints._gguf_metadata import EMBEDDING, HEAD, ROPE_FACTORS
from lamini_jax.backbone.json_file import shown
from lamini_jax.config import BackboneConfig
from lamini_jax.errors import UserError

_GLOBAL_NAMES = {"embedding": EMBEDDING, "final_norm/scale": "output_norm.weight", "unembedding/weight": HEAD}
_LAYER_NAMES = {
    "attention_norm/scale": "attn_norm.weight",
    "mlp_norm/scale": "ffn_norm.weight",
    "q_norm/scale": "attn_q_norm.weight",
    "k_norm/scale": "attn_k_norm.weight",
    "q_proj/weight": "attn_q.weight",
    "k_proj/weight": "attn_k.weight",
    "v_proj/weight": "attn_v.weight",
    "q_proj/bias": "attn_q.bias",
    "k_proj/bias": "attn_k.bias",
    "v_proj/bias": "attn_v.bias",
    "o_proj/weight": "attn_output.weight",
    "gate_proj/weight": "ffn_gate.weight",
    "up_proj/weight": "ffn_up.weight",
    "down_proj/weight": "ffn_down.weight",
}


def find(file: File, config: BackboneConfig, shapes: Any) -> dict[str, Tensor]:
    """The tensors of parameters of these shapes, which `_loading` has, by their names in Hugging Face's format.

    Raises UserError for one that is missing, of another shape, stored in a way that is not read, or not understood.
    """
    found, names = {}, {ROPE_FACTORS}
    for key, layer, shape in _loading.parts(config, shapes):
        name = _GLOBAL_NAMES[key] if layer is None else f"blk.{layer}.{_LAYER_NAMES[key]}"
        if name not in file.tensors:
            raise UserError(f"{file.path}: has no tensor {name}")
        tensor, expected = file.tensors[name], shape[::-1] if _names.is_transposed(key) else shape
        if tensor.shape != expected or tensor.type not in STORAGES:
            wanted = f"expected shape {list(expected)}, in {', '.join(storage.name for storage in STORAGES.values())}"
            shape = shown(list(tensor.shape))
            raise UserError(f"{file.path}: tensor {name} is {tensor.dtype} of shape {shape}; {wanted}")
        names.add(name)
        found[_names.tensor_name(key, layer)] = dataclasses.replace(tensor, order=_order(config, key))
    if config.tied_embeddings:
        names.add(HEAD)  # it equals the embedding
    if unknown := sorted(file.tensors.keys() - names):
        where = f"{file.path}: tensor {shown(unknown[0])}"
        raise UserError(f"{where} is not understood, and could change the result")
    return found


def _order(config: BackboneConfig, key: str) -> np.ndarray | None:
    """Which stored row is which row of queries or keys: llama.cpp rotates neighbours in a head of Llama, and for that
    stores the first half of each head's rows between the rows of the second.
    """
    if config.family not in ("llama", "mistral") or key not in ("q_proj/weight", "k_proj/weight"):
        return None
    heads = config.num_heads if key == "q_proj/weight" else config.num_kv_heads
    stored = np.arange(heads * config.head_dim).reshape(heads, config.head_dim // 2, 2)
    return stored.swapaxes(1, 2).reshape(-1)
