"""All settings of a run, as frozen dataclasses, and presets that name useful sets of them.

A config file (`experiments/configs/*.py`) defines `get_config()`, which returns `to_config_dict(some_preset())`;
the command line overrides single fields of it (`--config.memory.num_experts=65536`), and `from_config_dict` turns
the result back into the frozen, checked form that the rest of the package takes.

All groups except `execution` decide the results of a run: without the path of the backbone, they are its `identity`.
`execution` says how a run is carried out, and may change when a run is continued, for example on other devices. Names
of entries of a registry (a target, a lookup, a router, a data set, an optimizer) are checked by that registry.
"""

import dataclasses
import math
import operator
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import ml_collections

from lamini_jax.errors import UserError

# A token whose loss is below this has a probability above 1/2, so greedy decoding must choose it.
CERTIFIED_LOSS = math.log(2)
# The same in bfloat16, whose logits near 16 to 32 are 0.125 apart: a logit margin of 0.25.
CERTIFIED_LOSS_BFLOAT16 = 0.576

Dtype = Literal["float32", "bfloat16"]
# Bounds that a field's metadata may name -> (the comparison that must hold, the words for it in a message).
_BOUNDS = {
    "at_least": (operator.ge, "must be at least"),
    "above": (operator.gt, "must be above"),
    "at_most": (operator.le, "must be at most"),
}


def _number(default: float, **bounds: float) -> Any:
    """A field with a number within bounds; NaN and infinities are never allowed."""
    return dataclasses.field(default=default, metadata=bounds)


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """A Llama-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    With a `path`, all fields except `system`, `max_seq_len` and `dtype` are read from the checkpoint there.
    """

    path: str = ""  # a directory in Hugging Face format, a name on its Hub, or a GGUF file; empty: the one that ships
    system: str = ""  # the chat template's system message, before every question, in training too; empty: none
    family: str = "llama"  # the model_type in a checkpoint's config.json; a module of backbone/checkpoints/families
    vocab_size: int = _number(256, at_least=1)
    num_layers: int = _number(4, at_least=2)
    embed_dim: int = _number(128, at_least=1)
    num_heads: int = _number(4, at_least=1)
    num_kv_heads: int = _number(2, at_least=1)
    head_dim: int = _number(32, at_least=2)
    mlp_dim: int = _number(384, at_least=1)
    max_seq_len: int = _number(256, at_least=1)  # tokens of a prompt and its answer, and the length of the cache
    rope_theta: float = _number(10_000.0, above=0)
    rope_scaling: Literal["none", "linear", "llama3"] = "none"  # of the rotary frequencies
    rope_factor: float = _number(1.0, above=0)
    # llama3: a frequency with fewer turns within the original length is divided, one with more turns is kept
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_seq_len: int = _number(8192, at_least=1)
    sliding_window: int = _number(0, at_least=0)  # tokens that a token attends to, itself included; 0: all before it
    norm_eps: float = _number(1e-5, at_least=0)
    tied_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False  # a norm of each head's queries and keys
    dtype: Dtype = "float32"  # of weights and multiplications; sums are always float32


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """N experts, K of them selected per question, each a rank-1 LoRA on `target` in the last `num_layers` layers."""

    num_experts: int = _number(2**20, at_least=1)
    top_k: int = _number(32, at_least=1)
    num_layers: int = _number(2, at_least=1)
    target: str = "down_proj"  # a linear layer of a block
    # Where experts act: from the position that predicts the answer's first token on, or on the question's tokens too.
    positions: Literal["answer", "all"] = "answer"
    dtype: Dtype = "float32"  # of the experts; their optimizer computes in float32


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How a question becomes a query and a query becomes experts."""

    kind: str = "experts"  # a module of memory/routers
    # Of the kind `facts`: the share of look-alike questions that may be taken for stored ones. Those of the training of
    # a scope are harder than most: at 0.02, 0.5% of the near neighbours in a public set fired, and 88% of rephrasings.
    false_fires: float = _number(0.02, above=0, at_most=1)
    layer: int = _number(0, at_least=0)  # whose output becomes the query; 0: a fifth of all layers, at least two
    lookup: str = "exact"  # a module of index
    key_dim: int = _number(64, at_least=1)
    ridge: float = _number(1e-3, above=0)  # of the whitening, relative to the largest variance
    learning_rate: float = _number(1e-3, at_least=0)  # of the one epoch in which the query projection is trained
    # Generated questions that whiten and train the router, in addition to the facts' questions.
    calibration_questions: int = _number(4096, at_least=2)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer of training/optimizers.py with its settings."""

    name: str = "adafactor"
    learning_rate: float = _number(4e-2, above=0)
    schedule: Literal["constant", "linear"] = "constant"  # linear: falls to zero at the end of the budget of epochs


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """Memory tuning: the optimizer of the selected experts. All training methods use `epochs` and `batch_size`."""

    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: int = _number(100, at_least=1)
    batch_size: int = _number(16, at_least=1)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The baseline of the paper (appendix A): one LoRA of this rank on every linear layer."""

    rank: int = _number(32, at_least=1)
    # Falls to zero: at a constant rate that is high enough to memorize, training diverges once losses are near zero.
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=4e-3, schedule="linear")


@dataclasses.dataclass(frozen=True)
class FullConfig:
    """The other baseline: all weights of the backbone are tuned."""

    optimizer: OptimizerConfig = OptimizerConfig("adam", learning_rate=1e-3)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which facts a study tunes on."""

    facts: str = "world"  # a module of data/datasets
    count: int = _number(128, at_least=1)
    dir: str = ""  # where the files of truthful_qa are; empty: downloaded


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1: all devices that the other axis leaves."""

    data: int = -1  # devices among which experts, facts and batches are divided
    model: int = 1  # devices among which the backbone's layers and the columns of experts are divided


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How a run is carried out. Other values change no result, except that sums may be rounded in another order."""

    mesh: MeshConfig = MeshConfig()
    # Memory of each device for the facts' prefix activations; what exceeds it stays on the host.
    cache_gb: float = _number(4.0, at_least=0)
    remat: bool = False  # compute the suffix's activations a second time instead of keeping them
    reading_batch: int = _number(64, at_least=1)  # questions that are read or answered in one batch


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    backbone: BackboneConfig = BackboneConfig()
    memory: MemoryConfig = MemoryConfig()
    router: RouterConfig = RouterConfig()
    tuning: TuningConfig = TuningConfig()
    lora: LoraConfig = LoraConfig()
    full: FullConfig = FullConfig()
    data: DataConfig = DataConfig()
    execution: ExecutionConfig = ExecutionConfig()
    seed: int = _number(0, at_least=0, at_most=2**32 - 1)


