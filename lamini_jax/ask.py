"""Answers questions with a memory that `lamini_jax.tune` has tuned.

    python -m lamini_jax.ask --workdir=DIR --question="..."
    python -m lamini_jax.ask --workdir=DIR
    python -m lamini_jax.ask --workdir=DIR --questions=FILE.jsonl --output=OUT.jsonl

The first prints the answer alone, as it is made. The second answers each line of the standard input with one line. The
third answers a file of lines {"question": "..."} and writes them to OUT.jsonl with "generated" added to each.
--memory=OUT, from `lamini_jax.export`, serves in place of --workdir, beside the backbone at --backbone if that lies
elsewhere on this machine. --details adds how sure the answer is, the smallest probability among its tokens, and the
experts that the question selected, with how many of them facts have trained: all of them for a question that was tuned,
fewer for another as long as most experts are untrained. --temperature samples instead of taking the likeliest tokens.
--lookup=approximate finds experts faster on a TPU and misses some of them. --mesh_model is what --config.mesh.model is
to tuning.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from lamini_jax import command, hf, memory, model, processes, recall
from lamini_jax.config import BackboneConfig, MeshConfig
from lamini_jax.data.facts import check_question, read_questions
from lamini_jax.decoding import Sampling
from lamini_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory that `lamini_jax.tune` has finished with.")
_MEMORY = flags.DEFINE_string("memory", None, "Directory that `lamini_jax.export` has written.")
_BACKBONE = flags.DEFINE_string("backbone", None, "Where the checkpoint of the backbone lies, if it has moved.")
_QUESTION = flags.DEFINE_string("question", None, "One question.")
_QUESTIONS = flags.DEFINE_string("questions", None, "JSONL file with many.")
_OUTPUT = flags.DEFINE_string("output", None, "Where the answers to --questions go.")
_DETAILS = flags.DEFINE_bool("details", False, "Adds the smallest probability of a token, and the selected experts.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Samples at this temperature; 0: the likeliest tokens.", 0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the samples.", lower_bound=0)
_LOOKUP = flags.DEFINE_enum("lookup", None, ["approximate"], "Instead of the exact lookup that tuned.")
_MESH_MODEL = flags.DEFINE_integer("mesh_model", 1, "Devices among which each layer is divided; -1: all.")
command.define_processes()


def main() -> None:
    if _QUESTION.value is not None and _QUESTIONS.value is not None:
        raise UserError('give either --question="..." or --questions=FILE.jsonl')
    if (_QUESTIONS.value is None) != (_OUTPUT.value is None):
        raise UserError("--questions=FILE.jsonl and --output=OUT.jsonl go together")
    if _QUESTION.value is None and _QUESTIONS.value is None and flags.FLAGS.multihost:
        raise UserError("--multihost: several processes share no standard input; give --question or --questions")
    config, load = _source()
    if _BACKBONE.value is not None:
        config = dataclasses.replace(config, backbone=_moved(config.backbone, _BACKBONE.value))
    if _LOOKUP.value and config.router.lookup != "exact":
        raise UserError(f"--lookup={_LOOKUP.value}: this memory was tuned with {config.router.lookup} keys")
    whole = _MESH_MODEL.value == -1
    command.start(MeshConfig(data=1 if whole else -1, model=_MESH_MODEL.value))
    tokenizer, context = model.load_tokenizer(config), config.backbone.context
    if _QUESTION.value is not None:
        check_question(_QUESTION.value, tokenizer, context, "--question")
    if _QUESTIONS.value is not None:
        records = read_questions(_QUESTIONS.value, tokenizer, context)
        if not Path(_OUTPUT.value).absolute().parent.is_dir():
            raise UserError(f"--output={_OUTPUT.value}: its directory does not exist")
    base, tuned = model.load_base(config), load(config)
    if _LOOKUP.value:
        tuned = dataclasses.replace(tuned, routing=tuned.routing.replace(lookup=_LOOKUP.value))
    served = _Served(base, memory.adapt_with(base, tuned, config), np.asarray(tuned.expert_ids_S))
    if _QUESTION.value is not None:
        _print_answer(served, _QUESTION.value)
    elif _QUESTIONS.value is not None:
        _write_answers(served, records)
    else:
        _answer_lines(served, sys.stdin.buffer)


class _Served(NamedTuple):
    """What answers."""

    base: model.Base
    adapt: recall.Adapt
    trained_ids: np.ndarray  # of the experts that facts have trained

    def details(self, answer: recall.Answer) -> dict[str, Any]:
        """What --details adds to an answer."""
        trained = int(np.isin(answer.expert_ids, self.trained_ids).sum())
        return {"probability": answer.probability, "trained_experts": trained, "expert_ids": answer.expert_ids}


def _source():
    """The config of the memory, and what loads it."""
    if (_WORKDIR.value is None) == (_MEMORY.value is None):
        raise UserError("give either --workdir=DIR or --memory=DIR")
    if _MEMORY.value is not None:
        exported = Path(_MEMORY.value)
        return memory.config_of_export(exported), lambda config: memory.of_export(config, exported)
    workdir = Path(_WORKDIR.value)
    return memory.config_of_run(workdir), lambda config: memory.of_run(config, workdir / "checkpoints")


def _moved(backbone: BackboneConfig, path: str) -> BackboneConfig:
    """The same backbone at another place; its weights are compared later. Raises UserError for another shape."""
    found = hf.resolve(BackboneConfig(path=path, context=backbone.context, dtype=backbone.dtype))
    if dataclasses.replace(found, path=backbone.path) != backbone:
        raise UserError(f"--backbone={path}: this memory was made for another backbone, of another shape")
    return found


def _sampling(draw: int = 0) -> Sampling | None:
    if not _TEMPERATURE.value:
        return None
    return Sampling(jax.random.fold_in(jax.random.key(_SEED.value), draw), np.float32(_TEMPERATURE.value))


def _print_answer(served: _Served, question: str, draw: int = 0) -> None:
    """Prints an answer as it grows; what may still become another character waits."""
    printed = ""
    for answer in recall.stream(served.base, served.adapt, question, _sampling(draw)):
        text = answer.text.rstrip("\ufffd")
        if processes.first() and text.startswith(printed):
            print(text[len(printed) :], end="", flush=True)
            printed = text
    processes.say(answer.text[len(printed) :])
    if _DETAILS.value:
        details = served.details(answer)
        processes.say(f"  least likely token: {answer.probability:.4f}")
        processes.say(f"  trained experts: {details['trained_experts']} of {len(answer.expert_ids)}")
        processes.say(f"  experts: {' '.join(map(str, answer.expert_ids))}")


def _answer_lines(served: _Served, lines: Iterable[bytes]) -> None:
    tokenizer, context = served.base.tokenizer, served.base.decoder.config.context
    for number, line in enumerate(lines, 1):
        where = f"standard input, line {number}"
        try:
            question = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: is not UTF-8 (byte {error.start + 1})") from None
        if question.strip():
            check_question(question, tokenizer, context, where)
            _print_answer(served, question, number)


def _write_answers(served: _Served, records: list[dict]) -> None:
    asked = [record["question"] for record in records]
    given = recall.ask(served.base, served.adapt, asked, sampling=_sampling())
    answers = dict(processes.bar(given, total=len(asked), unit="answer"))
    lines = []
    for number, record in enumerate(records):
        answer = answers[number]
        details = served.details(answer) if _DETAILS.value else {}
        lines.append(json.dumps({**record, "generated": answer.text, **details}))
    command.write_text(_OUTPUT.value, "\n".join(lines) + "\n")
    processes.say(f"{len(lines)} answers in {_OUTPUT.value}")


if __name__ == "__main__":
    command.run(main)
