"""Families of models with our block: one module each, named as the `model_type` of its config.json.

A new family whose block is the same is a new module here, and nothing else changes. It has

    ARCHITECTURE                    its class in the transformers library, for export
    DEFAULTS                        values of keys that its config.json may leave out
    block_fields(values) -> dict    qkv_bias, qk_norm and sliding_window, as its config.json says (defaults filled in)
    extra_values(config) -> dict    the inverse: keys of its config.json that not all families have, with their values
"""

from lamini_jax.runtime.registry import Registry

FAMILIES = Registry(__name__, "backbone.family")
