"""Answers questions with a memory that `lamini_jax.tune` has tuned.

    python -m lamini_jax.ask --workdir=DIR --question="..."
    python -m lamini_jax.ask --workdir=DIR
    python -m lamini_jax.ask --workdir=DIR --questions=FILE.jsonl --output=OUT.jsonl

The first prints only the answer, as it is generated. The second answers each line of the standard input with one line.
The third answers a file of lines {"question": "..."} and writes them to OUT.jsonl with "generated" added to each.
--memory=DIR, a directory that `lamini_jax.export` wrote, replaces --workdir. --details adds how sure the answer is (the
smallest probability among its tokens), the experts that the question selected, and how many of these are trained: all
for a question as it was tuned, fewer for others as long as most experts are untrained. Of a memory of facts it adds
which fact was found, its score and the next best one's, and whether the answer is certified. Questions that ask for no
fact are answered by the backbone alone; with --outside=refuse they are not answered ("not in memory"; null in JSON).
"""

import sys

from absl import flags

from lamini_jax import api, question_files
from lamini_jax.config import MeshConfig
from lamini_jax.errors import UserError
from lamini_jax.memories import OUTSIDE, check_outside
from lamini_jax.runtime import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a finished `lamini_jax.tune`.")
_MEMORY = flags.DEFINE_string("memory", None, "Directory that `lamini_jax.export` wrote.")
_BACKBONE = flags.DEFINE_string("backbone", None, "Where the checkpoint of the backbone is, if it has moved.")
_QUESTION = flags.DEFINE_string("question", None, "One question.")
_QUESTIONS = flags.DEFINE_string("questions", None, "JSONL file with many questions.")
_OUTPUT = flags.DEFINE_string("output", None, "File for the answers to --questions.")
_DETAILS = flags.DEFINE_bool("details", False, "Adds the smallest probability of a token, and the selected experts.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Samples at this temperature; 0: takes the likeliest.", 0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0)
_BARE = flags.DEFINE_bool("bare", False, "Turns the memory off: what the backbone answers by itself.")
_OUTSIDE = flags.DEFINE_enum("outside", "answer", OUTSIDE, "What happens to a question that asks for no fact.")
_LOOKUP = flags.DEFINE_enum("lookup", None, ["approximate"], "Faster on a TPU than exact, and misses some experts.")
_MESH_MODEL = flags.DEFINE_integer("mesh_model", 1, "Devices among which each layer is divided; -1: all.")
cli.define_processes()


def main() -> None:
    if _QUESTION.value is not None and _QUESTIONS.value is not None:
        raise UserError('give either --question="..." or --questions=FILE.jsonl')
    if (_QUESTIONS.value is None) != (_OUTPUT.value is None):
        raise UserError("--questions=FILE.jsonl and --output=OUT.jsonl go together")
    if _QUESTION.value is None and _QUESTIONS.value is None and flags.FLAGS.multihost:
        raise UserError("--multihost: processes cannot share a standard input; give --question or --questions")
    if (_WORKDIR.value is None) == (_MEMORY.value is None):
        raise UserError("give either --workdir=DIR or --memory=DIR")
    source = api.run_source(_WORKDIR.value) if _MEMORY.value is None else api.export_source(_MEMORY.value)
    check_outside(_OUTSIDE.value, source.config)
    source = source.with_backbone(_BACKBONE.value)
    cli.start(MeshConfig(data=1 if _MESH_MODEL.value == -1 else -1, model=_MESH_MODEL.value))
    how = _LOOKUP.value, _TEMPERATURE.value, _SEED.value, _DETAILS.value, _BARE.value, _OUTSIDE.value
    asking = question_files.Asking(source, *how)
    if _QUESTIONS.value is not None:
        asking.file(_QUESTIONS.value, _OUTPUT.value)
    elif _QUESTION.value is not None:
        asking.one(_QUESTION.value)
    elif sys.stdin is None:
        raise UserError("the standard input is closed; give --question or --questions")
    else:
        asking.lines(sys.stdin.buffer)


if __name__ == "__main__":
    cli.run(main, remote=("workdir", "memory", "questions", "output"))
