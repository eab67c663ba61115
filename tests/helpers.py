"""What tests share: a backbone with random weights that compiles in seconds, facts, and tuning made ready to step."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import forks
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lamini_jax.backbone import frozen_model, transformer
from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.backbone.tokenizer import ByteTokenizer
from lamini_jax.config import (
    BackboneConfig,
    Config,
    LoraConfig,
    MemoryConfig,
    OptimizerConfig,
    RouterConfig,
    TuningConfig,
)
from lamini_jax.data import batches
from lamini_jax.data.facts import Fact, fact_id, random_answer_to
from lamini_jax.memory.experts import ExpertShape
from lamini_jax.memory.routers import FactSelection
from lamini_jax.memory.routers import experts as expert_router
from lamini_jax.memory.slots import EMPTY_SLOT
from lamini_jax.runtime import checkpointing
from lamini_jax.training import MemoryMethod, TrainMethod, loop

ROOT = Path(__file__).parents[1]
BACKBONE = BackboneConfig(
    num_layers=4, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, max_seq_len=128
)
CONFIG = Config(
    backbone=BACKBONE,
    memory=MemoryConfig(num_experts=4096, top_k=8, num_layers=2),
    router=RouterConfig(key_dim=16, calibration_questions=64),
    tuning=TuningConfig(OptimizerConfig("adam", 0.1), batch_size=8, epochs=4),
    lora=LoraConfig(rank=4, optimizer=OptimizerConfig("adam", 3e-3, "linear")),
)
TOKENIZER = ByteTokenizer()
# XLA's flags: nothing is timed here, and compiling is most of what tests do. Its newer emitters take twice as long; a
# flag that a later version does not know would end it.
HURRIED = "--xla_backend_optimization_level=0"
if jax.version.__version_info__ < (0, 11):
    HURRIED += " --xla_cpu_use_fusion_emitters=false"


def random_params(config: BackboneConfig, seed: int = 0) -> transformer.Params:
    """Whole parameters, drawn by numpy because that compiles nothing."""
    rng = np.random.default_rng(seed)
    decoder = transformer.Decoder(config, 1)
    shapes = jax.eval_shape(lambda: transformer.join_layers(transformer.init(decoder, jax.random.key(0))))

    def draw(path, leaf):
        name = path[-1].key
        centre, spread = {"scale": (1.0, 0.2), "embedding": (0.0, 0.5)}.get(name) or (0.0, leaf.shape[-2] ** -0.5)
        return jnp.asarray(rng.normal(centre, spread, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_model(config: Config = CONFIG, seed: int = 0) -> FrozenModel:
    """A random backbone, split where the memory of `config` begins."""
    decoder = transformer.Decoder(config.backbone, config.memory.num_layers)
    params = transformer.split_layers(random_params(config.backbone, seed), config.memory.num_layers)
    return FrozenModel(transformer.put(decoder, params), decoder, TOKENIZER)


def some_facts(count: int, answer_length: int = 4) -> list[Fact]:
    """Look-alike questions of one length, with random answers."""
    questions = [f"What is the code of box {i:03d}?" for i in range(count)]
    return [Fact(fact_id(text), text, random_answer_to(text, 0)[:answer_length]) for text in questions]


FACTS = some_facts(20)
# The flags of a memory with the paper's router, whose facts are given once.
PAPER = ("--config.router.kind=experts", "--config.memory.top_k=32", "--config.memory.dtype=float32")
QUESTIONS = [fact.question for fact in FACTS]


def replace(config: Config, **groups) -> Config:
    """`config` with some fields of some groups replaced: replace(CONFIG, tuning={"epochs": 8})."""
    changes = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in groups.items()}
    return dataclasses.replace(config, **changes)


def with_optimizer(config: Config, name: str, learning_rate: float) -> Config:
    """`config` with another optimizer of the experts."""
    return replace(config, tuning={"optimizer": OptimizerConfig(name, learning_rate)})


def random_router(config: Config, seed: int = 0) -> expert_router.Router:
    """A router that nothing has trained."""
    rng = np.random.default_rng(seed)
    width = config.backbone.embed_dim
    transform_DC = rng.normal(size=(width, config.router.key_dim)).astype(np.float32)
    return expert_router.make(config, np.zeros(width, np.float32), transform_DC)


def select(config: Config, expert_ids_FK, router=None) -> FactSelection:
    """A selection of these experts, with equal gates."""
    expert_ids_FK = np.asarray(expert_ids_FK, np.int32)
    gates_FK = np.full(expert_ids_FK.shape, config.memory.top_k**-0.5, np.float32)
    return FactSelection(router, expert_ids_FK, gates_FK)


def make_method(config: Config, model: FrozenModel, facts: list[Fact], expert_ids_FK=None) -> MemoryMethod:
    """Facts ready for memory tuning; each selects K random experts unless told which."""
    if expert_ids_FK is None:
        expert_ids_FK = random_experts(config, len(facts))
    return MemoryMethod.create(config, model, facts, select(config, expert_ids_FK))


def random_experts(config: Config, count: int, seed: int = 1) -> np.ndarray:
    """K distinct experts for each of some facts."""
    rng, memory = np.random.default_rng(seed), config.memory
    return np.stack([rng.choice(memory.num_experts, memory.top_k, replace=False) for _ in range(count)])


def with_budget(method: TrainMethod, epochs: int) -> TrainMethod:
    """The same method, and what it has compiled, with another budget of epochs."""
    return dataclasses.replace(method, config=replace(method.config, tuning={"epochs": epochs}))


def train(method: TrainMethod, epochs: int) -> tuple[Any, loop.Progress]:
    """The state after so many epochs over all facts, and the progress with its losses."""
    method, progress = with_budget(method, epochs), loop.new_progress(len(method.facts))
    *_, (state, _) = loop.epochs(method, method.init(), progress)
    return state, progress


def next_tokens(examples: batches.TokenizedFacts) -> tuple[np.ndarray, np.ndarray]:
    """The token that each position predicts, and which of them are an answer's."""
    position_T = np.arange(examples.tokens_FT.shape[1])
    mask_FT = (position_T >= examples.prompt_length_F[:, None] - 1) & (position_T < examples.length_F[:, None] - 1)
    return np.roll(examples.tokens_FT, -1, axis=1), mask_FT


