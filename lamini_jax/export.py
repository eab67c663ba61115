"""Writes a tuned memory, the experts of one question, or a backbone, for use elsewhere.

    python -m lamini_jax.export --workdir=DIR --output=OUT [--questions=FILE.jsonl]
    python -m lamini_jax.export --workdir=DIR --output=OUT --format=peft --question="..."
    python -m lamini_jax.export --output=OUT --format=backbone [--workdir=DIR]

The first writes the memory (of these questions alone, if some are given) as safetensors and JSON, which `ask
--memory=OUT` serves wherever the backbone is. The second writes the experts of a question as an ordinary LoRA adapter,
which peft, vLLM and others load beside the same backbone. The third writes the backbone of a run, or the one that
ships, in Hugging Face format.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags
from safetensors.numpy import save_file

from lamini_jax import backbone, command, hf, memory, model, sharding
from lamini_jax.config import Config, MeshConfig
from lamini_jax.data import batches
from lamini_jax.data import tokenizer as tokenizers
from lamini_jax.data.facts import check_question, read_questions
from lamini_jax.decoding import Adapted
from lamini_jax.errors import UserError

_FORMATS = ("memory", "peft", "backbone")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory that `lamini_jax.tune` has finished with.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write; it must not exist.", required=True)
_FORMAT = flags.DEFINE_enum("format", "memory", list(_FORMATS), "What to write.")
_QUESTION = flags.DEFINE_string("question", None, "The question whose experts --format=peft writes.")
_QUESTIONS = flags.DEFINE_string("questions", None, "JSONL file with the questions whose experts are enough.")


def main() -> None:
    if _WORKDIR.value is None and _FORMAT.value != "backbone":
        raise UserError("--workdir is required")
    if (_QUESTION.value is not None) != (_FORMAT.value == "peft"):
        raise UserError('--format=peft and --question="..." go together')
    if _QUESTIONS.value is not None and _FORMAT.value != "memory":
        raise UserError(f"--questions does not go with --format={_FORMAT.value}")
    config = Config() if _WORKDIR.value is None else memory.config_of_run(Path(_WORKDIR.value))
    sharding.use(MeshConfig())
    tokenizer, context = model.load_tokenizer(config), config.backbone.context
    questions = None
    if _QUESTION.value is not None:
        check_question(_QUESTION.value, tokenizer, context, "--question")
        questions = [_QUESTION.value]
    if _QUESTIONS.value is not None:
        questions = [record["question"] for record in read_questions(_QUESTIONS.value, tokenizer, context)]
    with _new_directory(Path(_OUTPUT.value)) as directory:
        base = model.load_base(config)
        if _FORMAT.value == "backbone":
            hf.save_backbone(directory, config.backbone, backbone.join(base.params))
            _save_tokenizer(directory, config)
            told = "the backbone"
        else:
            tuned = memory.of_run(config, Path(_WORKDIR.value) / "checkpoints")
            adapt = memory.adapt_with(base, tuned, config)
            if _FORMAT.value == "peft":
                (bucket,) = batches.prompts(questions, tokenizer)
                save_peft(directory, config, adapt(bucket.tokens_FT, bucket.length_F))
                told = f"{config.memory.selected} experts as a LoRA adapter"
            else:
                ids = questions and model.select_all(base, tuned.routing, questions, config.memory.selected)
                told = f"{memory.write(directory, config, tuned, ids):,} experts"
    print(f"{told} in {_OUTPUT.value}")


def save_peft(directory: Path, config: Config, adapted: Adapted) -> None:
    """Writes the adapter of one question in the format of the peft library; the gates are in its B matrices."""
    c, target = config, config.memory.target
    block = "self_attn" if target == "o_proj" else "mlp"
    first = c.backbone.num_layers - c.memory.layers
    down_MBKI, up_MBKO = (np.asarray(part) for part in adapted.suffix[target])
    tensors = {}
    for layer in range(c.memory.layers):
        name = f"base_model.model.model.layers.{first + layer}.{block}.{target}"
        tensors[f"{name}.lora_A.weight"] = down_MBKI[layer, 0]
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(up_MBKO[layer, 0].T)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": c.backbone.path,
        "r": c.memory.selected,
        "lora_alpha": c.memory.selected,  # a scale of 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [target],
        "layers_to_transform": list(range(first, c.backbone.num_layers)),
        "layers_pattern": "layers",
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(described, indent=1) + "\n")


def _save_tokenizer(directory: Path, config: Config) -> None:
    if not config.backbone.path:
        tokenizers.save_bytes(directory)
        return
    for path in hf.locate(config.backbone.path).iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "generation_config", "special_tokens")):
            shutil.copy(path, directory)


@contextlib.contextmanager
def _new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which has its name when it is whole and not before."""
    if path.exists():
        raise UserError(f"--output={path}: exists already; name another directory")
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


if __name__ == "__main__":
    command.run(main)
