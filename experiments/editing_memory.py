"""The life of a memory in `editing`: facts are added batch by batch, asked for, found, forgotten and changed.

All that the study uses of a memory's interface is in this file. Every function may be called again after a run was
killed in the middle of it: what is stored already is stored again as the same, what is forgotten is not looked for.
"""

import functools
import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.editing_judging import Found, with_intervals
from experiments.editing_questions import NO_FACT, TOKENS, Asked, Row, spread
from lamini_jax import Config, api
from lamini_jax.backbone import answering, frozen_model
from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.frozen_model import FrozenModel

MOMENTS = 10  # at which everything stored so far is asked: after every batch if there are no more
FORGOTTEN = 2  # batches that are forgotten again, the last ones
CHANGED = 200  # facts that get another answer
COMPARED = 200  # questions whose logits are compared
TIMED = 12  # questions of each kind that are timed


class Living:
    """A memory in its directory, which the first batch of facts creates, and which is opened when it is needed."""

    def __init__(self, config: Config, asked: Asked, batch: int, directory: Path):
        self.config, self.asked, self.directory = config, asked, directory
        facts = asked.facts
        self.batches = [facts[start : start + batch] for start in range(0, len(facts), batch)]
        self.forgotten = min(FORGOTTEN, len(self.batches) - 1)  # batches; the first is always kept

    @functools.cached_property
    def memory(self):
        """The memory as it is stored."""
        return api.load(self.directory)

    def add(self, number: int) -> dict[str, Any]:
        """Adds a batch; of what it took, nothing counts for facts that were stored before a run was killed."""
        facts = [{"question": row.question, "answer": row.answer} for row in self.batches[number]]
        if number == 0:
            result = api.tune(facts, self.directory, self.config)
            return {"added": result.facts, "holding": result.holding, "seconds_adding": result.seconds}
        change = self.memory.add(facts)
        return {"added": change.added, "holding": change.holding, "seconds_adding": change.seconds}

    def texts(self, questions: Sequence[str]) -> list[str]:
        """What the memory answers to some questions, as any user would ask them."""
        return [answer.text for answer in self.memory.ask(list(questions), TOKENS)]

    def stored(self) -> dict[str, str]:
        """By its question, the id of each stored fact."""
        return {fact.question: fact.id for fact in self.memory.facts()}

    @functools.cached_property
    def system(self) -> "Remembering":
        """The memory as a system that is judged. It must not be changed any more when this is asked for."""
        return Remembering(self.memory, self.asked.facts)


class Remembering:
    """A memory as a `System`: it decides by itself whether a fact fires."""

    def __init__(self, memory: Any, facts: Sequence[Row]):
        ids = {fact.question: fact.id for fact in memory.facts()}
        self.memory, self._ids = memory, [ids.get(row.question) for row in facts]
        self._index = {id: i for i, id in enumerate(self._ids)}
        self._told: dict[tuple[str, int], str] = {}
        self._looked_up: dict[str, Any] = {}

    def look_up(self, questions: Sequence[str]) -> list[Any]:
        """What the memory itself finds, once for each question."""
        if new := [text for text in dict.fromkeys(questions) if text not in self._looked_up]:
            self._looked_up |= dict(zip(new, self.memory.find(new), strict=True))
        return [self._looked_up[text] for text in questions]

    def find(self, questions: Sequence[str]) -> Found:
        """The fact that fires, or the likeliest that does not."""
        found = self.look_up(questions)
        index = [self._index.get(one.best if one.fact is None else one.fact, NO_FACT) for one in found]
        fires = [one.fact is not None for one in found]
        return Found(np.array(index, int), np.array([one.score for one in found], float), np.array(fires, bool))

    def answer(self, questions: Sequence[str], index_Q: Sequence[int]) -> list[str]:
        """Answers with the experts of these facts. A fact answers once, because it answers in its stored wording."""
        facts = map(int, index_Q)
        pairs = [(text if fact == NO_FACT else "", fact) for text, fact in zip(questions, facts, strict=True)]
        if new := [pair for pair in dict.fromkeys(pairs) if pair not in self._told]:
            facts = [None if fact == NO_FACT else self._ids[fact] for _, fact in new]
            said = self.memory.ask_about([text or "?" for text, _ in new], facts, TOKENS)
            self._told |= {pair: answer.text for pair, answer in zip(new, said, strict=True)}
        return [self._told[pair] for pair in pairs]