def identity(config: Config) -> dict[str, Any]:
    """The settings that decide the results of a run: all but how it is carried out and where the weights are."""
    values = dataclasses.asdict(config)
    del values["execution"], values["backbone"]["path"], values["router"]["false_fires"]
    if config.router.kind == "facts":  # each fact may be tuned in another way
        del values["tuning"], values["lora"], values["full"], values["data"], values["memory"]["top_k"]
        values["router"] = {name: values["router"][name] for name in ("kind", "layer")}
    return values


def certified_loss(dtype: str) -> float:
    """If every token's loss is below this, greedy decoding returns the answer (bfloat16 needs a wider margin)."""
    return CERTIFIED_LOSS if dtype == "float32" else CERTIFIED_LOSS_BFLOAT16


def paper_memory(**overrides: Any) -> MemoryConfig:
    """The paper's memory: 32 experts of a million, which act on all tokens (section 7.1)."""
    return MemoryConfig(**{"num_experts": 2**20, "top_k": 32, "positions": "all", **overrides})


def product_memory(**overrides: Any) -> MemoryConfig:
    """The memory of Lamini's product, as its documentation describes it: 2 experts of 65,536."""
    return MemoryConfig(**{"num_experts": 2**16, "top_k": 2, "positions": "all", **overrides})


def facts(backbone: BackboneConfig = BackboneConfig()) -> Config:
    """A memory for facts of one's own: each has two experts, which no other fact has as long as some are free."""
    memory = MemoryConfig(num_experts=2**20, top_k=2, dtype="bfloat16")
    return Config(backbone=backbone, memory=memory, router=RouterConfig(kind="facts"))


def tiny() -> Config:
    """The backbone that ships with the package, with the paper's memory."""
    return Config(memory=paper_memory())


def router_layer(config: Config) -> int:
    """The layer whose output the router reads: early ones tell questions apart that later ones take for the same."""
    layers = config.backbone.num_layers
    return config.router.layer or min(max(2, round(layers / 5)), layers - config.memory.num_layers)


LLAMA3_8B = BackboneConfig(
    vocab_size=128_256,
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
    max_seq_len=1024,  # of 8,192: facts are short, so the cache of keys and values can be short too
    rope_theta=500_000.0,
    tied_embeddings=False,
    dtype="bfloat16",
)
LLAMA3_70B = dataclasses.replace(LLAMA3_8B, num_layers=80, embed_dim=8192, num_heads=64, mlp_dim=28_672)


