"""Answers questions with a memory that `lamini_jax.tune` has tuned.

    python -m lamini_jax.ask --workdir=DIR --question="..."
    python -m lamini_jax.ask --workdir=DIR --questions=FILE.jsonl --output=OUT.jsonl

The first prints the answer alone. The second answers a file of lines {"question": "..."} and writes them to OUT.jsonl
with "generated" added to each. --lookup=approximate finds experts faster on a TPU and
misses some of them. --mesh_model is what --config.mesh.model is to tuning.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from lamini_jax import command, model, processes, recall, runs
from lamini_jax.config import MeshConfig
from lamini_jax.data.facts import check_question, read_questions
from lamini_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory that `lamini_jax.tune` has finished with.", required=True)
_QUESTION = flags.DEFINE_string("question", None, "One question.")
_QUESTIONS = flags.DEFINE_string("questions", None, "JSONL file with many.")
command.define_processes()
_LOOKUP = flags.DEFINE_enum("lookup", None, ["approximate"], "Instead of the exact lookup that tuned.")
_MESH_MODEL = flags.DEFINE_integer("mesh_model", 1, "Devices among which each layer is divided; -1: all.")
_OUTPUT = flags.DEFINE_string("output", None, "Where the answers to --questions go.")


def main() -> None:
    if (_QUESTION.value is None) == (_QUESTIONS.value is None):
        raise UserError('give either --question="..." or --questions=FILE.jsonl')
    if (_QUESTIONS.value is None) != (_OUTPUT.value is None):
        raise UserError("--questions=FILE.jsonl and --output=OUT.jsonl go together")
    directory = Path(_WORKDIR.value)
    config = runs.tuned_config(directory, "workdir")
    if _LOOKUP.value and config.router.lookup != "exact":
        raise UserError(f"--lookup={_LOOKUP.value}: this memory was tuned with {config.router.lookup} keys")
    whole = _MESH_MODEL.value == -1
    command.start(MeshConfig(data=1 if whole else -1, model=_MESH_MODEL.value))
    base = model.load_base(config)
    context = config.backbone.context
    if _QUESTION.value is not None:
        check_question(_QUESTION.value, base.tokenizer, context, "--question")
        records = [{"question": _QUESTION.value}]
    else:
        records = read_questions(_QUESTIONS.value, base.tokenizer, context)
        if not Path(_OUTPUT.value).absolute().parent.is_dir():
            raise UserError(f"--output={_OUTPUT.value}: its directory does not exist")
    memory = runs.load_memory(config, directory / "checkpoints")
    if _LOOKUP.value:
        memory = dataclasses.replace(memory, routing=memory.routing.replace(lookup=_LOOKUP.value))
    speak = runs.answer_with(base, memory, config)
    generated = recall.answers(base, speak, [record["question"] for record in records])
    if _QUESTION.value is not None:
        processes.say(generated[0])
    else:
        lines = [json.dumps({**record, "generated": text}) for record, text in zip(records, generated, strict=True)]
        command.write_text(_OUTPUT.value, "\n".join(lines) + "\n")
        processes.say(f"{len(lines)} answers in {_OUTPUT.value}")


if __name__ == "__main__":
    command.run(main)
