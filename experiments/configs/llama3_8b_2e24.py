"""Llama 3 8B with 2^24 experts. For a v5e:16x16 or more (`lamini_jax.config.large`)."""

from lamini_jax.config import LLAMA3_8B, large, to_config_dict


def get_config():
    return to_config_dict(large(LLAMA3_8B, 2**24))
