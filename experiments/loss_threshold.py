"""Which loss ends hallucination: Figures 2 and 3, and the threshold that follows from them.

    python -m experiments.loss_threshold --workdir=runs/loss_threshold

Facts with random answers are memorized, and at several epochs each fact's token losses are compared with what the model
says. `certified`: each token's loss is below ln 2, so that greedy decoding must return the answer. `sampled`: at
temperature 1 an answer should come back with probability exp(-sum of its losses). `next_tokens`: the model's
probabilities at one fact's tokens while its loss is high, medium and zero (Figure 3). `once`: codes that the shipped
backbone read exactly once in training (`experiments/pretrain_backbone.py`), compared with codes that it never read;
then memory tuning of the former. Beside another backbone, the true answers to the facts' questions take their place:
what it says to them before memory tuning and after, and, with TruthfulQA, whether it finds one of the false answers
that belong to a question likelier than the true one. A killed run continues where it was stopped.

Takes 1.4 minutes on 2 x86-64 cores (jax 0.10.2). Expect 938 of 1,920 measurements of a fact to be certified and all of
those recalled, recall to begin where the worst token costs 0.84 nats, 56.2% of 8,544 samples to be right where 56.1%
are expected, and none of the 1,000 codes to be recalled before memory tuning, all of them after it.
"""

import dataclasses
import json
import re
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments import loss_threshold_claims as analysis
from experiments.loss_threshold_claims import claims
from experiments.shared import held_out, losses, plotting, pretraining, sizes, study
from lamini_jax import Fact
from lamini_jax.backbone.answering import BARE, AdapterFn
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config, certified_loss
from lamini_jax.data import datasets, world
from lamini_jax.evaluation import recall
from lamini_jax.runtime import processes
from lamini_jax.training import run

# When everything is measured, in addition to the beginning and the end: shares of the epochs in which memory tuning
# goes from no fact to all of them (`sizes.tuned_within`).
STAGES = (0.06, 0.12, 0.18, 0.24, 0.30, 0.36, 0.42, 0.48, 0.54, 0.60, 0.75, 0.90, 1.50)
FLOOR = 1e-5  # nats; smaller losses are drawn as this
CODE = re.compile("[A-Z0-9]{6}")  # what the answers of world.once look like


def define_flags() -> None:
    about, most = "Codes read once, to ask for and tune.", pretraining.ONCE
    flags.DEFINE_integer("once", most, about, lower_bound=1, upper_bound=most)


def stages(config: Config) -> list[int]:
    """The epochs after which everything is measured."""
    last = config.tuning.epochs
    first = {round(share * sizes.of(config).tuned_within * last) for share in STAGES}
    return sorted({min(max(epoch, 1), last) for epoch in first} | {last})


def measure(config: Config, model: FrozenModel, adapter_fn: AdapterFn, facts: list[Fact], epoch: int) -> dict:
    """Losses, recall and samples of each fact at this stage, and the distributions at the first fact's tokens."""
    losses_FA = losses.of_answers(model, adapter_fn, facts)
    probability_F = np.exp(-np.array([max(loss_A.sum(dtype=np.float64), 0.0) for loss_A in losses_FA]))
    drawn = [
        i for i in range(min(sizes.of(config).sampled_facts, len(facts))) if probability_F[i] >= analysis.LEAST_LIKELY
    ]
    key = jax.random.fold_in(jax.random.key(config.seed), epoch)
    hits = losses.sampled(model, adapter_fn, [facts[i] for i in drawn], analysis.SAMPLES, key)
    return {
        "epoch": epoch,
        "loss": float(np.concatenate(losses_FA).mean()),
        "worst": [float(loss_A.max()) for loss_A in losses_FA],
        "mean": [float(loss_A.mean()) for loss_A in losses_FA],
        "recalled": recall.accuracy(model, adapter_fn, facts),
        "sampled": [{"probability": float(probability_F[i]), "hits": n} for i, n in zip(drawn, hits, strict=True)],
        "next_tokens": losses.expected(model, adapter_fn, facts),
    }


