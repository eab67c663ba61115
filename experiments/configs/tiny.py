"""The backbone that ships with the package, with the paper's memory: 32 experts of a million."""

from lamini_jax.config import tiny, to_config_dict


def get_config():
    return to_config_dict(tiny())
