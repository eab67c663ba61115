"""Our names of parameters and those of checkpoints in Hugging Face format, whose matrices are (output, input)."""

from collections.abc import Iterator

import numpy as np
from flax.traverse_util import flatten_dict

from lamini_jax.backbone.linear_layers import LINEAR_LAYERS
from lamini_jax.backbone.transformer import Params

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Parameters that exist once, and those of each layer.
_GLOBAL_NAMES = {
    "embedding": EMBEDDING,
    "final_norm/scale": "model.norm.weight",
    "unembedding/weight": HEAD,
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


def tensor_name(key: str, layer: int | None = None) -> str:
    """The name in the files of a layer's parameter ("q_proj/weight"), or of one that is in no layer."""
    return _GLOBAL_NAMES[key] if layer is None else f"model.layers.{layer}.{_LAYER_NAMES[key]}"


def is_transposed(key: str) -> bool:
    """Whether the files store it as (output, input)."""
    return key.endswith("/weight")


def to_files(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Whole parameters as the files store them: their names and tensors."""
    flat = {"/".join(path): leaf for path, leaf in flatten_dict(params).items()}
    for key in _GLOBAL_NAMES:
        if key in flat:
            yield tensor_name(key), _to_file(key, flat[key])
    for key in _LAYER_NAMES:
        for number, layer in enumerate(flat.get(f"layers/{key}", ())):
            yield tensor_name(key, number), _to_file(key, layer)


def _to_file(key: str, leaf) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(leaf).T if is_transposed(key) else np.asarray(leaf))
