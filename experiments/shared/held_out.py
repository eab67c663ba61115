"""Questions that no run was tuned on, which the backbone can answer: what shows that a memory has changed nothing else.

The backbone that ships is asked for rules of its own world, which it answers exactly. A real language model answers
hardly any benchmark word for word, so that its answers are judged by likelihood, as benchmarks are; and its answers in
free decoding are compared with those it gave before, word for word.
"""

import dataclasses
from collections.abc import Collection, Sequence

from experiments.shared import sizes
from lamini_jax import Config, Fact
from lamini_jax.backbone import answering
from lamini_jax.backbone.answering import BARE, AdapterFn
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.data import benchmarks, datasets, world
from lamini_jax.data.benchmarks import MultipleChoice
from lamini_jax.evaluation import intervals, multiple_choice, recall

FREE = 100  # questions that are answered freely
FREE_TOKENS = 32  # of each such answer
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


def benchmark_items(config: Config, model: FrozenModel, tuned: Collection[str]) -> dict[str, list[MultipleChoice]]:
    """Questions of TruthfulQA and MMLU that fit in the context and are not `tuned`.

    TruthfulQA is needed beside a real backbone, MMLU read only with `data.dir`. Raises UserError for missing files.
    """
    if not (config.data.dir or config.backbone.path):
        return {}
    items = {"truthful_qa": _untuned(config, tuned)[: sizes.of(config).truthful_qa]}
    if config.data.dir:
        items["mmlu"] = benchmarks.mmlu(config.data.dir, sizes.of(config).mmlu_per_subject)
    return {name: benchmarks.fitting(group, model.tokenizer, model.max_seq_len) for name, group in items.items()}


def load(config: Config, model: FrozenModel, tuned: Sequence[str], count: int) -> HeldOut:
    """Sets of about `count` questions for this backbone, without those that are `tuned`.

    A real backbone is judged on TruthfulQA and, with `data.dir`, on MMLU. Raises UserError if their files are missing.
    """
    if config.backbone.path:
        sets = benchmark_items(config, model, tuned)
        free = [item.question for item in _untuned(config, tuned)[-FREE:]]
    else:
        sets = {
            "heldout": world_questions(config, -(-count // len(world_kinds(config)))),
            "neighbour": following(config, model, count),
        }
        free = [qa.question for qa in sets["heldout"]]
    return HeldOut(sets, free, answering.answers(model, BARE, free, FREE_TOKENS))


def judge(held_out: HeldOut, model: FrozenModel, adapter_fn: AdapterFn) -> dict:
    """By set, the share answered right with its 95% interval, None for an empty set; the share of answers unchanged."""
    result = {}
    for name, items in held_out.sets.items():
        if items and isinstance(items[0], MultipleChoice):
            scores = multiple_choice.score(model, adapter_fn, items)
            right = sum(map(_JUDGES[name], items, scores))
        else:
            right = sum(recall.accuracy(model, adapter_fn, items)) if items else 0
        result[f"{name}_accuracy"] = right / len(items) if items else None
        result[f"{name}_interval"] = intervals.wilson(right, len(items)) if items else None
    after = answering.answers(model, adapter_fn, held_out.free, FREE_TOKENS)
    same = sum(map(str.__eq__, held_out.before, after))
    return result | {"unchanged": same / len(held_out.free)}


def following(config: Config, model: FrozenModel, count: int) -> list[Fact]:
    """The `count` facts of the data set that follow those of the config; fewer where it has no more."""
    data = dataclasses.replace(config.data, count=config.data.count + count)
    return datasets.load_up_to(data, "true", config.seed, model.tokenizer, model.max_seq_len)[config.data.count :]


def truthful_qa(config: Config) -> list[MultipleChoice]:
    """TruthfulQA's questions, from where the facts of truthful_qa come."""
    return benchmarks.truthful_qa(config.data.dir or datasets.data_home() / "downloads")


def _untuned(config: Config, tuned: Collection[str]) -> list[MultipleChoice]:
    return [item for item in truthful_qa(config) if item.question not in tuned]
