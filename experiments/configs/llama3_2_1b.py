"""Llama 3.2 1B, or the checkpoint that --config.backbone.path names (`lamini_jax.config.one_accelerator`)."""

from lamini_jax.config import one_accelerator, to_config_dict


def get_config():
    return to_config_dict(one_accelerator("meta-llama/Llama-3.2-1B-Instruct"))
