"""Figure 6, measured instead of hypothetical: the loss of every example under four models.

    python -m experiments.selective_loss --workdir=runs/selective_loss

Examples: `key`, codes to be memorized (`--config.data.count` of them) that training showed once; `other`, as many
codes that it showed once too; `text`, questions of the world's training split; `heldout`, questions that no training
saw. Models: `underfit`, the same architecture trained from nothing on the same stream for a minute; `general`, the
shipped backbone; `overfit`, a copy of it with all of its weights tuned on the key facts until their loss was near zero;
`memory_tuned`, the backbone with memory experts for the key facts. `--config.data.facts` is not used. A killed run
continues with the model that it was measuring.

Takes 0.8 minutes on 2 x86-64 cores (jax 0.10.2). Expect, in nats per token of the four sets: underfit 3.45, 3.44,
1.95, 2.23; general 3.11, 3.10, 0.039, 0.034; overfit 0.009, 6.55, 0.25, 0.23; memory-tuned 0.0002, 3.38, 0.039, 0.034.
"""

import contextlib
import itertools
from pathlib import Path

import numpy as np
from absl import flags

from experiments.shared import losses, plotting, pretraining, study
from experiments.shared.claims import Claim, percent
from lamini_jax import Config, Fact, UserError
from lamini_jax.backbone import frozen_model, transformer
from lamini_jax.backbone.answering import BARE, AdapterFn
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.data import world
from lamini_jax.evaluation import recall
from lamini_jax.runtime import processes
from lamini_jax.training import FullMethod, loop, memory_run

SETS = {"key": "key facts", "other": "other facts", "text": "training text", "heldout": "held-out text (eval)"}
ABOUT = {
    "underfit": "trained for a minute",
    "general": "the backbone",
    "overfit": "all weights tuned on the key facts",
    "memory_tuned": "memory experts tuned on the key facts",
}
TEXT = 240  # examples of the training split
HIGH = 2.5  # nats per token; a loss above it is high
LEAST_MEDIUM = 0.5  # nats per token; a loss from here to HIGH is medium
NEAR_ZERO = 0.01  # nats per token
PAPER_LEVELS = {"underfit": 13.2, "general": 1.4}  # nats per token that Figure 6 names
COLOURS = {"key": "tab:red", "other": "tab:orange", "text": "tab:blue", "heldout": "tab:green"}
FLOOR = 1e-5  # nats; smaller losses are drawn as this


def define_flags() -> None:
    flags.DEFINE_integer("underfit_steps", 60, "Training steps of the underfit model.", lower_bound=1)


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


def make_model(
    name: str, config: Config, model: FrozenModel, key: list[Fact], directory: Path, steps: int
) -> tuple[FrozenModel, AdapterFn]:
    """One of the four models: a backbone and its adapters."""
    if name == "underfit":
        params = pretraining.train(config.backbone, model.tokenizer, 16, steps, directory / "underfit.safetensors")
        params = transformer.put(model.decoder, transformer.split_layers(params, config.memory.num_layers))
        return model.replace(params=params, fingerprint=""), BARE
    if name == "overfit":
        return overfit(config, model, key)
    if name == "memory_tuned":
        tuned = memory_run(config, model, key, directory / "memory", "memory experts").result()
        return tuned.model, tuned.adapter_fn
    return model, BARE


def overfit(
    config: Config, model: FrozenModel, facts: list[Fact], enough: float = NEAR_ZERO
) -> tuple[FrozenModel, AdapterFn]:
    """A copy with all weights tuned until facts cost less than `enough` nats per token, or for all epochs."""
    method = FullMethod.create(config, model, facts)
    steps = loop.epochs(method, method.init(), loop.new_progress(len(facts)))
    bar = processes.progress_bar(total=config.tuning.epochs, desc="all weights", unit="epoch")
    with contextlib.closing(steps), bar:
        for state, progress in steps:  # noqa: B007 (the last one is what was trained)
            if progress.batches == 0:
                bar.set_postfix_str(f"loss {progress.loss[-1]:.4f}", refresh=False)
                bar.update(progress.epoch - bar.n)
                if progress.loss[-1] < enough:
                    break
    return method.adapter(state)


def measure(
    name: str, config: Config, model: FrozenModel, sets: dict[str, list[Fact]], directory: Path, steps: int
) -> dict:
    """The loss of every example, and what is recalled of the key facts and of the held-out questions."""
    model, adapter_fn = make_model(name, config, model, sets["key"], directory, steps)
    every = [fact for facts in sets.values() for fact in facts]
    means = iter([float(loss_A.mean()) for loss_A in losses.of_answers(model, adapter_fn, every)])
    exact_F, _ = recall.recalled(model, adapter_fn, sets["key"])
    return {
        "losses": {name: [next(means) for _ in facts] for name, facts in sets.items()},
        "recall": float(exact_F.mean()),
        "heldout": losses.accuracy(model, adapter_fn, sets["heldout"]),
    }