def large(backbone: BackboneConfig, num_experts: int) -> Config:
    """Memory for a large backbone on a pod of TPUs, with each layer divided among 16 chips.

    Experts are on `down_proj`, which memorizes in the fewest epochs, of the last four layers. They take most of the
    space: for Llama 3 8B 147 kB each in bfloat16, so that 2^24 of them take 9.7 GB on each of 256 chips. For every
    float of the experts that facts have selected Adafactor keeps one number; Adam would keep two.
    """
    return Config(
        backbone=backbone,
        memory=paper_memory(num_experts=num_experts, num_layers=4, dtype="bfloat16"),
        tuning=TuningConfig(batch_size=256),
        data=DataConfig(facts="phone_book", count=32_768),
        execution=ExecutionConfig(mesh=MeshConfig(data=-1, model=16), remat=True),
    )


def one_accelerator(path: str) -> Config:
    """A checkpoint in Hugging Face format with a million experts, on one accelerator of 141 GB or on several.

    Experts are on `down_proj` of the last two layers. With 7 or 8 billion parameters, weights are 16 GB, experts 77 GB.
    """
    return Config(
        backbone=BackboneConfig(path=path, max_seq_len=1024, dtype="bfloat16"),
        memory=MemoryConfig(dtype="bfloat16"),
        tuning=TuningConfig(batch_size=64),
        data=DataConfig(facts="phone_book", count=1024),
        execution=ExecutionConfig(cache_gb=16.0, remat=True),
    )


def small(path: str) -> Config:
    """A checkpoint of a few hundred million parameters on a laptop, which has no room for a million of its experts.

    Eight memory layers with Adam, because answers of random characters need depth (`experiments.memory_sweep`).
    """
    return Config(
        backbone=BackboneConfig(path=path),
        memory=MemoryConfig(num_experts=2**14, num_layers=8),
        router=RouterConfig(calibration_questions=2048),
        tuning=TuningConfig(OptimizerConfig("adam", 2e-2), epochs=30),
        data=DataConfig(facts="truthful_qa", count=64),
    )


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The config as a ConfigDict, whose fields absl's config flags can override."""
    return ml_collections.ConfigDict(dataclasses.asdict(config))


def from_config_dict(values: Any, resolve: Callable[[BackboneConfig], BackboneConfig] | None = None) -> Config:
    """The Config in a ConfigDict or in a saved config's JSON. Raises UserError if it is invalid.

    `resolve` fills in what the checkpoint at `backbone.path` decides (`backbone.checkpoints.resolve`).
    """
    config = _build(Config, dict(values), "config")
    if resolve and config.backbone.path:
        config = dataclasses.replace(config, backbone=resolve(config.backbone))
    backbone, memory = config.backbone, config.memory
    _require(memory.top_k <= memory.num_experts, "memory.top_k", memory.top_k, "must be at most memory.num_experts")
    fits = memory.num_layers < backbone.num_layers
    _require(fits, "memory.num_layers", memory.num_layers, "must be below backbone.num_layers")
    _require(
        config.router.layer <= backbone.num_layers - memory.num_layers,
        "router.layer",
        config.router.layer,
        "must be below the memory's layers",
    )
    divides = backbone.num_heads % backbone.num_kv_heads == 0
    _require(divides, "backbone.num_kv_heads", backbone.num_kv_heads, "must divide backbone.num_heads")
    return config


def ranges(cls: type = Config, prefix: str = "") -> dict[str, str]:
    """By dotted name, the rule for the values of each field that does not allow every value of its type."""
    found = {}
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            found |= ranges(field.type, f"{name}.")
        elif typing.get_origin(field.type) is Literal:
            found[name] = f"must be one of {', '.join(typing.get_args(field.type))}"
        elif field.metadata:
            found[name] = " and ".join(f"{_BOUNDS[bound][1]} {value}" for bound, value in field.metadata.items())
    return found


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise UserError(f"{path}.{name}: no such field; {path} has {', '.join(fields)}")
    parts = {name: _value(fields[name], value, f"{path}.{name}") for name, value in values.items()}
    return cls(**parts)


def _value(field: dataclasses.Field, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(field.type):
        return _build(field.type, dict(value), path)
    name, choices = path.removeprefix("config."), typing.get_args(field.type)
    value = value if choices else field.type(value)
    _require(not choices or value in choices, name, value, f"must be one of {', '.join(choices)}")
    if field.type is float:
        _require(math.isfinite(value), name, value, "must be a finite number")
    if field.type is int and "at_most" not in field.metadata:
        _require(value < 2**31, name, value, "must be below 2147483648")  # arrays have no longer axes
    for bound, limit in field.metadata.items():
        compares, rule = _BOUNDS[bound]
        _require(compares(value, limit), name, value, f"{rule} {limit}")
    return value


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise UserError(f"--config.{name}={value}: {rule}")


def get_config() -> ml_collections.ConfigDict:
    """This file is also a config file: the one that commands use when no `--config` is given."""
    return to_config_dict(facts())