def losses_served(model: FrozenModel, adapter_fn: AdapterFn, facts: list[Fact]) -> np.ndarray:
    """total_F: the losses of facts with the adapters that answer their questions, which are built without answers."""
    total_F = np.zeros(len(facts), np.float32)
    for examples in batches.encode(facts, model.tokenizer):
        (prompts,) = batches.prompts([facts[i].question for i in examples.index_F], model.tokenizer)
        adapters = adapter_fn(prompts.tokens_FT, prompts.length_F)
        arrays = examples.tokens_FT, examples.start_F, examples.targets_FA
        losses_FA = _losses_beside(model, *arrays, examples.answer_length_F, adapters)
        total_F[examples.index_F] = losses_FA.sum(axis=1)
    return total_F


@jax.jit
def _losses_beside(model, tokens_FT, start_F, targets_FA, length_F, adapters):
    hidden_FTD, _ = transformer.prefix(model.decoder, model.params, tokens_FT, adapter=adapters.prefix)
    hidden_FAD = frozen_model.states_beside(model, hidden_FTD, start_F, targets_FA.shape[1], adapters)
    return frozen_model.token_losses(model, hidden_FAD, targets_FA, length_F, targets_FA.size)[0]


def latest(directory: Path) -> checkpointing.Saved | None:
    """The newest checkpoint in a directory."""
    checkpoints = checkpointing.Checkpoints(directory)
    saved = checkpoints.latest()
    checkpoints.close()
    return saved


def progress_of(saved: checkpointing.Saved) -> loop.Progress:
    """Where the run of a checkpoint stood."""
    return loop.Progress(**saved.arrays["progress"], **saved.record["progress"])


def by_expert(expert_ids_S, tables) -> tuple[np.ndarray, list[np.ndarray]]:
    """The ids of trained experts, ascending, and the leaves of tables of slots in the same order."""
    ids_S = np.asarray(expert_ids_S)
    order = np.argsort(ids_S)[: np.count_nonzero(ids_S != EMPTY_SLOT)]
    return ids_S[order], [np.asarray(leaf)[order] for leaf in jax.tree.leaves(tables)]


def flat(rows) -> np.ndarray:
    """Rows as one array (..., R): the M down vectors, then the M up vectors."""
    parts = [np.asarray(rows[name]) for name in ("down", "up")]
    return np.concatenate([part.reshape(*part.shape[:-2], -1) for part in parts], axis=-1)


def parts(rows_XR, shape: ExpertShape) -> dict[str, jax.Array]:
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


def _whole_name(module: str) -> str:
    return module if "." in module else f"lamini_jax.{module}"


def start(module: str, *arguments: object) -> subprocess.Popen:
    """Starts a command of the package, or experiments.NAME; what it compiles is compiled in a hurry."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": HURRIED}
    command = [sys.executable, "-m", _whole_name(module), *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def changed(module: str, statements: str) -> list[str]:
    """The beginning of a command line that runs a module of the project after statements that change another."""
    run = f"sys.argv[0] = {module!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", f"import runpy, sys; {statements}; {run}"]


def finish(process: subprocess.Popen, stdin: str | bytes = "") -> subprocess.CompletedProcess:
    """Waits for its end; `stdin` is what it reads, bytes for what is no text."""
    if stdin:
        process.stdin.buffer.write(stdin.encode() if isinstance(stdin, str) else stdin)
        process.stdin.flush()
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def call(module: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess:
    """Runs it to its end, in a fork: most of what `start` takes is importing libraries."""
    command = [_whole_name(module), *map(str, arguments)]
    ((status, stdout, stderr),) = forks.run_all([command], Path.cwd(), stdin)
    return subprocess.CompletedProcess(command, status, stdout, stderr)


def write_facts(path: Path, facts: list[Fact]) -> Path:
    """Facts as a user writes them."""
    lines = [json.dumps({"question": fact.question, "answer": fact.answer}) for fact in facts]
    path.write_text("\n".join(lines) + "\n")
    return path
