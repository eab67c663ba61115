"""What a memory is compared with in `editing`, on the same facts and questions, each a `System` or a model alone."""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import editing_judging as judging
from experiments.editing_judging import Found
from experiments.editing_memory import Living
from experiments.editing_questions import NO_FACT, TOKENS, Asked, Row, spread
from lamini_jax import Config, Fact
from lamini_jax.backbone import answering, frozen_model, transformer
from lamini_jax.backbone.answering import BARE
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.data.facts import fact_id
from lamini_jax.training import FullMethod, LoraMethod, Run, TrainMethod

ASKED = 200  # questions of a kind about stored facts that a rival is asked, half of it with typos
DENSE_FACTS, DENSE_EPOCHS = 100, 30  # that a real model's own weights are tuned on, at most
DENSE_ASKED, COMPARED = 100, 50  # questions of a kind then: about these facts, and such that nobody stored
_ANALYZERS = {"words": "word", "letters": "char_wb"}

Find = Callable[[Sequence[str]], Found]


DENSE = ("lora", "full")  # those that tune the backbone itself


def rivals(config: Config, model: FrozenModel, living: Living, directory: Path) -> dict[str, Callable[[], dict]]:
    """By name, a function that measures a rival."""
    asked = living.asked.sample(ASKED)
    finders = {f"tfidf_{name}": functools.partial(tfidf, asked.facts, kind) for name, kind in _ANALYZERS.items()}
    prompted = Prompted(model, asked.facts)

    def with_prompt(make: Callable[[], Find]) -> dict:
        return judging.judge(Choosing(make(), prompted.answer), asked)

    def with_experts(make: Callable[[], Find]) -> dict:
        return judging.judge(Choosing(make(), living.system.answer), asked)

    return {
        "bare": lambda: judging.judge_model(prompted.alone, asked),
        **{f"{name}_prompt": functools.partial(with_prompt, make) for name, make in finders.items()},
        **{f"{name}_experts": functools.partial(with_experts, make) for name, make in finders.items()},
        "grace_experts": lambda: with_experts(lambda: last_token(model, asked.facts)),
        "lora": lambda: dense(LoraMethod.create, config, prompted, living.asked, directory / "lora"),
        "full": lambda: dense(FullMethod.create, config, prompted, living.asked, directory / "full"),
    }


class Choosing:
    """A `System` of two: one finds the facts, another answers with them."""

    def __init__(self, find: Find, answer: Callable[[Sequence[str], Sequence[int]], list[str]]):
        self.find, self.answer = find, answer


def tfidf(facts: Sequence[Row], analyzer: str) -> Find:
    """Finds facts by scikit-learn's TF-IDF and cosine, of words (`word`) or of three letters in a row (`char_wb`)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=analyzer, ngram_range=(3, 3) if analyzer == "char_wb" else (1, 1))
    terms_FV = vectorizer.fit_transform([row.question for row in facts])
    return lambda questions: nearest((vectorizer.transform(questions) @ terms_FV.T).toarray())


def last_token(model: FrozenModel, facts: Sequence[Row]) -> Find:
    """Finds facts as GRACE does, by the Euclidean distance of the last token's hidden state where the memory begins."""

    def keys(questions):
        def read(prompt_BT, length_B):
            hidden_BTD = frozen_model.read_prefix(model, prompt_BT)
            return transformer.pick(hidden_BTD, length_B[:, None] - 1)[:, 0]

        return np.asarray(frozen_model.map_questions(model, questions, read), np.float64)

    keys_FD = keys([row.question for row in facts])

    def find(questions):
        asked_QD = keys(list(questions))
        squares_QF = (asked_QD**2).sum(1)[:, None] - 2 * asked_QD @ keys_FD.T + (keys_FD**2).sum(1)[None]
        return nearest(-np.sqrt(np.maximum(squares_QF, 0)))

    return find


def nearest(scores_QF: np.ndarray) -> Found:
    """The fact with the highest score, of several the first."""
    return Found(scores_QF.argmax(axis=1), scores_QF.max(axis=1))


class Prompted:
    """The backbone alone, which reads a fact that was found before the question."""

    def __init__(self, model: FrozenModel, facts: Sequence[Row]):
        self.model, self._facts = model, facts
        self._told: dict[str, str] = {}

    def alone(self, questions: Sequence[str]) -> list[str]:
        """What it says without any fact."""
        return self.answer(questions, [NO_FACT] * len(questions))

    def answer(self, questions: Sequence[str], index_Q: Sequence[int]) -> list[str]:
        """What it says to each question, the same one only once."""
        prompts = [self.prompt(text, int(fact)) for text, fact in zip(questions, index_Q, strict=True)]
        if new := [text for text in dict.fromkeys(prompts) if text not in self._told]:
            self._told |= dict(zip(new, answering.answers(self.model, BARE, new, TOKENS), strict=True))
        return [self._told[text] for text in prompts]

    def prompt(self, question: str, fact: int) -> str:
        """The question, after the fact if there is one."""
        if fact == NO_FACT:
            return question
        return f"Q: {self._facts[fact].question}\nA: {self._facts[fact].answer}\n\nQ: {question}\nA:"


def dense(
    create: Callable[..., TrainMethod], config: Config, backbone: Prompted, asked: Asked, directory: Path
) -> dict[str, Any]:
    """A model whose weights, or one adapter for all facts, are tuned until every fact holds or the budget ends.

    `unchanged` is the share of questions that nobody stored which it answers as the backbone does.
    """
    if config.backbone.path:
        asked = asked.sample(DENSE_ASKED, DENSE_FACTS)
        config = dataclasses.replace(config, tuning=dataclasses.replace(config.tuning, epochs=DENSE_EPOCHS))
    else:
        asked = asked.sample(ASKED)
    facts = [Fact(fact_id(row.question), row.question, row.answer) for row in asked.facts]
    run = Run(create(config, backbone.model, facts), directory, directory.name, until_all_hold=True)
    tuned = run.result()

    def tell(texts):
        return answering.answers(tuned.model, tuned.adapter_fn, texts, TOKENS)

    result = judging.judge_model(tell, asked)
    few = {kind: spread(texts, COMPARED) for kind, texts in asked.strangers.items()}
    same = {kind: list(map(str.__eq__, tell(texts), backbone.alone(texts))) for kind, texts in few.items()}
    unchanged = judging.with_intervals(same)
    result["intervals"]["unchanged"] = unchanged.pop("intervals")
    shutil.rmtree(directory)  # checkpoints of all weights, which nothing reads again
    more = {"count": len(facts), "epochs": tuned.progress.epoch, "certified": float(tuned.certified_F.mean())}
    return {**result, "unchanged": unchanged, **more}