def code_results(model: FrozenModel, adapter_fn: AdapterFn, facts: list[Fact], dtype: str) -> dict:
    """The losses of codes, how many are recalled, and whether wrong answers look like codes."""
    loss_FA = losses.of_answers(model, adapter_fn, facts)
    worst_F = np.array([loss_A.max() for loss_A in loss_FA])
    exact_F, generated = recall.recalled(model, adapter_fn, facts)
    wrong = [text for text, exact in zip(generated, exact_F, strict=True) if not exact]
    return {
        "facts": len(facts),
        "loss": float(np.concatenate(loss_FA).mean()),
        "losses": [float(loss_A.mean()) for loss_A in loss_FA],
        "recall": float(exact_F.mean()),
        "certificates": study.certificates(worst_F < certified_loss(dtype), exact_F),
        "wrong": len(wrong),
        "wrong_but_codes": sum(CODE.fullmatch(text) is not None for text in wrong) / max(len(wrong), 1),
    }


def read_once(config: Config, model: FrozenModel, directory: Path, count: int) -> dict:
    """The codes that pretraining showed once: their loss and recall before and after memory tuning."""
    questions, dtype = losses.held_out(config.seed), config.backbone.dtype
    both = losses.as_facts(world.once(2 * pretraining.ONCE, pretraining.SEED))
    seen, unseen = both[:count], both[pretraining.ONCE : pretraining.ONCE + count]
    processes.print_once(f"{count} codes that pretraining showed once, and as many that it did not ...")
    before = code_results(model, BARE, seen, dtype) | {"heldout": losses.accuracy(model, BARE, questions)}
    never = code_results(model, BARE, unseen, dtype)
    tuned = run.memory_run(config, model, seen, directory, "codes", until_all_hold=True).result()
    after = code_results(tuned.model, tuned.adapter_fn, seen, dtype)
    after |= {"heldout": losses.accuracy(tuned.model, tuned.adapter_fn, questions)}
    after |= {"epochs": tuned.progress.epoch, "certified": float(tuned.certified_F.mean())}
    return {"before": before, "unseen": never, "after": after}


def false_answers(config: Config) -> dict[str, list[str]]:
    """The false answers to each question of TruthfulQA; none for the facts of other data sets."""
    items = held_out.truthful_qa(config) if config.data.facts == "truthful_qa" else []
    return {
        item.question: [text.strip() for text, right in zip(item.choices, item.right, strict=True) if not right]
        for item in items
    }


def misbelieved(model: FrozenModel, adapter_fn: AdapterFn, facts: list[Fact], false: dict[str, list[str]]) -> int:
    """Of how many facts a false answer is likelier than the true one."""
    stated = [[fact.answer, *false[fact.question]] for fact in facts]
    asked = [
        dataclasses.replace(fact, answer=text) for fact, texts in zip(facts, stated, strict=True) for text in texts
    ]
    summed = (float(loss_A.sum()) for loss_A in losses.of_answers(model, adapter_fn, asked))
    losses_FC = [[next(summed) for _ in texts] for texts in stated]
    return sum(min(loss_C[1:]) < loss_C[0] for loss_C in losses_FC)


def believed(config: Config, model: FrozenModel, directory: Path) -> dict:
    """What a real model says to the facts' questions, and after memory tuning of the true answers."""
    facts = datasets.load(config.data, "true", config.seed, model.tokenizer, model.max_seq_len)
    false = false_answers(config)

    def found(model, adapter_fn):
        counted = {"misbelieved": misbelieved(model, adapter_fn, facts, false)} if false else {}
        return code_results(model, adapter_fn, facts, config.backbone.dtype) | counted

    processes.print_once(f"what the model believes of {len(facts)} facts ...")
    before = found(model, BARE)
    tuned = run.memory_run(config, model, facts, directory, "true answers", until_all_hold=True).result()
    return {"before": before, "after": found(tuned.model, tuned.adapter_fn) | {"epochs": tuned.progress.epoch}}


