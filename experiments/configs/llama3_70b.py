"""Llama 3 70B with 2^24 experts. For a v5p:4x4x8 or more (`lamini_jax.config.large`)."""

from lamini_jax.config import LLAMA3_70B, large, to_config_dict


def get_config():
    return to_config_dict(large(LLAMA3_70B, 2**24))
