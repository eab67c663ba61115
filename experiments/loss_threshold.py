"""Which loss ends hallucination: Figures 2 and 3, and the threshold that follows from them.

    python -m experiments.loss_threshold --workdir=runs/loss_threshold

Facts with random answers are memorized, and at several epochs each fact's token losses are laid beside what the model
says. `certified`: each token's loss is below ln 2, so that greedy decoding must return the answer. `sampled`: at
temperature 1 an answer should come back with probability exp(-sum of its losses). `next_tokens`: what the model expects
at one fact's tokens while its loss is high, medium and zero (Figure 3). `once`: codes that the shipped backbone read
exactly once while it was trained (`experiments/pretrain_backbone.py`), beside codes that it never read; then memory
tuning of the former. A killed run continues from where it was.

Takes 5 minutes on 2 x86-64 cores (jax 0.10.2). Expect 940 of 1,920 measurements of a fact certified and all of those
recalled, recall to set in at 0.96 nats of the worst token, 56.0% of 8,480 samples right where 56.1% are expected, and
none of the 1,000 codes recalled before memory tuning, all after it.
"""

import json
import re
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments.parts import figures_of_loss, loss_claims, losses, pretraining, study
from lamini_jax import command, model, processes, recall, runs, tuning
from lamini_jax.config import Config
from lamini_jax.data import facts as facts_lib
from lamini_jax.data import world
from lamini_jax.data.facts import Fact

_CONFIG = command.define_config()
command.define_processes()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the study.", required=True)
_ONCE = flags.DEFINE_integer(
    "once", pretraining.ONCE, "Codes read once, to ask for and tune.", lower_bound=1, upper_bound=pretraining.ONCE
)

# Shares of the budget of epochs after which everything is measured, beside the beginning: memory tuning passes from no
# fact to all of them in the first third.
STAGES = (0.02, 0.04, 0.06, 0.08, 0.10, 0.12, 0.14, 0.16, 0.18, 0.20, 0.25, 0.30, 0.50, 1.00)
SAMPLED_FACTS = 32  # at each stage
CODE = re.compile("[A-Z0-9]{6}")  # what the answers of world.once look like


def stages(epochs: int) -> list[int]:
    """The epochs after which everything is measured."""
    return sorted({max(round(share * epochs), 1) for share in STAGES})


def measure(config: Config, base: model.Base, adapt: recall.Adapt, facts: list[Fact], epoch: int) -> dict:
    """Losses, recall and samples of each fact, and the distributions of the first, as they are now."""
    losses_FA = losses.of_answers(base, adapt, facts)
    probability_F = np.exp(-np.array([max(loss_A.sum(dtype=np.float64), 0.0) for loss_A in losses_FA]))
    drawn = [i for i in range(min(SAMPLED_FACTS, len(facts))) if probability_F[i] >= loss_claims.LEAST_LIKELY]
    key = jax.random.fold_in(jax.random.key(config.seed), epoch)
    hits = losses.sampled(base, adapt, [facts[i] for i in drawn], loss_claims.SAMPLES, key)
    return {
        "epoch": epoch,
        "loss": float(np.concatenate(losses_FA).mean()),
        "worst": [float(loss_A.max()) for loss_A in losses_FA],
        "mean": [float(loss_A.mean()) for loss_A in losses_FA],
        "tokens": [len(loss_A) for loss_A in losses_FA],
        "recalled": recall.accuracy(base, adapt, facts),
        "sampled": [{"probability": float(probability_F[i]), "hits": n} for i, n in zip(drawn, hits, strict=True)],
        "next_tokens": losses.expected(base, adapt, facts),
    }


