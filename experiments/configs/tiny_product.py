"""The tiny backbone with the memory of Lamini's product, as its documentation describes it: 2 experts of 65,536."""

from lamini_jax.config import Config, product_memory, to_config_dict


def get_config():
    return to_config_dict(Config(memory=product_memory()))
