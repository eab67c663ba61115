"""Qwen 3 (arXiv 2505.09388): each head's queries and keys are normalized."""

from collections.abc import Mapping
from typing import Any

from lamini_jax.config import BackboneConfig

ARCHITECTURE = "Qwen3ForCausalLM"
DEFAULTS = {"num_key_value_heads": 32, "max_window_layers": 28, "head_dim": 128}


def block_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The norms. A window in its config.json is for some of the layers only, and is refused if it is in use."""
    return {"qkv_bias": False, "qk_norm": True, "sliding_window": 0}


def extra_values(config: BackboneConfig) -> dict[str, Any]:
    """None: a config.json that does not mention the window does not use it."""
    return {}
