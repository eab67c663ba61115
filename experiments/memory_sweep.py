"""How deep a memory must be, and how it is best tuned: epochs until answers of 32 random characters are certified.

    python -m experiments.memory_sweep --workdir=runs/memory_sweep --config=experiments/configs/smollm2.py

The same facts are memorized with each combination of the memory's layers, the experts of a fact, and the optimizer with
its rate. Random answers cannot be guessed in part, so that they ask more of a memory than any true ones of that length.
A killed sweep continues where it was stopped.
"""

import dataclasses
import itertools
import statistics
from pathlib import Path

from absl import flags

from experiments.shared import plotting, study
from experiments.shared.claims import percent
from lamini_jax import Config, UserError
from lamini_jax.backbone import frozen_model
from lamini_jax.config import OptimizerConfig, certified_loss
from lamini_jax.memory import experts
from lamini_jax.training import optimizers, run


def define_flags() -> None:
    flags.DEFINE_list("layers", ["2", "4", "8"], "Numbers of memory layers, from the last one down.")
    flags.DEFINE_list("top_k", ["8", "32"], "Experts of a fact.")
    names = ["adafactor:0.04", "adam:0.01", "adam:0.02"]
    flags.DEFINE_list("optimizers", names, "NAME:RATE of the optimizers of the experts.")


def settings(config: Config, asked) -> dict[str, Config]:
    """By its name, the config of each run. Raises UserError for a flag that names none."""
    found = {}
    for layers, top_k, text in itertools.product(
        study.positive_integers("layers", asked.layers),
        study.positive_integers("top_k", asked.top_k),
        asked.optimizers,
    ):
        optimizer = _optimizer(text)
        if layers >= config.backbone.num_layers:
            raise UserError(f"--layers={layers}: must be below the backbone's {config.backbone.num_layers} layers")
        memory = dataclasses.replace(config.memory, num_layers=layers, top_k=top_k)
        tuning = dataclasses.replace(config.tuning, optimizer=optimizer)
        found[f"{layers} layers, K = {top_k}, {text}"] = dataclasses.replace(config, memory=memory, tuning=tuning)
    return found


def _optimizer(text: str) -> OptimizerConfig:
    name, _, rate = text.partition(":")
    try:
        optimizer = OptimizerConfig(name, float(rate))
    except ValueError:
        raise UserError(f"--optimizers={text}: must be NAME:RATE, such as adam:0.01") from None
    optimizers.check(optimizer, "tuning.optimizer")
    if not 0 < optimizer.learning_rate < float("inf"):
        raise UserError(f"--optimizers={text}: the rate must be a positive number")
    return optimizer


def measure(config: Config, directory: Path, title: str) -> dict:
    """Tunes until every fact holds, or to the end of the budget of epochs."""
    model, facts = study.load(config, "random")
    tuned = run.memory_run(config, model, facts, directory, title, until_all_hold=True).result()
    progress, shape = tuned.progress, experts.expert_shape(config.backbone, config.memory)
    holding = int((progress.worst_F < certified_loss(config.backbone.dtype)).sum())
    return {
        "layers": config.memory.num_layers,
        "top_k": config.memory.top_k,
        "optimizer": f"{config.tuning.optimizer.name}:{config.tuning.optimizer.learning_rate:g}",
        "loss": progress.loss,
        "certified": progress.certified,
        "holding": holding,
        "epochs": progress.epoch,
        "seconds_per_epoch": statistics.median(progress.seconds[1:] or progress.seconds),
        "floats_per_fact": config.memory.top_k * shape.floats,
    }


def table(results: dict) -> str:
    """The results as text, best first."""
    count = results["facts"]
    lines = [f"{'layers':>6}{'K':>4}  {'optimizer':<16}{'certified':>10}{'epochs':>8}{'s/epoch':>9}{'floats/fact':>13}"]
    for one in sorted(results["runs"].values(), key=lambda one: (-one["holding"], one["epochs"])):
        lines.append(
            f"{one['layers']:>6}{one['top_k']:>4}  {one['optimizer']:<16}{percent(one['holding'] / count):>10}"
            f"{one['epochs']:>8}{one['seconds_per_epoch']:>9.2f}{one['floats_per_fact']:>13,}"
        )
    lines.append(
        f"{count} facts with 32 random characters each, on {results['target']}, positions {results['positions']}"
    )
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """The share of certified facts against the epoch, a panel for each number of layers."""
    depths = sorted({one["layers"] for one in results["runs"].values()})
    figure, axes = plotting.plt.subplots(
        1, len(depths), figsize=(4.5 * len(depths), 4.5), layout="constrained", sharey=True, squeeze=False
    )
    for axis, layers in zip(axes[0], depths, strict=True):
        for one in results["runs"].values():
            if one["layers"] == layers:
                share = [certified / results["facts"] for certified in one["certified"]]
                axis.plot(range(1, len(share) + 1), share, label=f"K = {one['top_k']}, {one['optimizer']}")
        axis.set(title=f"{layers} memory layers", xlabel="epoch", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0][0].set_ylabel("share of facts certified")
    plotting.save(figure, path, dpi=120)


def main(arguments: study.Arguments) -> None:
    config, found = arguments.config, settings(arguments.config, arguments.flags)
    model = frozen_model.load(config)
    directory = study.open_study(arguments.workdir, config, backbone=model.fingerprint)
    results = {
        "facts": config.data.count,
        "target": config.memory.target,
        "positions": config.memory.positions,
        "runs": {},
    }
    for number, (name, setting) in enumerate(found.items(), 1):
        place = directory / name.replace(", ", "_").replace(" ", "").replace(":", "_")
        title = f"run {number} of {len(found)}, {name}"
        results["runs"][name] = study.cached(place / "result.json", measure, setting, place, title)
    results |= study.totals(results["runs"].values())
    study.finish(directory, results, table, draw=draw)


if __name__ == "__main__":
    study.start(main, define_flags)
