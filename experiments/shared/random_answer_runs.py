"""The runs of the random-answer study: LoRA and memory experts, on the same facts with true and random answers."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax

from experiments.shared import study
from lamini_jax import Config, Fact
from lamini_jax.backbone import frozen_model
from lamini_jax.data import datasets
from lamini_jax.memory import routers
from lamini_jax.runtime import processes
from lamini_jax.training import run

# By name, what the memory of a run has of its own. The paper's memory acts on all tokens.
METHODS = {
    "lora": None,
    "mome_o_proj": {"target": "o_proj", "positions": "all"},
    "mome_down_proj": {"target": "down_proj", "positions": "all"},
    "mome_on_answers": {"target": "down_proj", "positions": "answer"},
}
RUNS = [f"{method}/{answers}" for method in METHODS for answers in datasets.ANSWERS]
PAPER_METHODS = [name for name in METHODS if name != "mome_on_answers"]
PAPER_RUNS = [name for name in RUNS if name.split("/")[0] in PAPER_METHODS]


class Setting(NamedTuple):
    """What all runs have in common."""

    config: Config
    model: frozen_model.FrozenModel
    facts: dict[str, list[Fact]]  # with true and with random answers
    router: routers.Router
    directory: Path

    @property
    def questions(self) -> list[str]:
        """The facts' questions, which are the same with true and with random answers."""
        return [fact.question for fact in self.facts["true"]]


def prepare(config: Config, workdir: str) -> Setting:
    """Facts, backbone and router of a study, in its directory. Raises UserError if that belongs to another study."""
    model = frozen_model.load(config)
    limits = model.tokenizer, model.max_seq_len
    facts = {answers: datasets.load(config.data, answers, config.seed, *limits) for answers in datasets.ANSWERS}
    directory = study.open_study(workdir, config, model, [*facts["true"], *facts["random"]])
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    processes.print_once(f"{config.data.count} facts on {devices}; training the router ...")
    router = routers.train(config, model, [fact.question for fact in facts["true"]])
    return Setting(config, model, facts, router, directory)


def tune(setting: Setting, name: str) -> tuple[run.Tuned, list[Fact]]:
    """One of RUNS, continued from its last checkpoint, and its facts."""
    method, answers = name.split("/")
    facts, directory = setting.facts[answers], setting.directory / name.replace("/", "_")
    title = f"run {RUNS.index(name) + 1} of {len(RUNS)}, {name}"
    if METHODS[method] is None:
        return run.lora_run(setting.config, setting.model, facts, directory, title).result(), facts
    memory = dataclasses.replace(setting.config.memory, **METHODS[method])
    config = dataclasses.replace(setting.config, memory=memory)
    return run.memory_run(config, setting.model, facts, directory, title, router=setting.router).result(), facts
