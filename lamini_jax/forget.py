"""Forgets facts of a memory: nothing of them is left, and the others stay as they are, bit for bit.

    python -m lamini_jax.forget --workdir=DIR --ids=ID,ID
    python -m lamini_jax.forget --workdir=DIR --questions="..."
    python -m lamini_jax.forget --workdir=DIR --facts=FILE.jsonl

Facts are named by their ids (as `lamini_jax.facts` lists them), by their questions, word for word, or as lines with a
"question" in a file. If one of them is not stored, nothing is forgotten.
"""

from absl import flags

from lamini_jax import api
from lamini_jax.backbone import checkpoints
from lamini_jax.config import MeshConfig
from lamini_jax.data import facts
from lamini_jax.errors import UserError
from lamini_jax.runtime import cli, processes

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the memory.", required=True)
_IDS = flags.DEFINE_list("ids", None, "Ids of facts, with commas between them.")
_QUESTIONS = flags.DEFINE_multi_string("questions", None, "A question; may be given several times.")
_FACTS = flags.DEFINE_string("facts", None, "JSONL file with the facts or their questions.")
_BACKBONE = flags.DEFINE_string("backbone", None, "Where the checkpoint of the backbone is, if it has moved.")


def main() -> None:
    given = [flag for flag in (_IDS, _QUESTIONS, _FACTS) if flag.value]
    if len(given) != 1:
        raise UserError('give one of --ids=ID,..., --questions="..." and --facts=FILE.jsonl')
    source = api.run_source(_WORKDIR.value).with_backbone(_BACKBONE.value)
    if source.config.router.kind != "facts":
        raise UserError(f"--workdir={_WORKDIR.value}: only a memory of facts forgets; this one's router is the paper's")
    questions = _QUESTIONS.value or []
    if _FACTS.value:
        arguments = checkpoints.load_tokenizer(source.config.backbone), source.config.backbone.max_seq_len
        questions = [record["question"] for record in facts.read_questions(_FACTS.value, *arguments)]
    cli.use_devices(MeshConfig())
    change = source.load().forget(_IDS.value or (), questions)
    processes.print_once(f"forgotten: {change.forgotten}; left in {_WORKDIR.value}: {change.facts}")


if __name__ == "__main__":
    cli.run(main, remote=("workdir", "facts"))
