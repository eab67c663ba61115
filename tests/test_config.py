"""A config survives its trip through absl and JSON, and one that makes no sense is refused by name."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from lamini_jax import config as config_lib
from lamini_jax.config import (
    BackboneConfig,
    Config,
    LoraConfig,
    MemoryConfig,
    RouterConfig,
    TuningConfig,
    from_config_dict,
    to_config_dict,
)
from lamini_jax.errors import UserError


@pytest.mark.parametrize("memory", [config_lib.paper_memory(), config_lib.product_memory(target="o_proj")])
def test_round_trip(memory):
    config = Config(memory=memory, seed=7)
    assert from_config_dict(to_config_dict(config)) == config
    assert from_config_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_overridden_field_arrives():
    values = to_config_dict(config_lib.tiny())
    values.memory.num_experts = 65_536
    assert from_config_dict(values).memory == MemoryConfig(num_experts=65_536)


def test_config_files_agree_with_their_presets():
    """A command without `--config` runs what `experiments/configs/tiny.py` spells out."""
    tiny_file = Path(__file__).parents[1] / "experiments" / "configs" / "tiny.py"
    for file in (tiny_file, config_lib.__file__):
        assert from_config_dict(runpy.run_path(str(file))["get_config"]()) == config_lib.tiny()


@pytest.mark.parametrize(
    "config, name",
    [
        (Config(memory=MemoryConfig(num_experts=8, selected=9)), "memory.selected"),
        (Config(memory=MemoryConfig(selected=0)), "memory.selected"),
        (Config(memory=MemoryConfig(layers=5)), "memory.layers"),
        (Config(memory=MemoryConfig(layers=4)), "memory.layers"),
        (Config(memory=MemoryConfig(target="q_proj")), "memory.target"),
        (Config(router=RouterConfig(lookup="nearest")), "router.lookup"),
        (Config(router=RouterConfig(lookup="approximate")), "router.lookup"),
        (Config(router=RouterConfig(lookup="product", key_width=63)), "router.key_width"),
        (Config(memory=MemoryConfig(num_experts=2**19), router=RouterConfig(lookup="product")), "memory.num_experts"),
        (Config(router=RouterConfig(ridge=0.0)), "router.ridge"),
        (Config(router=RouterConfig(calibration=0)), "router.calibration"),
        (Config(tuning=TuningConfig(optimizer="adamw")), "tuning.optimizer"),
        (Config(tuning=TuningConfig(learning_rate=float("nan"))), "tuning.learning_rate"),
        (Config(tuning=TuningConfig(epochs=0)), "tuning.epochs"),
        (Config(lora=LoraConfig(rank=0)), "lora.rank"),
        (Config(backbone=BackboneConfig(num_heads=4, num_kv_heads=3)), "backbone.num_kv_heads"),
        (Config(backbone=BackboneConfig(dtype="float16")), "backbone.dtype"),
        (Config(seed=-1), "seed"),
    ],
)
def test_nonsense_is_refused(config, name):
    with pytest.raises(UserError, match=f"--config.{name}="):
        from_config_dict(to_config_dict(config))


@pytest.mark.parametrize("path", [("nope",), ("memory", "nope")])
def test_unknown_field_is_refused(path):
    values = dataclasses.asdict(config_lib.tiny())
    group = values
    for name in path[:-1]:
        group = group[name]
    group[path[-1]] = 1
    with pytest.raises(UserError, match=rf"config\.{'.'.join(path)}: no such field"):
        from_config_dict(values)