def read_once(config: Config, base: model.Base, directory: Path, count: int) -> dict:
    """The codes that pretraining showed once: their loss and recall, and after memory tuning."""
    questions = losses.held_out(config.seed)
    both = losses.as_facts(world.once(2 * pretraining.ONCE, pretraining.SEED))
    seen, unseen = both[:count], both[pretraining.ONCE : pretraining.ONCE + count]

    def asked(adapt, facts):
        loss_FA = losses.of_answers(base, adapt, facts)
        worst_F = np.array([loss_A.max() for loss_A in loss_FA])
        exact_F, generated = runs.recalled(base, adapt, facts)
        wrong = [text for text, exact in zip(generated, exact_F, strict=True) if not exact]
        return {
            "facts": len(facts),
            "loss": float(np.concatenate(loss_FA).mean()),
            "losses": [float(loss_A.mean()) for loss_A in loss_FA],
            "recall": float(exact_F.mean()),
            "certificates": study.certificates(worst_F < tuning.certified_loss(config.backbone.dtype), exact_F),
            "wrong_but_codes": sum(CODE.fullmatch(text) is not None for text in wrong) / max(len(wrong), 1),
            "sample": {"question": facts[0].question, "answer": facts[0].answer, "generated": generated[0]},
        }

    processes.say(f"{count} codes that pretraining showed once, and as many that it did not ...")
    before = asked(recall.bare, seen) | {"heldout": losses.accuracy(base, recall.bare, questions)}
    never = asked(recall.bare, unseen)

    def make_router():
        return model.make_router(config, base, [fact.question for fact in seen])

    tuned = runs.tune_memory(config, base, make_router, seen, directory, "codes", until_all_hold=True)
    after = asked(tuned.adapt, seen) | {"heldout": losses.accuracy(base, tuned.adapt, questions)}
    after |= {"epochs": tuned.log.epoch, "certified": float(tuned.certified_F.mean())}
    return {"shown_in_pretraining": not config.backbone.path, "before": before, "unseen": never, "after": after}


def table(results: dict) -> str:
    """The results as text."""
    lines = [f"{'epoch':>5}{'nats/token':>12}{'certified':>11}{'recalled':>10}{'sampled':>9}{'expected':>10}"]
    for stage in results["stages"]:
        certified, recalled = np.less(stage["worst"], results["certified_loss"]), np.array(stage["recalled"])
        drawn = stage["sampled"]
        hits = f"{np.mean([entry['hits'] for entry in drawn]) / loss_claims.SAMPLES:>9.1%}" if drawn else f"{'-':>9}"
        likely = f"{np.mean([entry['probability'] for entry in drawn]):>10.1%}" if drawn else f"{'-':>10}"
        lines.append(
            f"{stage['epoch']:>5}{stage['loss']:>12.4f}{certified.mean():>11.1%}{recalled.mean():>10.1%}{hits}{likely}"
        )
    found, once = results["threshold"], results["once"]
    lines.append(f"{'worst token of':>20}{'facts':>7}{'recalled':>10}")
    for entry in found["by_worst_loss"]:
        if entry["facts"]:
            share = entry["recalled"] / entry["facts"]
            lines.append(f"{entry['from']:>14.2f} nats+{entry['facts']:>6}{share:>10.1%}")
    for name in ("before", "unseen", "after"):
        entry = once[name]
        lines.append(f"codes {name:<8} {entry['loss']:.4f} nats per token, {entry['recall']:.1%} recalled")
    return "\n".join(lines)


def main() -> None:
    config = model.configure(_CONFIG.value)
    command.start(config.mesh)
    data = config.data
    facts = facts_lib.load(data.facts, "random", data.count, config.seed, data.dir)
    base = model.load_base(config)
    identity = {"facts": runs.fingerprint(facts), "once": _ONCE.value, "backbone": base.fingerprint}
    directory = study.directory_of(_WORKDIR.value, config, **identity)
    started = time.time()
    watched = 0, *stages(config.tuning.epochs)

    def stage(epoch, adapt):
        if epoch in watched:
            study.kept(directory / f"epoch_{epoch}.json", lambda: measure(config, base, adapt, facts, epoch))

    def make_router():
        return model.make_router(config, base, [fact.question for fact in facts])

    stage(0, recall.bare)
    runs.tune_memory(config, base, make_router, facts, directory / "facts", "random answers", watch=stage)
    once = study.kept(directory / "once.json", lambda: read_once(config, base, directory / "codes", _ONCE.value))
    measured = [json.loads((directory / f"epoch_{epoch}.json").read_text()) for epoch in watched]
    certified_loss = tuning.certified_loss(config.backbone.dtype)
    results = {
        "certified_loss": certified_loss,
        "stages": measured,
        "threshold": loss_claims.threshold(measured, certified_loss),
        "sampling": loss_claims.calibration(measured),
        "next_tokens": loss_claims.three_levels(measured),
        "once": once,
        "seconds": round(time.time() - started, 1),
    }
    results["claims"] = loss_claims.of_threshold(results)
    stages_ = {name: results["threshold"][name] for name in ("certified", "certified_but_wrong")}
    results["certificates"] = study.added([stages_, *(once[name]["certificates"] for name in ("before", "after"))])
    study.finish(directory, results, table(results), figures_of_loss.threshold)


if __name__ == "__main__":
    command.run(main)
