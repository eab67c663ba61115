"""Qwen 2 and 2.5 (arXiv 2407.10671): biases on queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from lamini_jax.config import BackboneConfig

ARCHITECTURE = "Qwen2ForCausalLM"
DEFAULTS = {"num_key_value_heads": 32, "max_window_layers": 28}


def block_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The biases. A window in its config.json is for some of the layers only, and is refused if it is in use."""
    return {"qkv_bias": True, "qk_norm": False, "sliding_window": 0}


def extra_values(config: BackboneConfig) -> dict[str, Any]:
    """None: a config.json that does not mention the window does not use it."""
    return {}
