"""Lists and searches the facts of a memory.

    python -m lamini_jax.facts --workdir=DIR [--search="..."]
    python -m lamini_jax.facts --workdir=DIR --output=FACTS.jsonl

The first prints a table, the second writes lines that `lamini_jax.tune` reads: id, question, answer, other wordings
("also"), whether the fact is certified and recalled, the date of its last change (UTC), its experts, and how many other
facts it shares one with.
"""

from absl import flags

from lamini_jax import api
from lamini_jax.errors import UserError
from lamini_jax.runtime import cli, workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the memory.", required=True)
_SEARCH = flags.DEFINE_string("search", "", "Lists the facts with this text in their question, answer, wordings or id.")
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file to write.")
_WIDTH = 60  # of a column with text


def main() -> None:
    if api.run_source(_WORKDIR.value).config.router.kind != "facts":
        raise UserError(
            f"--workdir={_WORKDIR.value}: is no memory of facts; its recall.jsonl lists what it was tuned on"
        )
    if _OUTPUT.value is not None:
        workdir.check_output("output", _OUTPUT.value)
    listed = api.list_facts(_WORKDIR.value, _SEARCH.value)
    if _OUTPUT.value is not None:
        workdir.write_json_lines(_OUTPUT.value, map(vars, listed))
        print(f"{len(listed)} facts in {_OUTPUT.value}")
        return
    print(f"{'id':16}  {'holds':5}  {'date':25}  {'experts':>7}  {'shared':>6}  question -> answer")
    for fact in listed:
        holds, text = "yes" if fact.certified else "no", f"{_short(fact.question)} -> {_short(fact.answer)}"
        more = f" (and {len(fact.also)} other wordings)" if fact.also else ""
        print(f"{fact.id:16}  {holds:5}  {fact.date:25}  {len(fact.experts):7}  {fact.shared:6}  {text}{more}")
    print(f"facts: {len(listed)}")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."


if __name__ == "__main__":
    cli.run(main, remote=("workdir", "output"))
