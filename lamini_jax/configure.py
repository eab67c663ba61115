"""From the values of a config file to a config that every part of the package accepts."""

from typing import Any

from lamini_jax.backbone import checkpoints
from lamini_jax.config import Config, from_config_dict
from lamini_jax.data.datasets import DATASETS
from lamini_jax.errors import UserError
from lamini_jax.index import LOOKUPS
from lamini_jax.memory import experts, routers
from lamini_jax.training import optimizers


def configure(values: Any) -> Config:
    """The config in a ConfigDict, with the fields that the checkpoint at its `backbone.path` decides.

    Raises UserError for invalid values, for a name that no registry has, and for a checkpoint that contradicts a field.
    """
    config = from_config_dict(values, checkpoints.resolve)
    experts.check_target(config.memory.target)
    DATASETS[config.data.facts]
    routers.KINDS[config.router.kind]
    lookup = LOOKUPS[config.router.lookup]
    if not lookup.ALWAYS_FINDS_THE_SAME:
        raise UserError(f"--config.router.lookup={config.router.lookup}: may miss experts; it can serve but not tune")
    lookup.check(config.memory.num_experts, config.router.key_dim)
    for field in ("tuning", "lora", "full"):
        optimizers.check(getattr(config, field).optimizer, f"{field}.optimizer")
    return config
