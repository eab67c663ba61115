"""What `export` writes: a memory, one question's experts as an ordinary LoRA adapter, or a backbone."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lamini_jax.api import Source
from lamini_jax.backbone import answering, checkpoints, linear_layers
from lamini_jax.backbone.frozen_model import Adapters
from lamini_jax.backbone.linear_layers import Adapter
from lamini_jax.config import Config, certified_loss
from lamini_jax.data import batches, facts
from lamini_jax.errors import FACTS_DO_NOT_HOLD, UserError
from lamini_jax.fact_memory import FactMemory
from lamini_jax.memories import Memory
from lamini_jax.memory import experts, routers, storage
from lamini_jax.memory.routers import FactSelection
from lamini_jax.runtime import paths
from lamini_jax.training import MemoryMethod, loop

_BASE = "base"  # the folder of an adapter with the backbone that ships
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_README = """\
---
base_model: {base}
library_name: peft
---
The {top_k} experts of one question as a LoRA adapter of rank {top_k}, for the model at `{base}`.

    peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained("{base}"), "HERE")
    vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules memory=HERE

vLLM refuses ranks above 16 unless `--max-lora-rank` allows them.
"""


def memory(source: Source, questions: str | None, output: str) -> str:
    """Writes the memory, or only the experts of the questions in a file; returns a description of what it wrote."""
    config = source.config
    tokenizer, max_seq_len = checkpoints.load_tokenizer(config.backbone), config.backbone.max_seq_len
    asked = questions and [record["question"] for record in facts.read_questions(questions, tokenizer, max_seq_len)]
    with _new_directory(output) as directory:
        loaded = source.load()
        if isinstance(loaded, FactMemory):
            return _facts(loaded, asked, directory)
        ids = None
        if asked:
            ids = routers.select_facts(loaded.model, loaded.stored.router, asked, config.memory.top_k).expert_ids_FK
        return f"{storage.save_export(directory, config, loaded.stored, ids):,} experts"


def _facts(loaded: FactMemory, asked: list[str] | None, directory: Path) -> str:
    """Writes a memory of facts, or only those of them that the questions ask for."""
    loaded.save(directory)
    if asked is None:
        return f"{len(loaded.table.contents.facts):,} facts"
    kept = {found.fact for found in loaded.find(asked)} - {None}
    copied = FactMemory(loaded.config, loaded.model, directory)
    others = [fact.id for fact in copied.table.contents.facts if fact.id not in kept]
    copied.forget(ids=others)
    return f"{len(kept):,} facts"


def peft(source: Source, question: str, output: str) -> str:
    """Writes the experts of a question in the format of the peft library; returns a description of what it wrote."""
    config = source.config
    tokenizer = checkpoints.load_tokenizer(config.backbone)
    facts.check_question(question, tokenizer, config.backbone.max_seq_len, "--question")
    if paths.is_remote(output) and not config.backbone.path:
        base = "the adapter names the path of its backbone, which is written beside it"
        raise UserError(f"--output={output}: {base}; name a directory of this machine")
    with _new_directory(output) as directory:
        loaded = source.load()
        (bucket,) = batches.prompts([question], tokenizer)
        adapters, tuned = loaded.adapter_fn(bucket.tokens_FT, bucket.length_F), ""
        if adapters.answer is adapters.suffix is None:
            raise UserError(f"{question!r}: is in no fact's scope, so that no experts answer it; ask for a stored fact")
        if adapters.answer is not None:
            adapters, epochs = _on_all_positions(loaded, question, adapters.answer)
            tuned = f"; it acts on all tokens and not on the answer's alone, and was certified so after {epochs} epochs"
        base = config.backbone.path
        if not base:  # the backbone that ships: other libraries cannot find it, so it is written too
            base = os.path.abspath(Path(output) / _BASE)
            (directory / _BASE).mkdir()
            checkpoints.export(config.backbone, directory / _BASE)
        save_peft(directory, config, adapters, base)
        rank = adapters.suffix[config.memory.target].down.shape[2]
        return f"{rank} experts as a LoRA adapter (for vLLM: --max-lora-rank {_vllm_rank(rank)}){tuned}"


class _OneQuestion(MemoryMethod):
    """Memory tuning of one fact whose experts are the only ones, so that no router selects them."""

    def adapter(self, state):
        """The model and the adapter that answer the question with this state."""
        rows_1KR = jax.tree.map(lambda x: x[None], state.experts_NR)
        adapter = experts.adapter(rows_1KR, self.selection.gates_FK, self.config.memory.target)
        return self.model, answering.same_for_all(suffix=adapter)


def _on_all_positions(loaded: Memory, question: str, adapter: Adapter) -> tuple[Adapters, int]:
    """The experts of a question, tuned until its answer is certified and recalled with them on all of its tokens.

    They start as they are in a memory that acts on answers alone; returned with the epochs that it took. Raises
    UserError if the budget of epochs is too short.
    """
    answer, k = loaded.ask(question).text, adapter[loaded.config.memory.target].down.shape[2]
    memory = dataclasses.replace(loaded.config.memory, num_experts=k, positions="all")
    config, fact = dataclasses.replace(loaded.config, memory=memory), facts.Fact("", question, answer)
    # The gates are in the adapter already.
    selection = FactSelection(None, np.arange(k, dtype=np.int32)[None], np.ones((1, k), np.float32))
    method = _OneQuestion.create(config, loaded.model, [fact], selection)
    state = method.init()
    for name, part_M1KR in adapter[memory.target]._asdict().items():
        old = state.experts_NR[name]
        state.experts_NR[name] = jax.device_put(jnp.swapaxes(part_M1KR[:, 0], 0, 1).astype(old.dtype), old.sharding)
    *_, (state, progress) = loop.epochs(method, state, loop.new_progress(1), until_all_hold=True)
    if not progress.worst_F[0] < certified_loss(config.backbone.dtype):
        message = f"{question!r}: its answer does not hold with the experts on the question's tokens too"
        raise UserError(f"{message}, after {progress.epoch} epochs", FACTS_DO_NOT_HOLD)
    return method.adapter(state)[1](None, None), progress.epoch


def backbone(config: Config, output: str) -> str:
    """Writes a backbone with its tokenizer in Hugging Face format; returns a description of what it wrote.

    A checkpoint that is in this format already is copied.
    """
    with _new_directory(output) as directory:
        checkpoints.export(config.backbone, directory)
        return "the backbone"


def save_peft(directory: Path, config: Config, adapters: Adapters, base: str) -> None:
    """Writes the adapters of one question for the model at `base`; their B matrices include the gates."""
    c, target = config, config.memory.target
    half, first = linear_layers.LINEAR_LAYERS[target].half, c.backbone.num_layers - c.memory.num_layers
    down_MBKI, up_MBKO = (np.asarray(part) for part in adapters.suffix[target])
    tensors, rank = {}, down_MBKI.shape[2]
    for layer in range(c.memory.num_layers):
        name = f"base_model.model.model.layers.{first + layer}.{half}.{target}"
        tensors[f"{name}.lora_A.weight"] = down_MBKI[layer, 0]
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(up_MBKO[layer, 0].T)
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,  # a scale of 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [target],
        "layers_to_transform": list(range(first, c.backbone.num_layers)),
        "layers_pattern": "layers",
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(description, indent=1) + "\n")
    (directory / "README.md").write_text(_README.format(base=base, rank=_vllm_rank(rank), top_k=rank))


def _vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank that vLLM accepts and that is not below this rank."""
    return next((allowed for allowed in _VLLM_RANKS if allowed >= rank), rank)


@contextlib.contextmanager
def _new_directory(output: str) -> Iterator[Path]:
    """A directory to fill, which gets its final name, or is copied into a bucket, only when it is complete."""
    path = paths.as_path(output)
    if path.exists():
        raise UserError(f"--output={path}: exists already; name another directory")
    if paths.is_remote(path):
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)
            paths.upload(Path(directory), path)
        return
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(path)
    except OSError as error:
        raise UserError(f"--output={path}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
