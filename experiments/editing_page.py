"""The table, the claims and the figure of `editing`: functions of its results alone."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.shared import plotting
from experiments.shared.claims import Claim, percent

ABOUT = ("verbatim", "rephrased", "typo1", "typo2")
RATES = ("0.05", "0.01", "0.001")
STRANGERS = ("others", "same_subject", "unrelated", "truthful_qa", "mmlu")
MEMORY = "memory"
_ALLOWED = 0.01  # of questions that nobody stored, for which a fact may fire


def share(result: Mapping[str, Any], *keys: str) -> str:
    """A share for the table, - where it was not measured."""
    for key in keys:
        result = (result or {}).get(key)
    return "-" if result is None else percent(result)


def table(results: dict) -> str:
    """Every system beside the memory, set by set, and what only a memory has."""
    blocks = []
    for name, own in results["sets"].items():
        systems = {MEMORY: own, **results["rivals"][name]}
        kinds = [kind for kind in STRANGERS if kind in own["false_fires"]]
        head = f"{name + ', ' + format(own['count'], ',') + ' facts':<34}" + "".join(f"{kind:>10}" for kind in ABOUT)
        head += f"{'(contained)':>13}  at" + "".join(f"{percent(float(rate)):>8}" for rate in RATES)
        lines = [f"{head}{'wrong fact':>12}" + "".join(f"{kind:>13}" for kind in kinds)]
        for system, one in systems.items():
            cells = "".join(f"{share(one, kind):>10}" for kind in ABOUT)
            cells += f"{share(one, 'contained', 'rephrased'):>13}    "
            cells += "".join(f"{share(one, 'recall_at', rate):>8}" for rate in RATES)
            cells += f"{share(one, 'wrong_fact'):>12}"
            limited = f" ({one['count']:,} facts)" if one.get("count", own["count"]) != own["count"] else ""
            fires = "".join(f"{share(one, 'false_fires', kind):>13}" for kind in kinds)
            lines.append(f"{system + limited:<34}{cells}{fires}")
        blocks.append("\n".join([*lines, *_life(own), *_unchanged(results["rivals"][name])]))
    note = (
        "exact answers; (contained): rephrased questions in whose answer the right one occurs; under 'at' exact\n"
        "answers to rephrased questions where a fact fires for so many of the look-alikes; right of it how often\n"
        "another fact fires, and how often any does for questions that nobody stored"
    )
    return "\n\n".join([*blocks, note])


def _life(own: Mapping[str, Any]) -> Iterable[str]:
    """The lines about what only a memory that can be edited has."""
    grown = ", ".join(f"{count:,}: {percent(value)}" for count, value in own["recall_as_it_grows"])
    yield f"  recall as it grows: {grown}; the first batch after the last {share(own, 'first_batch_after_last')}"
    yield (
        f"  {own['holding']:,} hold, {own['sharing']:,} share experts; {own['seconds_per_fact']:.2f} s and "
        f"{own['bytes_per_fact']:,.0f} bytes a fact; the first batch took {own['seconds_creating']:.0f} s"
    )
    ratio = "-" if own["latency_ratio"] is None else f"{own['latency_ratio']:.2f} times as it is"
    same = [share(own, key) for key in ("unfired_bitwise", "unfired_answers")]
    yield f"  where none fires, logits as without memory {same[0]}, answers {same[1]}; an answer's time: {ratio}"
    if gone := own["forgotten"]:
        yield (
            f"  {gone['count']} forgotten: {percent(gone['equal'])} of all answers and {percent(gone['state'])} of the "
            "arrays are as before they were stored"
        )
    changed = own["changed"]
    new, old = share(changed, "new"), share(changed, "old")
    yield f"  {changed['count']} changed: {new} say the new answer, {old} the old one"


def _unchanged(rivals: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """What tuning the weights does to other answers."""
    for name, one in rivals.items():
        if "unchanged" in one:
            kinds = ", ".join(f"{kind} {percent(value)}" for kind, value in one["unchanged"].items())
            yield f"  {name}: answers to others that stay as they were: {kinds} ({one['epochs']} epochs)"


def claims(results: dict) -> list[Claim]:
    """What the paper says of hallucination, for a memory whose facts are found by an index of their own."""
    sets, rivals = results["sets"], results["rivals"]
    measured = []
    for name, own in sets.items():
        fires = ", ".join(f"{kind} {percent(value)}" for kind, value in own["false_fires"].items())
        gone, changed = own["forgotten"] or {}, own["changed"]
        measured.append(
            f"{name}: {share(own, 'verbatim')} of {own['count']:,} stored questions are answered exactly, "
            f"{share(own, 'recall_at', '0.01')} in other words at 1% false fires (backbone "
            f"{share(rivals[name]['bare'], 'rephrased')}); a fact fires for {fires}; logits are the backbone's for "
            f"{share(own, 'unfired_bitwise')} of the rest; after forgetting {share(gone, 'equal')} of answers are as "
            f"before, after a change {share(changed, 'old')} are old ones"
        )
    every = sets.values()
    return [
        Claim(
            "Memory experts remove hallucination (sections 4, 7 and 10), in a memory that knows which facts it has",
            "; ".join(measured),
            {
                "other words at 1% false fires are answered exactly more often than by the backbone": all(
                    (own.get("recall_at") or {}).get("0.01", 0) > rivals[name]["bare"].get("rephrased", 1)
                    for name, own in sets.items()
                ),
                "facts fire for at most 1% of other questions of any kind, within the interval": all(
                    low <= _ALLOWED for own in every for low, _ in own["intervals"]["false_fires"].values()
                ),
                "where none fires, logits and answers are the backbone's bit for bit": all(
                    own["unfired_bitwise"] == own["unfired_answers"] == 1 for own in every
                ),
                "after forgetting, all is as if the facts had never been stored": all(
                    own["forgotten"] and own["forgotten"]["equal"] == own["forgotten"]["state"] == 1 for own in every
                ),
                "after a change the old answer is never said": all(own["changed"]["old"] == 0 for own in every),
            },
        )
    ]


def draw(results: dict, path: Path) -> None:
    """Exact answers to rephrased questions against the share of near neighbours for which a fact fires."""
    names = list(results["sets"])
    size = (6 * len(names), 5)
    figure, axes = plotting.plt.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        systems = {MEMORY: results["sets"][name], **results["rivals"][name]}
        for system, one in systems.items():
            if points := one.get("curve"):
                rates, recall = zip(*points, strict=True)
                line = {"label": system, "lw": 2.5 if system == MEMORY else 1.2, "where": "post"}
                axis.step([100 * rate for rate in rates], [100 * value for value in recall], **line)
        bare = results["rivals"][name]["bare"].get("rephrased")
        if bare is not None:
            axis.axhline(100 * bare, color="grey", ls=":", label="bare")
        axis.set_xscale("symlog", linthresh=1)
        axis.set(title=f"{name}, {results['sets'][name]['count']:,} facts", xlim=(0, 20), ylim=(0, 101))
        axis.set(xlabel="% of near neighbours for which a fact fires")
        axis.set_xticks([0, 0.1, 0.5, 1, 2, 5, 10, 20], ["0", "0.1", "0.5", "1", "2", "5", "10", "20"])
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("% of rephrased questions answered exactly")
    axes[0][-1].legend(fontsize="small", loc="center right")
    plotting.save(figure, path)
