"""Questions that no run was tuned on, which the backbone can answer: what shows that a memory has changed nothing else.

The backbone that ships is asked for rules of its own world, which it answers exactly. A real language model answers
hardly any benchmark word for word, so that its answers are judged by likelihood, as benchmarks are; and its answers in
free decoding are compared with those it gave before, word for word.
"""

import dataclasses
from collections.abc import Sequence

from lamini_jax import Config
from lamini_jax.backbone import answering
from lamini_jax.backbone.answering import BARE, AdapterFn
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.data import benchmarks, datasets, world
from lamini_jax.evaluation import intervals, multiple_choice, recall

FREE = 100  # questions that are answered freely
FREE_TOKENS = 32  # of each such answer
TRUTHFUL_QA = 50  # questions judged by likelihood
PER_SUBJECT = 1  # of MMLU
_JUDGES = {"truthful_qa": multiple_choice.mc1, "mmlu": multiple_choice.likeliest}


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Sets of questions by name: with one right answer each, or with choices; and some to answer freely."""

    sets: dict[str, Sequence]
    free: Sequence[str]
    before: Sequence[str]  # what the bare backbone answers to these


def world_kinds(config: Config) -> list[str]:
    """The kinds of questions of the generated world that no fact belongs to; none beside a real backbone."""
    kinds = [kind for kind in world.KINDS if config.data.facts != "world" or kind not in world.FACT_KINDS]
    return [] if config.backbone.path else kinds


def world_questions(config: Config, per_kind: int) -> list[world.QA]:
    """Held-out questions of these kinds."""
    return [qa for kind in world_kinds(config) for qa in world.held_out(kind, per_kind, config.seed)]


def load(config: Config, model: FrozenModel, tuned: Sequence[str], count: int) -> HeldOut:
    """Sets of about `count` questions for this backbone, without those that are `tuned`.

    A real backbone is judged on TruthfulQA and, with `data.dir`, on MMLU. Raises UserError if their files are missing.
    """
    if config.backbone.path:
        sets, free = _benchmarks(config, model, set(tuned))
    else:
        sets = {
            "heldout": world_questions(config, -(-count // len(world_kinds(config)))),
            "neighbour": _more(config, model, count),
        }
        free = [qa.question for qa in sets["heldout"]]
    return HeldOut(sets, free, answering.answers(model, BARE, free, FREE_TOKENS))


def judge(held_out: HeldOut, model: FrozenModel, adapter_fn: AdapterFn) -> dict:
    """By set, the share answered right with its 95% interval, None for an empty set; the share of answers unchanged."""
    result = {}
    for name, items in held_out.sets.items():
        if items and isinstance(items[0], benchmarks.MultipleChoice):
            scores = multiple_choice.score(model, adapter_fn, items)
            right = sum(map(_JUDGES[name], items, scores))
        else:
            right = sum(recall.accuracy(model, adapter_fn, items)) if items else 0
        result[f"{name}_accuracy"] = right / len(items) if items else None
        result[f"{name}_interval"] = intervals.wilson(right, len(items)) if items else None
    after = answering.answers(model, adapter_fn, held_out.free, FREE_TOKENS)
    same = sum(map(str.__eq__, held_out.before, after))
    return result | {"unchanged": same / len(held_out.free)}


def _more(config: Config, model: FrozenModel, count: int) -> list:
    """Questions of the facts' data set that follow the facts."""
    data = dataclasses.replace(config.data, count=config.data.count + count)
    return datasets.load_up_to(data, "true", config.seed, model.tokenizer, model.max_seq_len)[config.data.count :]


def _benchmarks(config: Config, model: FrozenModel, tuned: set[str]) -> tuple[dict[str, list], list[str]]:
    directory = config.data.dir or datasets.data_home() / "downloads"  # where the facts of truthful_qa came from
    truthful = [item for item in benchmarks.truthful_qa(directory) if item.question not in tuned]
    items = {"truthful_qa": truthful[:TRUTHFUL_QA]}
    if config.data.dir:
        items["mmlu"] = benchmarks.mmlu(config.data.dir, PER_SUBJECT)
    sets = {name: benchmarks.fitting(group, model.tokenizer, model.max_seq_len) for name, group in items.items()}
    return sets, [item.question for item in truthful[-FREE:]]
