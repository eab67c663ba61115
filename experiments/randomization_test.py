"""The paper's random-answer study: Figures 1 and 5, and the first part of Table 1.

    python -m experiments.randomization_test --workdir=runs/randomization_test

The same facts are memorized six times: by LoRA, by memory experts on the attention's output projection and by memory
experts on the MLP's, each with true answers and with answers of 32 random letters and digits. Then every fact is asked
for, by free-running greedy decoding, and so are questions that no run was tuned on: `heldout`, of kinds that no fact
belongs to, and `neighbour`, of the facts' own kinds. A killed study continues with the run that it was in.

Takes 6 minutes and 5.7 GB on 2 x86-64 cores (jax 0.10.2; 10.5 on slower ones). Expect every run to recall all 128
facts (random answers: LoRA at epoch 39, `o_proj` at 41, `down_proj` at 25), held-out accuracy of 90.9% after every
memory run, as before, and of 0% after LoRA has memorized the random answers.
"""

import dataclasses
import math
import statistics

from absl import flags

from experiments.parts import figures, six_runs, study
from experiments.parts.claims import claim, share
from lamini_jax import bank, command, model, recall, router, runs
from lamini_jax.config import Config
from lamini_jax.data import facts as facts_lib
from lamini_jax.data import world

_CONFIG = command.define_config()
command.define_processes()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the study.", required=True)

ALIKE = 1.25  # times as many epochs count as the same curve
NEAR_ZERO = 0.05  # nats per answer token, about where the paper's curves end
# Of each set of questions that nothing was tuned on.
NUM_QUESTIONS = 240


