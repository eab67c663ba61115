"""Tunes your own facts until every one of them is certified and recalled exactly.

    python -m lamini_jax.tune --facts=FACTS.jsonl --workdir=DIR

FACTS.jsonl has a line {"question": "...", "answer": "..."} per fact. DIR gets checkpoints, recall.jsonl (what the model
really answers to every question) and results.json. Run again, it continues where it was stopped, or says that it is
done. Exit status 0 if all facts hold, 3 if the budget of epochs ended first (a larger --config.tuning.epochs goes on).
"""

import dataclasses
import json
import time

from absl import flags

from lamini_jax import command, model, processes, runs
from lamini_jax.data.facts import read_jsonl
from lamini_jax.errors import FACTS_DO_NOT_HOLD, UserError

_CONFIG = command.define_config()
command.define_processes()
_FACTS = flags.DEFINE_string("facts", None, "JSONL file with the facts.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)


def main() -> int:
    config = model.configure(_CONFIG.value)
    command.start(config.mesh)
    facts = read_jsonl(_FACTS.value, model.load_tokenizer(config), config.backbone.context)
    base = model.load_base(config)
    directory = command.open_workdir(_WORKDIR.value, identity(config, runs.fingerprint(facts)))
    results_path = directory / "results.json"
    if results_path.exists() and json.loads(results_path.read_text())["holding"] == len(facts):
        recalled = directory / "recall.jsonl"
        processes.say(f"done already: all {len(facts)} facts are certified and recalled (see {recalled})")
        return 0

    started = time.time()

    def make_router():
        return model.make_router(config, base, [fact.question for fact in facts])

    title = f"tuning {len(facts)} facts"
    tuned = runs.tune_memory(config, base, make_router, facts, directory / "checkpoints", title, until_all_hold=True)
    exact_F, generated = runs.recalled(base, tuned.adapt, facts)
    lines = [
        {
            "question": fact.question,
            "answer": fact.answer,
            "generated": generated[i],
            "exact": bool(exact_F[i]),
            "certified": bool(tuned.certified_F[i]),
            "worst_token_loss": float(tuned.log.worst_F[i]),
        }
        for i, fact in enumerate(facts)
    ]
    holding = int((exact_F & tuned.certified_F).sum())
    command.write_text(directory / "recall.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    results = {
        "facts": len(facts),
        "holding": holding,
        "recalled": int(exact_F.sum()),
        "certified": int(tuned.certified_F.sum()),
        "epochs": tuned.log.epoch,
        "seconds": round(time.time() - started, 1),
    }
    command.write_json(results_path, results)
    processes.say(
        f"{results['recalled']} of {len(facts)} facts recalled exactly, {results['certified']} certified, "
        f"after {tuned.log.epoch} epochs ({results['seconds']:.0f} s); {directory / 'recall.jsonl'} has them all"
    )
    if holding < len(facts):
        raise UserError(
            f"the budget of {config.tuning.epochs} epochs ended with {len(facts) - holding} of {len(facts)} facts that "
            f"do not hold; continue with --config.tuning.epochs={2 * config.tuning.epochs}",
            status=FACTS_DO_NOT_HOLD,
        )
    return 0


def identity(config, facts_fingerprint: str) -> dict:
    """What a work directory is bound to: everything but the budget, which may be raised, and the devices."""
    values = dataclasses.asdict(config)
    del values["tuning"]["epochs"], values["mesh"]
    return {"config": values, "facts": facts_fingerprint}


if __name__ == "__main__":
    command.run(main)
