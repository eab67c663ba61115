"""Llama 3 8B on one accelerator; `llama3_8b.py` is for slices and clusters (`lamini_jax.config.one_accelerator`)."""

from lamini_jax.config import one_accelerator, to_config_dict


def get_config():
    return to_config_dict(one_accelerator("meta-llama/Meta-Llama-3-8B-Instruct"))