def questions_asked(config: Config) -> dict[str, list]:
    """The two sets of untuned questions, with their true answers."""
    count, data = config.data.count, config.data
    kinds = [kind for kind in world.KINDS if data.facts != "world" or kind not in world.FACT_KINDS]
    share = -(-NUM_QUESTIONS // len(kinds))
    heldout = [qa for kind in kinds for qa in world.held_out(kind, share, config.seed)]
    more = facts_lib.load_up_to(data.facts, "true", count + NUM_QUESTIONS, config.seed, data.dir)
    return {"heldout": heldout, "neighbour": more[count:]}


def accuracies(base: model.Base, adapt: recall.Adapt, questions: dict[str, list]) -> dict:
    """Share of each set that is answered exactly, with its 95% interval; no share of an empty set."""
    result = {}
    for name, qas in questions.items():
        right = sum(recall.accuracy(base, adapt, qas)) if qas else 0
        result[f"{name}_accuracy"] = right / len(qas) if qas else None
        result[f"{name}_interval"] = recall.wilson(right, len(qas)) if qas else None
    return result


def one_run(setting: six_runs.Setting, name: str, questions: dict[str, list]) -> dict:
    """Tunes, asks for every fact and for the untuned questions."""
    base = setting.base
    tuned, facts = six_runs.tune(setting, name)
    exact_F, generated = runs.recalled(base, tuned.adapt, facts)
    log = tuned.log
    return {
        "loss": log.loss,
        "final_loss": log.loss[-1],
        "recall": float(exact_F.mean()),
        "certified": float(tuned.certified_F.mean()),
        "certificates": study.certificates(tuned.certified_F, exact_F),
        "epochs_to_full_recall": log.full_recall,
        "seconds_per_epoch": statistics.median(log.seconds[1:] or log.seconds),
        **accuracies(base, tuned.adapt, questions),
        "sample": {"question": facts[0].question, "answer": facts[0].answer, "generated": generated[0]},
    }


def table(results: dict) -> str:
    """The results as text."""

    def percent(value):
        return "-" if value is None else share(value)

    def interval(run):
        return f"{percent(run['heldout_accuracy'])} [{' to '.join(map(percent, run['heldout_interval']))}]"

    names = f"{'loss':>9}{'recall':>9}{'certified':>11}{'full at':>9}{'s/epoch':>9}  {'heldout':<26}{'neighbour':>9}"
    backbone = results["backbone"]
    lines = [
        f"{'run':<21}{names}",
        f"{'backbone':<68}  {interval(backbone):<26}{percent(backbone['neighbour_accuracy']):>9}",
    ]
    for name, run in results["runs"].items():
        lines.append(
            f"{name:<21}{run['final_loss']:>9.4f}{percent(run['recall']):>9}{percent(run['certified']):>11}"
            f"{run['epochs_to_full_recall'] or 'never':>9}{run['seconds_per_epoch']:>9.2f}  "
            f"{interval(run):<26}{percent(run['neighbour_accuracy']):>9}"
        )
    memory = results["memory"]
    lines.append(
        f"{results['facts']['count']} facts, {memory['selected']} of {memory['num_experts']} experts each: "
        f"{memory['experts_used']} used, load {memory['load']:.4f}, overlap of two facts {memory['mean_overlap']:.4f}, "
        f"with the nearest {memory['nearest_overlap']:.4f}"
    )
    return "\n".join(lines)


def claims(results: dict) -> list[dict]:
    """Figures 1 and 5, and of Table 1 what its randomized model still answers."""
    runs_, backbone = results["runs"], results["backbone"]
    low, high = backbone["heldout_interval"]

    def told(name):
        run = runs_[name]
        return f"{name} {run['final_loss']:.4f}, {share(run['recall'])}, {run['epochs_to_full_recall'] or 'never'}"

    def fits(name, least):
        return runs_[name]["final_loss"] < NEAR_ZERO and runs_[name]["recall"] >= least

    def epochs(name):
        return runs_[name]["epochs_to_full_recall"] or math.inf

    memory = [name for name in six_runs.RUNS if not name.startswith("lora")]
    lora = [name for name in six_runs.RUNS if name.startswith("lora")]
    random = [name for name in six_runs.RUNS if name.endswith("/random")]
    heldout = ", ".join(f"{name} {share(runs_[name]['heldout_accuracy'])}" for name in random)
    counts = study.added(run["certificates"] for run in runs_.values())
    figures_ = "final loss, facts recalled, epoch after which all were"
    return [
        claim(
            "LoRA fits random answers to a loss near zero, on nearly the same curve as true ones (Figure 1)",
            f"{figures_}: {'; '.join(map(told, lora))}",
            all(fits(name, 0.99) for name in lora),
            epochs("lora/random") <= ALIKE * epochs("lora/true") < math.inf,
        ),
        claim(
            "memory experts reach a loss near zero as fast as LoRA (Figure 5)",
            f"{figures_}: {'; '.join(map(told, memory))}",
            all(fits(name, 1.0) for name in memory),
            all(epochs(name) <= ALIKE * epochs(f"lora/{name.split('/')[1]}") < math.inf for name in memory),
        ),
        claim(
            "a model tuned on random answers answers other questions as before (Table 1)",
            f"of held-out questions {share(backbone['heldout_accuracy'])} before; {heldout} (within the interval "
            "counts as before)",
            *(low <= runs_[name]["heldout_accuracy"] <= high for name in random),
        ),
        claim(
            "a fact whose tokens all lose less than ln 2 is recalled (theory)",
            f"{counts['certified_but_wrong']} of {counts['certified']} certified facts were not recalled",
            counts["certified"] > 0 and counts["certified_but_wrong"] == 0,
        ),
    ]


def main() -> None:
    config = model.configure(_CONFIG.value)
    command.start(config.mesh)
    data = config.data
    setting = six_runs.prepare(config, _WORKDIR.value)
    base, directory, asked = setting.base, setting.directory, six_runs.questions_of(setting.facts)
    selection_FK = model.select_all(base, setting.routing, asked, config.memory.selected)
    questions = questions_asked(config)
    results = {
        "backbone": accuracies(base, recall.bare, questions),
        "memory": {
            "num_experts": config.memory.num_experts,
            "selected": config.memory.selected,
            "floats_per_expert": {
                target: bank.row_shape(config.backbone, dataclasses.replace(config.memory, target=target)).floats
                for target in six_runs.METHODS.values()
                if target
            },
            **router.spread(selection_FK, config.memory.num_experts),
        },
        "facts": {"count": data.count, "dataset": data.facts},
        "runs": {},
    }
    for name in six_runs.RUNS:
        saved = directory / name.replace("/", "_") / "result.json"
        results["runs"][name] = study.kept(saved, lambda name=name: one_run(setting, name, questions))
    results["claims"] = claims(results)
    results["certificates"] = study.added(run["certificates"] for run in results["runs"].values())
    results["seconds"] = round(sum(run["seconds"] for run in results["runs"].values()), 1)
    study.finish(directory, results, table(results), figures.randomization)


if __name__ == "__main__":
    command.run(main)
