"""Writes a tuned memory, the experts of one question, or a backbone, for use elsewhere.

    python -m lamini_jax.export --workdir=DIR --output=OUT [--questions=FILE.jsonl]
    python -m lamini_jax.export --workdir=DIR --output=OUT --format=peft --question="..."
    python -m lamini_jax.export --output=OUT --format=backbone [--workdir=DIR]

The first writes the memory (with --questions, only the experts of these questions) as safetensors and JSON; `ask
--memory=OUT` answers from it on any machine that has the backbone. The second writes the experts of a question as an
ordinary LoRA adapter, which peft, vLLM and others load together with the same backbone. The third writes the backbone
of a run, or the one that ships, in Hugging Face format; a checkpoint in that format is copied as it is.
"""

from absl import flags

from lamini_jax import api, exports
from lamini_jax.config import Config, MeshConfig
from lamini_jax.errors import UserError
from lamini_jax.runtime import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a finished `lamini_jax.tune`.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write; it must not exist.", required=True)
_FORMAT = flags.DEFINE_enum("format", "memory", ["memory", "peft", "backbone"], "What to write.")
_QUESTION = flags.DEFINE_string("question", None, "The question whose experts --format=peft writes.")
_QUESTIONS = flags.DEFINE_string("questions", None, "JSONL file: writes only the experts of its questions.")
_BACKBONE = flags.DEFINE_string("backbone", None, "Where the checkpoint of the backbone is, if it has moved.")


def main() -> None:
    if _WORKDIR.value is None and _FORMAT.value != "backbone":
        raise UserError("--workdir is required")
    if (_QUESTION.value is not None) != (_FORMAT.value == "peft"):
        raise UserError('--format=peft and --question="..." go together')
    if _QUESTIONS.value is not None and _FORMAT.value != "memory":
        raise UserError(f"--questions does not go with --format={_FORMAT.value}")
    source = _WORKDIR.value and api.run_source(_WORKDIR.value).with_backbone(_BACKBONE.value)
    cli.use_devices(MeshConfig())
    if _FORMAT.value == "backbone":
        written = exports.backbone(source.config if source else Config(), _OUTPUT.value)
    elif _FORMAT.value == "peft":
        written = exports.peft(source, _QUESTION.value, _OUTPUT.value)
    else:
        written = exports.memory(source, _QUESTIONS.value, _OUTPUT.value)
    print(f"{written} in {_OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main, remote=("workdir", "output", "questions"))
