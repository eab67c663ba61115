"""Mistral (arXiv 2310.06825): a token attends only to those within a window before it."""

from collections.abc import Mapping
from typing import Any

from lamini_jax.config import BackboneConfig

ARCHITECTURE = "MistralForCausalLM"
DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}


def block_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The window, if there is one."""
    return {"qkv_bias": False, "qk_norm": False, "sliding_window": values["sliding_window"] or 0}


def extra_values(config: BackboneConfig) -> dict[str, Any]:
    """The window; null says that there is none, while a missing key means the default."""
    return {"sliding_window": config.sliding_window or None}
