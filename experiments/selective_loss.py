"""Figure 6, measured instead of hypothetical: the loss of every example under four models.

    python -m experiments.selective_loss --workdir=runs/selective_loss

Examples: `key`, codes to be memorized (`--config.data.count` of them) that training showed once; `other`, as many
codes that it showed once too; `text`, questions of the world's training split; `heldout`, questions that no training
saw. Models: `underfit`, the same architecture trained from nothing on the same stream for a minute; `general`, the
shipped backbone; `overfit`, a copy of it, all of whose weights were tuned on the key facts until their loss was near
zero; `memory_tuned`, the backbone with memory experts for the key facts. `--config.data.facts` is not used. A killed
run continues with the model that it was in.

Takes 2.5 minutes on 2 x86-64 cores (jax 0.10.2). Expect, in nats per token of the four sets: underfit 3.45, 3.44,
1.95, 2.23; general 3.11, 3.10, 0.039, 0.034; overfit 0.009, 6.53, 0.24, 0.25; memory-tuned 0.0002, 3.38, 0.039, 0.034.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags

from experiments.parts import figures_of_loss, loss_claims, losses, pretraining, study
from experiments.parts.loss_claims import NEAR_ZERO, SETS
from lamini_jax import backbone, command, model, processes, recall, runs
from lamini_jax.config import Config
from lamini_jax.data import world
from lamini_jax.data.facts import Fact
from lamini_jax.errors import UserError

_CONFIG = command.define_config()
command.define_processes()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the study.", required=True)
_UNDERFIT_STEPS = flags.DEFINE_integer("underfit_steps", 60, "Training steps of the underfit model.", lower_bound=1)

ABOUT = {
    "underfit": "trained for a minute",
    "general": "the backbone",
    "overfit": "all weights tuned on the key facts",
    "memory_tuned": "memory experts tuned on the key facts",
}
TEXT = 240  # examples of the training split


def examples(count: int, seed: int) -> dict[str, list[Fact]]:
    """The four sets."""
    once = world.once(pretraining.ONCE, pretraining.SEED)
    stream = world.training_stream(pretraining.SEED)
    text = {qa.question: qa for qa in itertools.islice(stream, 2 * TEXT)}
    sets = {
        "key": once[:count],
        "other": once[count : 2 * count],
        "text": list(text.values())[:TEXT],
        "heldout": losses.held_out(seed),
    }
    return {name: losses.as_facts(qas) for name, qas in sets.items()}


def underfit(config: Config, base: model.Base, directory: Path, steps: int) -> model.Base:
    """The same architecture after few steps of the training that made the shipped backbone."""
    path = directory / "underfit.safetensors"
    whole = pretraining.train(config.backbone, base.tokenizer, 16, steps, path)
    params = backbone.put(base.decoder, backbone.cut(whole, config.memory.layers))
    return dataclasses.replace(base, params=params, fingerprint="")


def measure(base: model.Base, adapt: recall.Adapt, sets: dict[str, list[Fact]]) -> dict:
    """The loss of every example, and what is recalled of the key facts and of the held-out questions."""
    every = [fact for facts in sets.values() for fact in facts]
    means = iter([float(loss_A.mean()) for loss_A in losses.of_answers(base, adapt, every)])
    exact_F, _ = runs.recalled(base, adapt, sets["key"])
    return {
        "losses": {name: [next(means) for _ in facts] for name, facts in sets.items()},
        "recall": float(exact_F.mean()),
        "heldout": losses.accuracy(base, adapt, sets["heldout"]),
    }


def models(config: Config, base: model.Base, key: list[Fact], directory: Path, steps: int) -> dict[str, Callable]:
    """What makes each model: a backbone and what is added to it."""

    def make_router():
        return model.make_router(config, base, [fact.question for fact in key])

    def memory_tuned():
        return base, runs.tune_memory(config, base, make_router, key, directory / "memory", "memory experts").adapt

    return {
        "underfit": lambda: (underfit(config, base, directory, steps), recall.bare),
        "general": lambda: (base, recall.bare),
        "overfit": lambda: (pretraining.tune_all_weights(config, base, key, NEAR_ZERO), recall.bare),
        "memory_tuned": memory_tuned,
    }


def table(results: dict) -> str:
    """The results as text."""
    labels = "".join(f"{label:>22}" for label in SETS.values())
    lines = [f"{'nats per token':<16}{labels}{'recall':>9}{'eval':>8}"]
    for name, entry in results["models"].items():
        means = "".join(f"{np.mean(entry['losses'][subset]):>22.4f}" for subset in SETS)
        lines.append(f"{name:<16}{means}{entry['recall']:>9.1%}{entry['heldout']['accuracy']:>8.1%}")
    return "\n".join(lines)


def main() -> None:
    config = model.configure(_CONFIG.value)
    if 2 * config.data.count > pretraining.ONCE:
        raise UserError(f"--config.data.count={config.data.count}: at most {pretraining.ONCE // 2}, half of the codes")
    command.start(config.mesh)
    base = model.load_base(config)
    sets = examples(config.data.count, config.seed)
    identity = {"underfit_steps": _UNDERFIT_STEPS.value, "backbone": base.fingerprint}
    directory = study.directory_of(_WORKDIR.value, config, **identity)
    found = {}
    for name, make in models(config, base, sets["key"], directory, _UNDERFIT_STEPS.value).items():
        processes.say(f"{name}: {ABOUT[name]} ...")
        found[name] = study.kept(directory / f"{name}.json", lambda make=make: measure(*make(), sets))
    results = {
        "models": found,
        "about": ABOUT,
        "claims": loss_claims.of_selective(found),
        "seconds": round(sum(entry["seconds"] for entry in found.values()), 1),
    }
    study.finish(directory, results, table(results), figures_of_loss.selective)


if __name__ == "__main__":
    command.run(main)
