"""Llama (arXiv 2302.13971, 2407.21783), and other models that have its model_type in their config.json."""

from collections.abc import Mapping
from typing import Any

from lamini_jax.config import BackboneConfig

ARCHITECTURE = "LlamaForCausalLM"
DEFAULTS = {}


def block_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The block without any addition."""
    return {"qkv_bias": False, "qk_norm": False, "sliding_window": 0}


def extra_values(config: BackboneConfig) -> dict[str, Any]:
    """None."""
    return {}
