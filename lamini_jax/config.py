"""Every number that a run depends on, as frozen dataclasses, and the presets that name useful sets of them.

A config file (`experiments/configs/*.py`) defines `get_config()`, which returns `to_config_dict(some_preset())`;
the command line overrides single fields of it (`--config.memory.num_experts=65536`), and `from_config_dict` turns
the result back into the frozen, checked form that the rest of the package takes.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ml_collections

from lamini_jax.errors import UserError

# A token whose loss is below this has a probability above 1/2, so greedy decoding must choose it.
CERTIFIED_LOSS = math.log(2)
# The same in bfloat16, whose logits near 16 to 32 are 0.125 apart: a logit margin of 0.25.
CERTIFIED_LOSS_BFLOAT16 = 0.576

TARGETS = ("o_proj", "down_proj")
LOOKUPS = ("exact", "product")  # those that always find the same experts, which training needs
DTYPES = ("float32", "bfloat16")
ROPE_SCALINGS = ("none", "linear", "llama3")
OPTIMIZERS = ("adafactor", "adam", "sgd")


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """A Llama-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    With a `path`, all of it but `context` and `dtype` is read from the checkpoint there (`hf.py`).
    """

    path: str = ""  # a directory in Hugging Face format, or a name on its Hub; empty: the backbone that ships
    vocab_size: int = 256
    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_width: int = 32
    mlp_width: int = 384
    context: int = 256  # tokens of a prompt and its answer, and the length of the cache
    rope_theta: float = 10_000.0
    rope_scaling: str = "none"  # of the rotary frequencies: none, linear or llama3
    rope_factor: float = 1.0
    rope_low: float = 1.0  # llama3: turns within the original context below which a frequency is divided by the factor,
    rope_high: float = 4.0  # and above which it stays
    rope_original_context: int = 8192
    sliding_window: int = 0  # tokens that a token sees, itself included; 0: all before it
    norm_eps: float = 1e-5
    tied_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False  # of each head's queries and keys
    dtype: str = "float32"  # of the multiplications; sums are float32 always


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """N experts, K of them selected per question, each a rank-1 LoRA on `target` in the last `layers` layers."""

    num_experts: int = 2**20
    selected: int = 32
    layers: int = 2
    target: str = "down_proj"
    dtype: str = "float32"  # of the rows; their optimizer computes in float32


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How a question becomes a query and a query becomes experts."""

    lookup: str = "exact"
    key_width: int = 64
    ridge: float = 1e-3  # of the whitening, relative to the largest variance
    learning_rate: float = 1e-3  # of the one epoch in which the query projection is trained
    calibration: int = 4096  # questions of the generated world that whiten and train, beside the facts' own


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """Memory tuning: the optimizer of the selected rows, and the budget."""

    optimizer: str = "adafactor"
    learning_rate: float = 4e-2
    epochs: int = 100
    batch_size: int = 16
    cache_gb: float = 4.0  # of each device for the facts' prefix activations; what is over stays on the host
    rematerialize: bool = False  # compute the suffix's activations a second time instead of keeping them


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The baseline of the paper (appendix A): one LoRA of this rank on every linear layer."""

    rank: int = 32
    optimizer: str = "adafactor"
    learning_rate: float = 4e-3


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which facts a study tunes on."""

    facts: str = "world"  # world, phone_book or truthful_qa
    count: int = 128
    dir: str = ""  # where the files of truthful_qa are; empty: downloaded


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1: what the other leaves."""

    data: int = -1  # experts, facts and batches are divided among these
    model: int = 1  # the backbone's layers and the columns of rows are


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    backbone: BackboneConfig = BackboneConfig()
    memory: MemoryConfig = MemoryConfig()
    router: RouterConfig = RouterConfig()
    tuning: TuningConfig = TuningConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


def paper_memory(**overrides: Any) -> MemoryConfig:
    """The paper's memory: 32 experts of a million (section 7.1)."""
    return MemoryConfig(**{"num_experts": 2**20, "selected": 32, **overrides})


def product_memory(**overrides: Any) -> MemoryConfig:
    """The memory of Lamini's product, as its documentation describes it: 2 experts of 65,536."""
    return MemoryConfig(**{"num_experts": 2**16, "selected": 2, **overrides})


def tiny() -> Config:
    """The backbone that ships with the package, with the paper's memory."""
    return Config(memory=paper_memory())


LLAMA3_8B = BackboneConfig(
    vocab_size=128_256,
    num_layers=32,
    width=4096,
    num_heads=32,
    num_kv_heads=8,
    head_width=128,
    mlp_width=14_336,
    context=1024,  # of the 8,192: facts are short, and the cache of keys and values need not be long
    rope_theta=500_000.0,
    tied_embeddings=False,
    dtype="bfloat16",
)
LLAMA3_70B = dataclasses.replace(LLAMA3_8B, num_layers=80, width=8192, num_heads=64, mlp_width=28_672)