def asks_after(number: int, batches: int) -> bool:
    """Whether everything is asked after batch `number`: after each, or at as many moments in equal distances."""
    moments = min(MOMENTS, batches)
    return number in {-(-batches * k // moments) - 1 for k in range(1, moments + 1)}


def grow(living: Living, number: int) -> dict[str, Any]:
    """Adds a batch and asks for everything that is stored.

    Before the batches that will be forgotten it asks for these too, and takes the fingerprint of what is stored.
    """
    batches, facts = living.batches, living.asked.facts
    added = living.add(number)
    count = sum(map(len, batches[: number + 1]))
    if is_snapshot(living, number):
        state = fingerprint(living.memory.state())
        return {**added, "stored": count, "texts": living.texts([row.question for row in facts]), "state": state}
    if not asks_after(number, len(batches)):
        return {**added, "stored": count, "texts": []}
    return {**added, "stored": count, "texts": living.texts([row.question for row in facts[:count]])}


def is_snapshot(living: Living, number: int) -> bool:
    """Whether the memory after this batch is the one that forgetting has to bring back."""
    return living.forgotten > 0 and number == len(living.batches) - 1 - living.forgotten


def growth(living: Living, grown: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is reported of all batches: recall as the memory grows, of the first batch at the end, time and space."""
    facts, last = living.asked.facts, grown[-1]
    exact = {
        one["stored"]: [text == row.answer for text, row in zip(one["texts"], facts, strict=False)][: one["stored"]]
        for one in grown
        if one["texts"]
    }
    later = [one for one in grown[1:] if one["added"]] or grown[:1]  # the first also creates the memory
    return {
        **with_intervals({"first_batch_after_last": exact[last["stored"]][: len(living.batches[0])]}),
        "recall_as_it_grows": [[count, float(np.mean(some))] for count, some in exact.items()],
        "holding": last["holding"],
        "seconds_creating": grown[0]["seconds_adding"],
        "seconds_per_fact": sum(one["seconds_adding"] for one in later) / max(1, sum(one["added"] for one in later)),
    }


def space(living: Living) -> dict[str, Any]:
    """Bytes of all files of a memory, and how many of its facts share experts with others."""
    facts = living.memory.facts()
    size = sum(path.stat().st_size for path in living.directory.rglob("*") if path.is_file())
    return {"bytes_per_fact": size / len(facts), "sharing": sum(fact.shared > 0 for fact in facts)}


def unfired(living: Living) -> list[str]:
    """Questions of all kinds that nobody stored, for which no fact fires."""
    texts = [text for some in living.asked.strangers.values() for text in spread(some, COMPARED)]
    found = zip(texts, living.system.look_up(texts), strict=True)
    return [text for text, one in found if one.fact is None]


def bitwise(living: Living) -> dict[str, Any]:
    """For how many such questions nothing changes by a memory: a bit of the logits, or of an answer's probability.

    Memory and backbone are asked the same questions in the same batches, because sums are rounded differently in
    others.
    """
    memory, texts = living.memory, spread(unfired(living), COMPARED)
    if not texts:
        return with_intervals({"unfired_bitwise": [], "unfired_answers": []})
    said = [
        [(answer.text, answer.probability) for answer in system.ask(texts, TOKENS)]
        for system in (memory, memory.bare())
    ]
    logits = same_logits(memory.model, memory.adapter_fn, texts)
    return with_intervals({"unfired_bitwise": logits, "unfired_answers": list(map(tuple.__eq__, *said))})


def same_logits(model: FrozenModel, adapter_fn: AdapterFn, questions: Sequence[str]) -> list[bool]:
    """For which questions the logits of the answer's first token do not change a bit by these adapters."""

    def same(prompt_BT, length_B):
        hidden_BTD = frozen_model.read_prefix(model, prompt_BT)
        bits = []
        for fn in (answering.BARE, adapter_fn):
            adapters = fn(prompt_BT, length_B)
            logits_B1V = np.asarray(frozen_model.answer_logits(model, hidden_BTD, length_B - 1, 1, adapters))
            bits.append(np.ascontiguousarray(logits_B1V[:, 0]).view(np.uint8))
        return (bits[0] == bits[1]).all(axis=1)

    return frozen_model.map_questions(model, questions, same).tolist()


def latency(living: Living) -> dict[str, Any]:
    """What a memory adds to the time of one answer.

    Both give the same answers, because no fact fires for these questions; memory and backbone are asked in turns.
    """
    memory, bare, texts = living.memory, living.memory.bare(), spread(unfired(living), TIMED)
    seconds = {"memory": [], "bare": []}
    for warm in (True, False):
        for text in texts[:1] if warm else texts:
            for system, asks in (("memory", memory.ask), ("bare", bare.ask)):
                took = _seconds(lambda asks=asks, text=text: asks([text], TOKENS))
                seconds[system] += [] if warm else [took]
    medians = {system: statistics.median(some) for system, some in seconds.items() if some}
    return {"latency_ratio": medians["memory"] / medians["bare"] if medians else None, "latency_seconds": medians}


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def forget(living: Living, before: Mapping[str, Any]) -> dict[str, Any]:
    """Forgets the last batches and compares state and all answers with those of the memory that never had them."""
    gone = [row.question for batch in living.batches[-living.forgotten :] for row in batch]
    stored = living.stored()
    if ids := [stored[question] for question in gone if question in stored]:
        living.memory.forget(ids=ids)
    texts = living.texts([row.question for row in living.asked.facts])
    state = fingerprint(living.memory.state())
    same = [state.get(name) == before["state"].get(name) for name in sorted(state | before["state"])]
    equal = [text == other for text, other in zip(texts, before["texts"], strict=True)]
    return {**with_intervals({"equal": equal, "state": same}), "count": len(gone)}


def fingerprint(state: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Of each array a hash of its type, shape and bytes."""

    def of(array):
        array = np.asarray(array)
        content = np.array(array.tolist(), str).tobytes() if array.dtype.hasobject else array.tobytes()
        return hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode() + content).hexdigest()[:16]

    return {name: of(array) for name, array in state.items()}


def changes(rows: Sequence[Row], most: int) -> list[tuple[int, str]]:
    """For some facts the answer of another, which is a different one."""
    answers = [row.answer for row in rows]
    found = []
    for i, answer in enumerate(answers):
        other = next((text for text in answers[i + 1 :] + answers[:i] if text != answer), None)
        if other is not None and len(found) < most:
            found.append((i, other))
    return found


def change(living: Living) -> dict[str, Any]:
    """Gives facts another answer. `new` is how many of them are answered so, `old` how often the old answer is said.

    For that they are asked in other words and with a typo too; what is answered without any fact does not count.
    """
    facts = living.asked.facts
    kept = facts[: len(facts) - sum(map(len, living.batches[len(living.batches) - living.forgotten :]))]
    answers = dict(changes(kept, CHANGED))
    living.memory.change([{"question": facts[i].question, "answer": answer} for i, answer in answers.items()])
    pairs = [pair for some in living.asked.about.values() for pair in some if pair[1] in answers]
    said = dict.fromkeys(pairs)
    said = dict(zip(said, living.memory.ask([text for text, _ in said], TOKENS), strict=True))
    new = [said[facts[i].question, i].text == answer for i, answer in answers.items()]
    old = [answer.text == facts[i].answer for (_, i), answer in said.items() if answer.fact is not None]
    return {**with_intervals({"new": new, "old": old}), "count": len(new)}
