"""Tunes a memory on your own facts until every one of them is certified and recalled exactly.

    python -m lamini_jax.tune --facts=FACTS.jsonl --workdir=DIR

FACTS.jsonl has a line {"question": "...", "answer": "..."} per fact. DIR gets config.json, checkpoints, recall.jsonl
(what the model really answers to every question) and results.json. Run again, it continues where it was stopped. The
exit status is 0 if all facts hold (are certified and recalled), 3 if the budget of epochs ended before that (a larger
--config.tuning.epochs continues). Both may be in a bucket: gs://BUCKET/NAME.
"""

from absl import flags

from lamini_jax import api
from lamini_jax.configure import configure
from lamini_jax.errors import FACTS_DO_NOT_HOLD, UserError
from lamini_jax.runtime import cli, processes

_CONFIG = cli.define_config()
cli.define_processes()
_FACTS = flags.DEFINE_string("facts", None, "JSONL file with the facts.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)


def main() -> None:
    config = configure(_CONFIG.value)
    cli.start(config.execution.mesh)
    result = api.tune(_FACTS.value, _WORKDIR.value, config)
    processes.print_once(
        f"{result.recalled} of {result.facts} facts recalled exactly, {result.certified} certified, after "
        f"{result.epochs} epochs ({result.seconds:.0f} s); all answers are in {_WORKDIR.value}/recall.jsonl"
    )
    if result.holding < result.facts:
        raise UserError(
            f"the budget of {config.tuning.epochs} epochs ended with {result.facts - result.holding} of {result.facts} "
            f"facts not yet certified and recalled; continue with --config.tuning.epochs={2 * config.tuning.epochs}",
            status=FACTS_DO_NOT_HOLD,
        )


if __name__ == "__main__":
    cli.run(main, remote=("facts", "workdir"))
