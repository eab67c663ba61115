"""SmolLM2 135M Instruct with the memory of the paper's studies (`lamini_jax.config.small`)."""

from lamini_jax.backbone import smollm2
from lamini_jax.config import small, to_config_dict


def get_config():
    return to_config_dict(small(smollm2.path()))
