"""Mistral 7B, or the checkpoint that --config.backbone.path names (`lamini_jax.config.one_accelerator`)."""

from lamini_jax.config import one_accelerator, to_config_dict


def get_config():
    return to_config_dict(one_accelerator("mistralai/Mistral-7B-Instruct-v0.3"))
