"""Tunes a memory on your own facts until every one of them is certified and recalled exactly.

    python -m lamini_jax.tune --facts=FACTS.jsonl --workdir=DIR

FACTS.jsonl has a line {"question": "...", "answer": "..."} per fact, perhaps with other wordings of the question
("also": ["...", "..."]). What is new is added to the memory in DIR, what has another answer is changed, the rest stays
as it is; --replace forgets what the file no longer has, --verify asks everything again. DIR gets config.json,
memory.sqlite, recall.jsonl (what the model really answered to what was tuned) and results.json. A command that is
stopped has changed nothing; run again, it continues. The exit status is 0 if all facts hold (are certified and
recalled), 3 if the budget of epochs ended before that. Both may be in a bucket: gs://BUCKET/NAME.

With --config.router.kind=experts, the paper's router, DIR belongs to the facts in the file: facts cannot be added.
"""

from absl import flags

from lamini_jax import api
from lamini_jax.config import Config
from lamini_jax.configure import configure
from lamini_jax.errors import FACTS_DO_NOT_HOLD, UserError
from lamini_jax.runtime import cli, processes

_CONFLICTS = 5  # pairs of facts that are named

_CONFIG = cli.define_config()
cli.define_processes()
_FACTS = flags.DEFINE_string("facts", None, "JSONL file with the facts.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the memory.", required=True)
_REPLACE = flags.DEFINE_bool("replace", False, "Forgets the facts that the file does not have.")
_VERIFY = flags.DEFINE_bool("verify", False, "Asks all facts again that are in the memory.")
_YES = flags.DEFINE_bool("yes", False, "Forgets all facts, if --replace is given a file without any.")


def main() -> None:
    config = configure(_CONFIG.value)
    cli.start(config.execution.mesh)
    holding, facts = _facts(config) if config.router.kind == "facts" else _once(config)
    if holding < facts:
        raise UserError(
            f"the budget of {config.tuning.epochs} epochs ended with {facts - holding} of {facts} "
            f"facts not yet certified and recalled; continue with --config.tuning.epochs={2 * config.tuning.epochs}",
            status=FACTS_DO_NOT_HOLD,
        )


def _facts(config: Config) -> tuple[int, int]:
    """Adds the facts to a memory of facts; returns how many hold, of how many."""
    facts = api.read_facts(_FACTS.value, config, may_be_empty=_REPLACE.value)
    if not facts and not _YES.value:
        raise UserError(f"{_FACTS.value}: has no facts; --replace --yes forgets all that are in the memory")
    memory = api.open_memory(_WORKDIR.value, config)
    plan = memory.plan(facts, _REPLACE.value, _VERIFY.value)
    processes.print_once(f"{_WORKDIR.value}: {plan}")
    change = memory.carry_out(plan)
    processes.print_once(
        f"{change.recalled} of {change.asked} facts asked and recalled exactly, after {change.epochs} epochs "
        f"({change.seconds:.0f} s), see {_WORKDIR.value}/recall.jsonl; {change.holding} of {change.facts} in it hold"
    )
    if change.conflicts:
        processes.print_once(f"{len(change.conflicts)} pairs of facts are hard to tell apart in other words:")
        for pair in change.conflicts[:_CONFLICTS]:
            processes.print_once("  " + " and ".join(f"{memory.fact(i).question!r} (id {i})" for i in pair))
    return change.holding, change.facts


def _once(config: Config) -> tuple[int, int]:
    """Tunes the facts with the paper's router."""
    for name in ("replace", "verify", "yes"):
        if flags.FLAGS[name].value:
            raise UserError(f"--{name}: only a memory of facts can be changed (--config.router.kind=facts)")
    result = api.tune_once(_FACTS.value, _WORKDIR.value, config)
    processes.print_once(
        f"{result.recalled} of {result.facts} facts recalled exactly, {result.certified} certified, after "
        f"{result.epochs} epochs ({result.seconds:.0f} s); all answers are in {_WORKDIR.value}/recall.jsonl"
    )
    return result.holding, result.facts


if __name__ == "__main__":
    cli.run(main, remote=("facts", "workdir"))