def large(backbone: BackboneConfig, num_experts: int) -> Config:
    """Memory for a large backbone on a pod of TPUs, whose chips divide each layer among 16 of them.

    On `down_proj`, which memorizes in the fewest epochs, of the last four layers: rows in bfloat16 are then the bill,
    for Llama 3 8B 147 kB each, and 2^24 of them 9.7 GB on each of 256 chips. Adafactor keeps one number per float of
    the rows that facts have selected, Adam would keep two.
    """
    return Config(
        backbone=backbone,
        memory=paper_memory(num_experts=num_experts, layers=4, dtype="bfloat16"),
        tuning=TuningConfig(batch_size=256, rematerialize=True),
        data=DataConfig(facts="phone_book", count=32_768),
        mesh=MeshConfig(data=-1, model=16),
    )


def one_accelerator(path: str) -> Config:
    """A checkpoint in Hugging Face format beside a million experts, on one accelerator of 141 GB or on several.

    On `down_proj` of the last two layers. For 7 or 8 billion parameters that is 16 GB of weights and 77 GB of rows.
    """
    return Config(
        backbone=BackboneConfig(path=path, context=1024, dtype="bfloat16"),
        memory=paper_memory(dtype="bfloat16"),
        tuning=TuningConfig(batch_size=64, cache_gb=16.0, rematerialize=True),
        data=DataConfig(facts="phone_book", count=1024),
    )


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The form that absl's config flags can override."""
    return ml_collections.ConfigDict(dataclasses.asdict(config))


def from_config_dict(values: Any, resolve: Callable[[BackboneConfig], BackboneConfig] | None = None) -> Config:
    """The frozen form of a ConfigDict or of a saved config's JSON. Raises UserError if it makes no sense.

    `resolve` fills in what the checkpoint at `backbone.path` decides (`model.configure`).
    """
    config = _build(Config, dict(values), "config")
    if resolve and config.backbone.path:
        config = dataclasses.replace(config, backbone=resolve(config.backbone))
    _check(config)
    return config


def _build(cls, values, path):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise UserError(f"{path}.{name}: no such field; {path} has {', '.join(fields)}")
    kwargs = {}
    for name, value in values.items():
        kind = fields[name].type
        kwargs[name] = _build(kind, dict(value), f"{path}.{name}") if dataclasses.is_dataclass(kind) else kind(value)
    return cls(**kwargs)


def _check(config: Config) -> None:
    backbone, memory, product = config.backbone, config.memory, config.router.lookup == "product"
    checks = (
        (memory.num_experts >= 1, "memory.num_experts", "must be at least 1"),
        (1 <= memory.selected <= memory.num_experts, "memory.selected", "must be between 1 and memory.num_experts"),
        (memory.target in TARGETS, "memory.target", f"must be one of {', '.join(TARGETS)}"),
        (1 <= memory.layers < backbone.num_layers, "memory.layers", "must be at least 1 and below backbone.num_layers"),
        (backbone.num_heads % backbone.num_kv_heads == 0, "backbone.num_kv_heads", "must divide backbone.num_heads"),
        (backbone.rope_scaling in ROPE_SCALINGS, "backbone.rope_scaling", f"must be one of {', '.join(ROPE_SCALINGS)}"),
        (backbone.dtype in DTYPES, "backbone.dtype", f"must be one of {', '.join(DTYPES)}"),
        (memory.dtype in DTYPES, "memory.dtype", f"must be one of {', '.join(DTYPES)}"),
        (config.router.lookup in LOOKUPS, "router.lookup", f"must be one of {', '.join(LOOKUPS)}"),
        (config.router.key_width >= 1, "router.key_width", "must be at least 1"),
        (not product or config.router.key_width % 2 == 0, "router.key_width", "must be even for product keys"),
        (
            not product or math.isqrt(memory.num_experts) ** 2 == memory.num_experts,
            "memory.num_experts",
            "must be a square for product keys",
        ),
        (config.router.calibration >= 2, "router.calibration", "must be at least 2"),
        (0 < config.router.ridge < math.inf, "router.ridge", "must be positive"),
        (0 <= config.router.learning_rate < math.inf, "router.learning_rate", "must not be negative"),
        (config.tuning.optimizer in OPTIMIZERS, "tuning.optimizer", f"must be one of {', '.join(OPTIMIZERS)}"),
        (0 < config.tuning.learning_rate < math.inf, "tuning.learning_rate", "must be positive"),
        (config.lora.optimizer in OPTIMIZERS, "lora.optimizer", f"must be one of {', '.join(OPTIMIZERS)}"),
        (0 < config.lora.learning_rate < math.inf, "lora.learning_rate", "must be positive"),
        (config.tuning.epochs >= 1, "tuning.epochs", "must be at least 1"),
        (0 <= config.tuning.cache_gb < math.inf, "tuning.cache_gb", "must not be negative"),
        (config.tuning.batch_size >= 1, "tuning.batch_size", "must be at least 1"),
        (config.data.count >= 1, "data.count", "must be at least 1"),
        (config.lora.rank >= 1, "lora.rank", "must be at least 1"),
        (config.seed >= 0, "seed", "must not be negative"),
    )
    for holds, name, rule in checks:
        if not holds:
            value = config
            for part in name.split("."):
                value = getattr(value, part)
            raise UserError(f"--config.{name}={value}: {rule}")


def get_config() -> ml_collections.ConfigDict:
    """This file is a config file too: the one that commands take when no `--config` is given."""
    return to_config_dict(tiny())
