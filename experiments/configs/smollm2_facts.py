"""SmolLM2 135M Instruct with a memory for facts of one's own (`lamini_jax.config.facts`)."""

from lamini_jax.backbone import smollm2
from lamini_jax.config import BackboneConfig, facts, to_config_dict


def get_config():
    return to_config_dict(facts(BackboneConfig(path=smollm2.path())))