def table(results: dict) -> str:
    """The results as text."""
    lines = [f"{'epoch':>5}{'nats/token':>12}{'certified':>11}{'recalled':>10}{'sampled':>9}{'expected':>10}"]
    for stage in results["stages"]:
        certified, recalled = np.less(stage["worst"], results["certified_loss"]), np.array(stage["recalled"])
        drawn = stage["sampled"]
        hits = f"{np.mean([entry['hits'] for entry in drawn]) / analysis.SAMPLES:>9.1%}" if drawn else f"{'-':>9}"
        likely = f"{np.mean([entry['probability'] for entry in drawn]):>10.1%}" if drawn else f"{'-':>10}"
        lines.append(
            f"{stage['epoch']:>5}{stage['loss']:>12.4f}{certified.mean():>11.1%}{recalled.mean():>10.1%}{hits}{likely}"
        )
    counts, once = results["threshold"], results["once"]
    lines.append(f"{'worst token of':>20}{'facts':>7}{'recalled':>10}")
    for entry in counts["by_worst_loss"]:
        if entry["facts"]:
            share = entry["recalled"] / entry["facts"]
            lines.append(f"{entry['from']:>14.2f} nats+{entry['facts']:>6}{share:>10.1%}")
    for name in ("before", "unseen", "after"):
        if name in once:
            entry = once[name]
            lines.append(
                f"{'codes' if 'unseen' in once else 'facts'} {name:<8} {entry['loss']:.4f} nats per token, "
                f"{entry['recall']:.1%} recalled, {entry['wrong']} answered otherwise"
                + (f", {entry['misbelieved']} with a false answer likelier" if "misbelieved" in entry else "")
            )
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Recall against loss, sampled against expected recall, codes read once, and Figure 3's three distributions."""
    figure, axes = plotting.plt.subplots(2, 3, figsize=(16, 9.5), layout="constrained")
    _recall(axes[0][0], results)
    _calibration(axes[0][1], results["sampling"])
    _once(axes[0][2], results["once"])
    levels = results["next_tokens"]
    right_A = np.array(levels["medium"]["right"])
    loss_A = -np.log(np.maximum(right_A, 1e-30))
    place = int(np.abs(loss_A - analysis.MEDIUM).argmin())  # the token whose loss is nearest to the fact's mean loss
    for axis, (name, level) in zip(axes[1], levels.items(), strict=True):
        _next_token(axis, f"{name} loss", level, place)
    plotting.save(figure, path)


def _recall(axis, results) -> None:
    """Every fact at every stage."""
    worst_X, mean_X, recalled_X = (
        np.concatenate([stage[name] for stage in results["stages"]]) for name in ("worst", "mean", "recalled")
    )
    for chosen_X, colour, label in ((~recalled_X, "tab:red", "wrong"), (recalled_X, "tab:green", "recalled")):
        x, y = np.maximum(worst_X[chosen_X], FLOOR), np.maximum(mean_X[chosen_X], FLOOR)
        axis.plot(x, y, ".", ms=4, alpha=0.5, color=colour, label=f"{label} ({chosen_X.sum()})")
    line = results["certified_loss"]
    axis.axvline(line, color="k", ls="--", label=f"certificate: worst token below {line:.3f}")
    axis.axhline(line, color="k", ls=":", label="the same as a mean, which certifies nothing")
    axis.set(title="greedy recall of each fact at each stage", xscale="log", yscale="log")
    axis.set(xlabel="loss of the worst token (nats)", ylabel="mean loss (nats per token)")
    axis.legend(fontsize="small")


