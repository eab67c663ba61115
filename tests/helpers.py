"""What tests share: a backbone with random weights that compiles in seconds, facts, and tuning made ready to step."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lamini_jax import backbone, bank, model, router, row_optimizer, tuning
from lamini_jax.config import BackboneConfig, Config, LoraConfig, MemoryConfig, RouterConfig, TuningConfig
from lamini_jax.data import batches
from lamini_jax.data.facts import Fact, fact_id, random_answer_to
from lamini_jax.data.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[1]
BACKBONE = BackboneConfig(num_layers=4, width=32, num_heads=4, num_kv_heads=2, head_width=8, mlp_width=48, context=128)
CONFIG = Config(
    backbone=BACKBONE,
    memory=MemoryConfig(num_experts=4096, selected=8, layers=2),
    router=RouterConfig(key_width=16, calibration=64),
    tuning=TuningConfig(optimizer="adam", learning_rate=0.1, batch_size=8, epochs=4),
    lora=LoraConfig(rank=4, optimizer="adam", learning_rate=3e-3),
)
TOKENIZER = ByteTokenizer()


def random_params(config: BackboneConfig, seed: int = 0) -> backbone.Params:
    """Whole parameters, drawn by numpy because that compiles nothing."""
    rng = np.random.default_rng(seed)
    decoder = backbone.Decoder(config, 1)
    shapes = jax.eval_shape(lambda: backbone.join(backbone.init(decoder, jax.random.key(0))))

    def draw(path, leaf):
        name = path[-1].key
        centre, spread = {"scale": (1.0, 0.2), "embedding": (0.0, 0.5)}.get(name) or (0.0, leaf.shape[-2] ** -0.5)
        return jnp.asarray(rng.normal(centre, spread, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_base(config: Config = CONFIG, seed: int = 0) -> model.Base:
    """A random backbone, cut where the memory of `config` begins."""
    decoder = backbone.Decoder(config.backbone, config.memory.layers)
    params = backbone.put(decoder, backbone.cut(random_params(config.backbone, seed), config.memory.layers))
    return model.Base(decoder, params, TOKENIZER)


def some_facts(count: int, answer_length: int = 4) -> list[Fact]:
    """Look-alike questions of one length, with random answers."""
    questions = [f"What is the code of box {i:03d}?" for i in range(count)]
    return [Fact(fact_id(text), text, random_answer_to(text, 0)[:answer_length]) for text in questions]


FACTS = some_facts(20)


def replace(config: Config, **groups) -> Config:
    """`config` with some fields of some groups replaced: replace(CONFIG, tuning={"epochs": 8})."""
    changes = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in groups.items()}
    return dataclasses.replace(config, **changes)


def random_router(config: Config, seed: int = 0) -> router.Router:
    """A router that nothing has trained."""
    rng = np.random.default_rng(seed)
    width = config.backbone.width
    transform_DC = rng.normal(size=(width, config.router.key_width)).astype(np.float32)
    return router.make(config, np.zeros(width, np.float32), transform_DC)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Everything that a step of memory tuning takes."""

    config: Config
    base: model.Base
    shape: bank.RowShape
    expert_ids_FK: np.ndarray
    slots_FK: np.ndarray
    tx: object
    method: tuning.Method
    facts: tuning.Facts

    def fresh_state(self) -> tuning.MemoryState:
        """The state before any step: a step takes its state's memory over, so everyone needs one of their own."""
        num_experts = self.config.memory.num_experts
        ids_S, _ = row_optimizer.slots_of(self.expert_ids_FK, num_experts)
        rows_NR = bank.init(np.uint32(2), self.shape, num_experts)
        return tuning.MemoryState(rows_NR, row_optimizer.init(self.tx, ids_S, self.shape))


def make_tuning(config: Config, base: model.Base, facts: list[Fact], expert_ids_FK=None, **options) -> Tuning:
    """Facts made ready for tuning; each selects K random experts unless told which. `options` are of the buckets."""
    memory = config.memory
    if expert_ids_FK is None:
        rng = np.random.default_rng(1)
        expert_ids_FK = np.stack([rng.choice(memory.num_experts, memory.selected, replace=False) for _ in facts])
    ids_S, slots_FK = row_optimizer.slots_of(expert_ids_FK, memory.num_experts)
    touched = row_optimizer.most_touched(slots_FK, ids_S.size, config.tuning.batch_size)
    shape = bank.row_shape(config.backbone, memory)
    tx = row_optimizer.make(config.tuning.optimizer, config.tuning.learning_rate)
    method = tuning.memory_method(base.decoder, shape, memory.target, tx, touched)
    examples = batches.encode(facts, base.tokenizer)
    prepared = tuning.Facts(examples, tuning.memory_buckets(base, examples, expert_ids_FK, slots_FK, **options))
    return Tuning(config, base, shape, expert_ids_FK, slots_FK, tx, method, prepared)


def flat(rows) -> np.ndarray:
    """Rows as one array (..., R): the M down vectors, then the M up vectors."""
    parts = [np.asarray(rows[name]) for name in ("down", "up")]
    return np.concatenate([part.reshape(*part.shape[:-2], -1) for part in parts], axis=-1)


def parts(rows_XR, shape: bank.RowShape) -> dict[str, jax.Array]:
    """The inverse of `flat`."""
    cut = shape.layers * shape.input_width
    split = {"down": rows_XR[..., :cut], "up": rows_XR[..., cut:]}
    leading = rows_XR.shape[:-1]
    return {name: jnp.asarray(split[name]).reshape(part) for name, part in shape.parts(*leading).items()}


def same_bits(a, b) -> bool:
    """Whether two pytrees have the same structure and leaves that are equal bit for bit (-0 is not 0, NaN is NaN)."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(_bits(x) == _bits(y) for x, y in pairs)


def _bits(x):
    x = np.asarray(x)
    return x.dtype, x.shape, x.tobytes()


def compilations(caplog) -> list[str]:
    """The names of what was compiled under `jax.log_compiles()`, in order."""
    messages = [record.getMessage() for record in caplog.records]
    return [message.split()[1] for message in messages if message.startswith("Compiling ")]


def without_flags(name: str) -> ModuleType:
    """A command's module without its flags: two commands in one process would define the same ones."""
    known = set(flags.FLAGS)
    module = importlib.import_module(name)
    for flag in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, flag)
    return module


def start(module: str, *arguments: object) -> subprocess.Popen:
    """Starts a command of the package, or experiments.NAME; what it compiles is compiled in a hurry."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    module = module if "." in module else f"lamini_jax.{module}"
    command = [sys.executable, "-m", module, *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def finish(process: subprocess.Popen, stdin: str | bytes = "") -> subprocess.CompletedProcess:
    """Waits for its end; `stdin` is what it reads, bytes for what is no text."""
    if stdin:
        process.stdin.buffer.write(stdin.encode() if isinstance(stdin, str) else stdin)
        process.stdin.flush()
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def call(module: str, *arguments: object, stdin: str | bytes = "") -> subprocess.CompletedProcess:
    """Runs it to its end."""
    return finish(start(module, *arguments), stdin)


def write_facts(path: Path, facts: list[Fact]) -> Path:
    """Facts as a user writes them."""
    lines = [json.dumps({"question": fact.question, "answer": fact.answer}) for fact in facts]
    path.write_text("\n".join(lines) + "\n")
    return path
