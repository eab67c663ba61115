"""The six runs of the random-answer study: LoRA and memory experts, on the same facts with true and random answers."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax

from experiments.parts import study
from lamini_jax import model, processes, router, runs
from lamini_jax.config import Config
from lamini_jax.data import facts as facts_lib

METHODS = {"lora": None, "mome_o_proj": "o_proj", "mome_down_proj": "down_proj"}
RUNS = [f"{method}/{answers}" for method in METHODS for answers in facts_lib.ANSWERS]


class Setting(NamedTuple):
    """What all six runs have in common."""

    config: Config
    base: model.Base
    facts: dict[str, list[facts_lib.Fact]]  # with true and with random answers
    routing: router.Router
    directory: Path


def prepare(config: Config, workdir: str) -> Setting:
    """Facts, backbone and router of a study, in its directory. Raises UserError if that belongs to another study."""
    data = config.data
    facts = {
        answers: facts_lib.load(data.facts, answers, data.count, config.seed, data.dir) for answers in facts_lib.ANSWERS
    }
    base = model.load_base(config)
    directory = study.directory_of(workdir, config, facts=fingerprints(facts), backbone=base.fingerprint)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    processes.say(f"{data.count} facts on {devices}; training the router ...")
    return Setting(config, base, facts, model.make_router(config, base, questions_of(facts)), directory)


def fingerprints(facts: dict[str, list[facts_lib.Fact]]) -> dict[str, str]:
    """What tells the facts of one setting from those of another."""
    return {answers: runs.fingerprint(facts[answers]) for answers in facts}


def questions_of(facts: dict[str, list[facts_lib.Fact]]) -> list[str]:
    """The questions, which are the same with true and with random answers."""
    return [fact.question for fact in facts["true"]]


def tune(setting: Setting, name: str) -> tuple[runs.Tuned, list[facts_lib.Fact]]:
    """One of RUNS, gone on with from its last checkpoint, and its facts."""
    method, answers = name.split("/")
    facts, directory = setting.facts[answers], setting.directory / name.replace("/", "_")
    title = f"run {RUNS.index(name) + 1} of {len(RUNS)}, {name}"
    if METHODS[method] is None:
        return runs.tune_lora(setting.config, setting.base, facts, directory, title), facts
    memory = dataclasses.replace(setting.config.memory, target=METHODS[method])
    config = dataclasses.replace(setting.config, memory=memory)
    return runs.tune_memory(config, setting.base, lambda: setting.routing, facts, directory, title), facts