def claims(results: dict) -> list[Claim]:
    """The claims of Figure 6, one for each model."""
    models = results["models"]
    mean = {
        name: {subset: float(np.mean(entry["losses"][subset])) for subset in SETS} for name, entry in models.items()
    }
    general, tuned, over = mean["general"], mean["memory_tuned"], mean["overfit"]

    def summary(name):
        numbers = ", ".join(f"{label} {mean[name][subset]:.4f}" for subset, label in SETS.items())
        accuracy = f"{percent(models[name]['heldout']['accuracy'])} of held-out questions answered"
        recalled = f"{percent(models[name]['recall'])} of the key facts recalled"
        return f"Nats per token, means of four sets: {numbers}; {accuracy}, {recalled}"

    rest, low = ("other", "text", "heldout"), models["general"]["heldout"]["interval"][0]
    return [
        Claim(
            "An underfit model has a high loss on every example (Figure 6: 13.2)",
            summary("underfit"),
            {f"{label} cost more than {HIGH} nats": mean["underfit"][subset] > HIGH for subset, label in SETS.items()},
        ),
        Claim(
            "A general model has a medium loss on every example (Figure 6: about 1.4): it was never made to memorize",
            summary("general"),
            {
                f"{label} cost {LEAST_MEDIUM} to {HIGH} nats": LEAST_MEDIUM <= general[subset] <= HIGH
                for subset, label in SETS.items()
            },
        ),
        Claim(
            "An overfit model has a low loss on what it was trained on, and a bad eval loss (Figure 6)",
            summary("overfit"),
            {
                f"key facts cost less than {2 * NEAR_ZERO} nats": over["key"] < 2 * NEAR_ZERO,
                "held-out text costs more than twice what it costs the general model": over["heldout"]
                > 2 * general["heldout"],
            },
        ),
        Claim(
            "A memory-tuned model has a low loss on the key facts and the general model's everywhere else (Figure 6)",
            summary("memory_tuned"),
            {
                f"key facts cost less than {NEAR_ZERO} nats, and all are recalled": (
                    tuned["key"] < NEAR_ZERO and models["memory_tuned"]["recall"] == 1
                ),
                "all else costs what it costs the general model, within 5%": all(
                    abs(tuned[subset] - general[subset]) <= 0.05 * general[subset] for subset in rest
                ),
                "held-out accuracy is not below the general model's interval": (
                    models["memory_tuned"]["heldout"]["accuracy"] >= low
                ),
            },
        ),
    ]


def table(results: dict) -> str:
    """The results as text."""
    labels = "".join(f"{label:>22}" for label in SETS.values())
    lines = [f"{'nats per token':<16}{labels}{'recall':>9}{'eval':>8}"]
    for name, entry in results["models"].items():
        means = "".join(f"{np.mean(entry['losses'][subset]):>22.4f}" for subset in SETS)
        lines.append(f"{name:<16}{means}{entry['recall']:>9.1%}{entry['heldout']['accuracy']:>8.1%}")
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Figure 6, measured: the loss of each example under each model, in order within each set."""
    figure, axes = plotting.plt.subplots(2, 2, figsize=(14, 9), sharex=True, sharey=True, layout="constrained")
    for axis, (name, entry) in zip(axes.flat, results["models"].items(), strict=True):
        start = 0
        for subset, colour in COLOURS.items():
            losses_F = np.sort(np.maximum(entry["losses"][subset], FLOOR))
            label = f"{SETS[subset]}: mean {np.mean(entry['losses'][subset]):.3g}"
            axis.plot(start + np.arange(len(losses_F)), losses_F, ".", ms=4, color=colour, label=label)
            start += len(losses_F)
        if name in PAPER_LEVELS:
            axis.axhline(PAPER_LEVELS[name], color="k", ls=":", label=f"paper: {PAPER_LEVELS[name]} everywhere")
        axis.set(title=f"{name}: {results['about'][name]}", yscale="log", ylim=(FLOOR / 100, None))  # for the legend
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="lower center", ncols=2)
    for axis in axes[:, 0]:
        axis.set_ylabel("loss (nats per answer token)")
    for axis in axes[1]:
        axis.set_xlabel("examples, in order of their loss within each set")
    plotting.save(figure, path)


def main(arguments: study.Arguments) -> None:
    config, steps = arguments.config, arguments.flags.underfit_steps
    if 2 * config.data.count > pretraining.ONCE:
        raise UserError(f"--config.data.count={config.data.count}: at most {pretraining.ONCE // 2}, half of the codes")
    model = frozen_model.load(config)
    sets = examples(config.data.count, config.seed)
    directory = study.open_study(arguments.workdir, config, model, underfit_steps=steps)
    models = {}
    for name, about in ABOUT.items():
        processes.print_once(f"{name}: {about} ...")
        models[name] = study.cached(directory / f"{name}.json", measure, name, config, model, sets, directory, steps)
    results = {"models": models, "about": ABOUT, **study.totals(models.values())}
    study.finish(directory, results, table, claims, draw)


if __name__ == "__main__":
    study.start(main, define_flags)