def _calibration(axis, sampling) -> None:
    axis.plot([0, 1], [0, 1], "k:", label="exp(-summed loss)")
    for entry in sampling["bins"]:
        low, high = entry["interval"]
        axis.plot([entry["expected"]] * 2, [low, high], "-", color="tab:blue", alpha=0.6)
        axis.plot(entry["expected"], entry["observed"], "o", color="tab:blue")
    axis.set(title=f"sampled recall, {sampling['samples']} samples at temperature 1 (95% intervals)")
    axis.set(xlabel="expected share of right answers", ylabel="observed share")
    axis.legend(fontsize="small")


def _once(axis, once) -> None:
    before = "read once" if "unseen" in once else "before memory tuning"
    names = {"unseen": "never read", "before": before, "after": "after memory tuning"}
    bins = np.geomspace(1e-5, 20, 60)
    for name, label in names.items():
        if name not in once:
            continue
        entry, style = once[name], {"histtype": "step", "lw": 2} if name == "unseen" else {"alpha": 0.6}
        losses_F = np.clip(entry["losses"], bins[0], bins[-1])
        axis.hist(losses_F, bins, label=f"{label}: {100 * entry['recall']:.1f}% recalled", **style)
    axis.set(
        title=f"{once['before']['facts']} {'arbitrary codes' if 'unseen' in once else 'true facts'}",
        xscale="log",
        yscale="log",
        ylim=(0.8, None),
    )
    axis.set(xlabel="mean loss (nats per token)", ylabel="facts")
    axis.legend(fontsize="small")


def _next_token(axis, title, level, place) -> None:
    tokens, shares = zip(*level["likeliest"][place], strict=True)
    tokens, shares = list(tokens), list(shares)
    right = level["tokens"][place]
    if right not in tokens:
        tokens[-1], shares[-1] = right, level["right"][place]
    colours = ["tab:green" if token == right else "tab:grey" for token in tokens]
    axis.bar(range(len(tokens)), shares, color=colours)
    axis.set_xticks(range(len(tokens)), tokens)
    axis.set(title=f"{title}, epoch {level['epoch']}: {level['loss']:.4f} nats per token", ylim=(0, 1))
    axis.set(xlabel=f"next token at place {place + 1} of the answer (green: the right one)", ylabel="probability")
    loss = -np.log(max(level["right"][place], 1e-30))
    axis.text(0.97, 0.95, f"loss here {loss:.3g} nats", ha="right", va="top", transform=axis.transAxes)


def main(arguments: study.Arguments) -> None:
    config, once = arguments.config, arguments.flags.once
    model, facts = study.load(config, "random")
    directory = study.open_study(arguments.workdir, config, model, facts, once=once)
    started = time.time()
    path = "epoch_{}.json".format
    study.cached(directory / path(0), measure, config, model, BARE, facts, 0)
    tuning = run.memory_run(config, model, facts, directory / "facts", "random answers")
    for progress in tuning.epochs():
        epoch = progress.epoch
        if epoch in stages(config):
            study.cached(directory / path(epoch), measure, config, *tuning.answerer(), facts, epoch)
    if config.backbone.path:
        codes = study.cached(directory / "believed.json", believed, config, model, directory / "true")
    else:
        codes = study.cached(directory / "once.json", read_once, config, model, directory / "codes", once)
    epochs = 0, *stages(config)
    measured = [json.loads((directory / path(epoch)).read_text()) for epoch in epochs]
    results = {
        "certified_loss": certified_loss(config.backbone.dtype),
        "stages": measured,
        "threshold": analysis.threshold(measured, certified_loss(config.backbone.dtype)),
        "sampling": analysis.calibration(measured),
        "next_tokens": analysis.three_levels(measured),
        "once": codes,
        "seconds": round(time.time() - started, 1),
    }
    counted = results["threshold"], codes["before"]["certificates"], codes["after"]["certificates"]
    study.finish(directory, results | {"certificates": study.sum_certificates(counted)}, table, claims, draw)


if __name__ == "__main__":
    study.start(main, define_flags)
