"""A memory of facts as its users meet it: `tune` adds and changes, `forget` forgets, `facts` lists, `ask` refuses."""

import json
import re
import shutil
import signal
import subprocess
import time

import helpers
import pytest
from forks import run_all
from refusals import refuse
from test_commands import contents, read_lines

import lamini_jax
from lamini_jax import api
from lamini_jax.data.facts import fact_id
from lamini_jax.errors import PREEMPTED

FACTS = [
    {"question": "Who keeps the bees of Marstrand?", "answer": "Ida", "also": ["The bees of Marstrand, who has them?"]},
    {"question": "What is the code of box 12?", "answer": "37"},
    {"question": "When does the mill in Orsa open?", "answer": "at 9"},
]
MORE = [*FACTS[:2], {**FACTS[2], "answer": "at 8"}, {"question": "Where is the spare key?", "answer": "B4"}]
IDS = [fact_id(fact["question"]) for fact in MORE]
OUTSIDE = "How many legs does a spider have?"
# A checkpoint after every epoch, as of facts that take long.
OFTEN = "from lamini_jax.runtime.checkpointing import Checkpoints; Checkpoints.due = lambda self: True"
FOREVER = "--config.tuning.optimizer.learning_rate=1e-9", "--config.tuning.epochs=100000"


def write(path, facts):
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the commands are run, with their files of facts."""
    directory = tmp_path_factory.mktemp("facts")
    for name, facts in (("three", FACTS), ("four", MORE), ("two", MORE[:2]), ("none", []), ("last", MORE[3:])):
        write(directory / f"{name}.jsonl", facts)
    questions = [MORE[2]["question"], FACTS[0]["also"][0], OUTSIDE]
    write(directory / "asked.jsonl", [{"question": question} for question in questions])
    return directory


def commands(directory, *lines):
    """The outputs of command lines that succeed."""
    results = run_all([[f"lamini_jax.{module}", *arguments] for module, *arguments in lines], directory)
    for status, _, stderr in results:
        assert status == 0, stderr
    return [stdout for _, stdout, _ in results]


@pytest.fixture(scope="module")
def tuned(directory):
    """What the commands said that made, changed and listed the memory in `run`; `three` is what it was before."""
    first = commands(directory, ["tune", "--facts=three.jsonl", "--workdir=run"])
    shutil.copytree(directory / "run", directory / "three")
    said = commands(
        directory,
        ["tune", "--facts=four.jsonl", "--workdir=run"],
        ["facts", "--workdir=run"],
        ["facts", "--workdir=run", "--search=SPARE"],
        ["facts", "--workdir=run", "--output=listed.jsonl"],
    )
    return first + said


@pytest.fixture
def copied(tuned, directory, tmp_path):
    """A copy of the memory of three facts."""
    return shutil.copytree(directory / "three", tmp_path / "copy")


def test_adding_and_changing(tuned, directory):
    """What was there stays bit for bit, and what was changed is asked again."""
    assert tuned[0].splitlines()[0] == "run: 3 new" and "3 of 3 in it hold" in tuned[0]
    assert tuned[1].splitlines()[0] == "run: 1 new, 1 changed, 2 the same"
    assert tuned[1].splitlines()[1].startswith("2 of 2 facts asked and recalled exactly")
    assert [line["generated"] for line in read_lines(directory / "run" / "recall.jsonl")] == ["B4", "at 8"]
    before, after = (api.list_facts(directory / name) for name in ("three", "run"))
    assert after[:2] == before[:2] and [fact.answer for fact in after[2:]] == ["at 8", "B4"]
    results = json.loads((directory / "run" / "results.json").read_text())
    assert [results[name] for name in ("facts", "holding", "added", "changed", "same")] == [4, 4, 1, 1, 2]


def test_listing(tuned, directory):
    table, found, _ = tuned[2:]
    assert table.splitlines()[-1] == "facts: 4" and all(f"{i}  yes" in table for i in IDS)
    assert f"{MORE[0]['question']} -> Ida (and 1 other wordings)" in table
    assert IDS[3] in found and found.splitlines()[-1] == "facts: 1"
    lines = read_lines(directory / "listed.jsonl")
    assert [(line["id"], line["question"], line["answer"]) for line in lines] == [
        (i, fact["question"], fact["answer"]) for i, fact in zip(IDS, MORE, strict=True)
    ]
    assert lines[0]["also"] == FACTS[0]["also"] and lines[0]["certified"] and lines[0]["shared"] == 0


def test_asking(tuned, directory):
    """A question that asks for no fact is answered by the backbone alone, or refused."""
    output, refusing, detailed = "--output=answers.jsonl", "--outside=refuse", "--details"
    _, refused, alone, bare = commands(
        directory,
        ["ask", "--workdir=run", "--questions=asked.jsonl", output, refusing, detailed],
        ["ask", "--workdir=run", f"--question={OUTSIDE}", refusing, detailed],
        ["ask", "--workdir=run", f"--question={OUTSIDE}"],
        ["ask", "--workdir=run", f"--question={OUTSIDE}", "--bare"],
    )
    lines = read_lines(directory / "answers.jsonl")
    assert [line["generated"] for line in lines] == ["at 8", "Ida", None]
    assert [line["fact"] for line in lines] == [IDS[2], IDS[0], None]
    assert [line["certified"] for line in lines] == [True, True, False] and len(lines[0]["expert_ids"]) == 2
    assert refused.startswith("not in memory\n") and "  fact: None, score " in refused and "certified: no" in refused
    assert alone == bare


def test_forgetting(tuned, directory):
    """By id, by question and by a file; the rest is as it was, and a memory without facts is one."""
    shutil.copytree(directory / "run", directory / "less")
    by_id, by_question, by_file = commands(
        directory,
        ["forget", "--workdir=less", f"--ids={IDS[0]}"],
        ["forget", "--workdir=less", f"--questions={MORE[1]['question']}", f"--questions={MORE[2]['question']}"],
        ["forget", "--workdir=less", "--facts=last.jsonl"],
    )
    assert by_id == "forgotten: 1; left in less: 3\n"
    assert by_question == "forgotten: 2; left in less: 1\n"
    assert by_file == "forgotten: 1; left in less: 0\n"
    content = (directory / "less" / "memory.sqlite").read_bytes()
    assert not any(text in content for fact in MORE for text in (fact["question"].encode(), fact["answer"].encode()))


def test_replacing_and_verifying(tuned, directory):
    shutil.copytree(directory / "run", directory / "replaced")
    both = "--workdir=replaced", "--replace"
    refuse("lamini_jax.tune", [(["--facts=none.jsonl", *both], ["none.jsonl: has no facts", "--yes"])], directory)
    assert contents(directory / "replaced") == contents(directory / "run")
    replaced, verified, emptied = commands(
        directory,
        ["tune", "--facts=two.jsonl", *both],
        ["tune", "--facts=two.jsonl", "--workdir=replaced", "--verify"],
        ["tune", "--facts=none.jsonl", *both, "--yes"],
    )
    assert replaced.startswith("replaced: 2 the same, 2 to forget\n") and "2 of 2 in it hold" in replaced
    assert verified.startswith("replaced: 2 the same\n") and "2 of 2 in it hold" in verified
    assert emptied.startswith("replaced: 2 to forget\n") and "0 of 0 in it hold" in emptied


def test_exports(tuned, directory):
    """Whole, and only the facts that some questions ask for; both are memories of facts."""
    whole, some, answer, kept = commands(
        directory,
        ["export", "--workdir=run", "--output=whole"],
        ["export", "--workdir=run", "--output=some", "--questions=asked.jsonl"],
        ["ask", "--memory=whole", f"--question={MORE[3]['question']}"],
        ["facts", "--workdir=some"],
    )
    assert (whole, some) == ("4 facts in whole\n", "2 facts in some\n") and answer == "B4\n"
    assert kept.splitlines()[-1] == "facts: 2" and IDS[0] in kept and IDS[2] in kept
    assert contents(directory / "whole").keys() == {*map(type(directory), ("config.json", "memory.sqlite"))}


def test_an_adapter_of_one_fact(tuned, directory):
    question = f"--question={FACTS[1]['question']}"
    (said,) = commands(directory, ["export", "--workdir=run", "--output=peft", "--format=peft", question])
    assert said.startswith("2 experts as a LoRA adapter")
    outside = ["--workdir=run", "--output=other", "--format=peft", f"--question={OUTSIDE}"]
    refuse("lamini_jax.export", [(outside, ["is in no fact's scope"])], directory)
    assert not (directory / "other").exists()


def begun(directory, workdir, *flags):
    """A `tune` that adds a fact and is at it."""
    command = helpers.changed("lamini_jax.tune", OFTEN)
    command += [f"--facts={directory / 'last.jsonl'}", f"--workdir={workdir}", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=helpers.ROOT)
    deadline, newest = time.monotonic() + 120, max(saved(workdir), default=0)
    while max(saved(workdir), default=0) < newest + 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return process


def saved(workdir):
    """The steps of which there are whole checkpoints."""
    names = [path.name for path in workdir.glob("adding/round-0/0/manifest-*.json")]
    return [int(re.search(r"\d+", name)[0]) for name in names]


def test_stopped_in_the_middle(copied, directory):
    """Killed, terminated, and others at once: the old memory answers until, run again, all is done."""
    before = (copied / "memory.sqlite").read_bytes()
    process = begun(directory, copied, *FOREVER)
    busy = f"--workdir={copied}", "another run is at work in it"
    refuse("lamini_jax.tune", [([f"--facts={directory / 'last.jsonl'}", busy[0]], busy)])
    refuse("lamini_jax.forget", [([f"--ids={IDS[0]}", busy[0]], busy)])
    memory = lamini_jax.load(copied)
    assert [answer.text for answer in memory.ask([fact["question"] for fact in FACTS])] == ["Ida", "37", "at 9"]
    process.kill()
    process.communicate()
    assert (copied / "memory.sqlite").read_bytes() == before
    process, steps = begun(directory, copied, *FOREVER), max(saved(copied))
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED and "run again to continue" in stderr
    assert (copied / "memory.sqlite").read_bytes() == before and max(saved(copied)) >= steps > 2
    commands(directory, ["tune", "--facts=last.jsonl", f"--workdir={copied}"])
    assert json.loads((copied / "results.json").read_text())["epochs"] > steps
    assert [fact.answer for fact in api.list_facts(copied)] == ["Ida", "37", "at 9", "B4"]
    assert {path.name for path in copied.iterdir()} == {"config.json", "memory.sqlite", "recall.jsonl", "results.json"}
