"""Bad input of the commands of a memory of facts by its kinds: one line and the documented status, nothing changed."""

import dataclasses
import json
import shutil
import sqlite3

import checkpoints
import helpers
import kinds
import pytest
from refusals import refuse
from test_commands import contents

from lamini_jax.config import facts as facts_config
from lamini_jax.config import identity
from lamini_jax.data.facts import fact_id
from lamini_jax.errors import OTHER_RUN

FACTS = [{"question": "Who keeps bees?", "answer": "Ida"}, {"question": "What is box 12?", "answer": "37"}]
IDS = [fact_id(fact["question"]) for fact in FACTS]
GONE = "is not in the memory in run; python -m lamini_jax.facts lists what is"
WHO = {"question": "Who?", "answer": "Me"}
FACT_FILES = {
    "no words": ([{**WHO, "question": "?!"}], ["the question '?!' has no words"]),
    "two answers": ([WHO, {**WHO, "answer": "You"}], ["line 2", "answers the question of line 1 differently"]),
    "two answers in another case": ([WHO, {"question": "who", "answer": "You"}], ["asks the same as 'Who?'"]),
    "another answer in another case": ([{"question": "who keeps bees", "answer": "I"}], ["asks the same as", IDS[0]]),
    "also: no list": ([{**WHO, "also": "Whom?"}], ['line 1: "also" is not a list']),
    "also: an object": ([{**WHO, "also": {}}], ['line 1: "also" is not a list']),
    "also: an empty one": ([{**WHO, "also": [""]}], ['line 1: "also" is empty']),
    "also: a number": ([{**WHO, "also": [1]}], ['line 1: "also" is not a string']),
    "also: no words": ([{**WHO, "also": ["..."]}], ["the question '...' has no words"]),
    "also: another fact's question": (
        [WHO, {"question": "I?", "answer": "Me", "also": ["Who?"]}],
        ["line 2", "'Who?'"],
    ),
    "also: that of a stored fact": ([{**WHO, "also": ["Who keeps bees?"]}], ["asks the same as", IDS[0]]),
}
# kind -> instance -> (module, arguments, words of the message)
CASES = {
    "facts: cannot be told apart": {
        name: ("tune", [f"--facts={number}.jsonl", "--workdir=run"], words)
        for number, (name, (_, words)) in enumerate(FACT_FILES.items())
    },
    "facts: not stored": {
        "an id": ("forget", ["--workdir=run", "--ids=0000000000000000"], ["the id 0000000000000000", GONE]),
        "an id of several": ("forget", ["--workdir=run", f"--ids={IDS[0]},x"], ["the id x", GONE]),
        "a question": ("forget", ["--workdir=run", "--questions=Who?"], ["the question 'Who?'", GONE]),
        "a question in other words": ("forget", ["--workdir=run", "--questions=who keeps bees"], [GONE]),
        "a file of them": ("forget", ["--workdir=run", "--facts=who.jsonl"], ["the question 'Who?'", GONE]),
    },
    "forget: flags": {
        "none": ("forget", ["--workdir=run"], ["give one of --ids=ID"]),
        "two": ("forget", ["--workdir=run", "--ids=a", "--questions=b"], ["give one of --ids=ID"]),
        "no ids": ("forget", ["--workdir=run", "--ids="], ["give one of --ids=ID"]),
        "a file that is missing": ("forget", ["--workdir=run", "--facts=gone"], ["gone: no such file"]),
        "no directory": ("forget", ["--ids=a"], ["--workdir is required"]),
    },
    "facts: emptied by mistake": {
        "an empty file": ("tune", ["--facts=none.jsonl", "--workdir=run", "--replace"], ["none.jsonl", "--yes"]),
        "without --replace": ("tune", ["--facts=none.jsonl", "--workdir=run", "--yes"], ["none.jsonl: has no facts"]),
    },
    "facts: of the paper's router": {
        "forget": ("forget", ["--workdir=paper", f"--ids={IDS[0]}"], ["only a memory of facts forgets"]),
        "list": ("facts", ["--workdir=paper"], ["is no memory of facts", "recall.jsonl"]),
        "refuse": ("ask", ["--workdir=paper", "--question=Who?", "--outside=refuse"], ["--outside=refuse", "experts"]),
        "verify": ("tune", ["--facts=who.jsonl", "--workdir=new", *helpers.PAPER, "--verify"], ["--verify: only a"]),
        "replace": ("tune", ["--facts=who.jsonl", "--workdir=new", *helpers.PAPER, "--replace"], ["--replace: only a"]),
    },
    "facts: lists": {
        "a directory": ("facts", ["--workdir=run", "--output=paper"], ["--output=paper: is a directory"]),
        "nowhere": ("facts", ["--workdir=run", "--output=no/a"], ["its directory does not exist"]),
        "no name": ("facts", ["--workdir=run", "--output="], ["--output=: is a directory"]),
        "nothing there": ("facts", ["--workdir=paper/x"], ["has no finished checkpoint"]),
    },
    "judge: false fires": {
        str(rate): (
            "tune",
            ["--facts=who.jsonl", "--workdir=new", f"--config.router.false_fires={rate}"],
            [f"--config.router.false_fires={rate}"],
        )
        for rate in (0.9, 1e-9, 0, -1)
    },
    "judge: none": {
        "tune": ("tune", ["--facts=who.jsonl", "--workdir=new", "--config.backbone.path=other"], ["no judge for this"]),
    },
    "judge: training": {
        "no such pairs": ("train_scope", ["--pairs=gone"], ["gone: no such file"]),
        "no pairs": ("train_scope", ["--pairs=0.jsonl"], ["a scope needs at least 50"]),
        "pairs of something else": ("train_scope", ["--pairs=pairs.jsonl"], ["pairs.jsonl, line 2: is not a question"]),
        "output: a directory": ("train_scope", ["--output=run"], ["--output=run: is a directory"]),
        "output: nowhere": ("train_scope", ["--output=no/a"], ["its directory does not exist"]),
    },
}
OTHER = {
    "seed": ["--config.seed=1"],
    "size": ["--config.memory.num_experts=64"],
    "layers": ["--config.memory.num_layers=1"],
    "router": [*helpers.PAPER],
}


def altered(*statements):
    """A damage that SQL does, with the file's own means."""

    def alter(path):
        with sqlite3.connect(path) as connection:
            for statement in statements:
                connection.execute(statement)

    return alter


def of_row(connection_statement):
    """A row of another size whose digest is right."""

    def alter(path):
        from lamini_jax.memory import store

        with sqlite3.connect(path) as connection:
            (row,) = connection.execute("SELECT row FROM experts").fetchone()
            row = connection_statement(row)
            connection.execute("UPDATE experts SET row = ?, digest = ?", (row, store._digest(row)))

    return alter


def replaced(make):
    """A damage that makes other bytes of the file's."""
    return lambda path: path.write_bytes(make(path.read_bytes()))


def directory_instead(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "memory.sqlite: damaged": {
        "empty": (replaced(lambda whole: b""), "is damaged"),
        "garbage": (replaced(lambda whole: b"x" * len(whole)), "is damaged"),
        "truncated": (replaced(lambda whole: whole[: len(whole) // 2]), "is damaged"),
        "one page": (replaced(lambda whole: whole[:4096]), "is damaged"),
        "a page of zeros": (replaced(lambda whole: whole[:-8192] + bytes(8192)), "is damaged"),
        "no facts": (altered("DROP TABLE facts"), "is damaged"),
        "no keys": (altered("DROP TABLE wordings"), "is damaged"),
        "no rows": (altered("DROP TABLE experts"), "is damaged"),
        "nothing about it": (altered("DROP TABLE about"), "is damaged"),
        "no version": (altered("DELETE FROM about WHERE name = 'version'"), "is damaged"),
        "no config": (altered("DELETE FROM about WHERE name = 'config'"), "does not hold its settings"),
        "a config that is none": (altered("UPDATE about SET value = '[1]' WHERE name = 'config'"), "hold its settings"),
        "another format": (altered("UPDATE about SET value = '0' WHERE name = 'format'"), "another version"),
        "another answer": (altered("UPDATE facts SET answer = 'x'"), "is damaged (the fact 'Who keeps bees?')"),
        "wordings that are none": (altered("UPDATE facts SET also = '{'"), "is damaged"),
        "no expert": (altered("DELETE FROM experts"), "is damaged (the fact"),
        "experts of another size": (of_row(lambda row: row[:-4]), "is damaged (the fact"),
        "a short key": (altered("UPDATE wordings SET key = x'00'"), "is damaged (the fact"),
    },
    "memory.sqlite: none": {
        "missing": (lambda path: path.unlink(), "has no memory of facts"),
        "a directory": (directory_instead, ""),
    },
    "config.json: beside memory.sqlite": {
        "missing": (lambda path: path.with_name("config.json").unlink(), "without its config.json"),
        "no JSON": (lambda path: path.with_name("config.json").write_text("{"), "config.json: is"),
        "no config": (lambda path: path.with_name("config.json").write_text("{}"), "config.json: does not hold"),
    },
}
for kind, tried in (*CASES.items(), ("work directory: of other settings", OTHER), *DAMAGE.items()):
    kinds.instances(kind, tried)
kinds.instances("memory.sqlite: of others", ["backbone", "judge", "settings"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A memory of two facts, one of the paper's router that has only its descriptions, and bad files."""
    directory = tmp_path_factory.mktemp("here")
    files = {str(number): facts for number, (facts, _) in enumerate(FACT_FILES.values())}
    for name, facts in {**files, "facts": FACTS, "who": [WHO], "none": [], "pairs": [WHO, {"question": 1}]}.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    checkpoints.make(directory / "other", "llama", num_hidden_layers=3)
    result = helpers.call("tune", f"--facts={directory / 'facts.jsonl'}", f"--workdir={directory / 'run'}")
    assert result.returncode == 0, result.stderr
    (directory / "paper").mkdir()
    config = dataclasses.replace(facts_config(), router=helpers.CONFIG.router)
    described = {"config": identity(config), "weights": "", "where": {"backbone": ""}}
    described["config"]["router"]["false_fires"] = 0.1
    (directory / "paper" / "config.json").write_text(json.dumps(described))
    (directory / "paper" / "results.json").write_text("{}")
    return directory


def test_commands_refuse(directory):
    before = contents(directory)
    by_module = {}
    for module, arguments, words in (case for tried in CASES.values() for case in tried.values()):
        by_module.setdefault(module, []).append((arguments, words))
    for module, cases in by_module.items():
        refuse(f"lamini_jax.{module}", cases, directory)
    refuse(
        "lamini_jax.tune",
        [(["--facts=facts.jsonl", "--workdir=run", *flags], ["--workdir=run holds a run"]) for flags in OTHER.values()],
        directory,
        OTHER_RUN,
    )
    assert contents(directory) == before


def test_damaged_files(directory, tmp_path):
    """Whoever reads them says so; `tune` too, which makes no new memory in their place."""
    cases = {name: case for tried in DAMAGE.values() for name, case in tried.items()}
    for name, (damage, _) in cases.items():
        shutil.copytree(directory / "run", tmp_path / name)
        damage(tmp_path / name / "memory.sqlite")
        (tmp_path / name / "results.json").write_text("{}")
    before = contents(tmp_path)
    tuned = [name for name in cases if name != "missing"]  # of which it would make a new one
    facts = f"--facts={directory / 'who.jsonl'}"
    refuse(
        "lamini_jax.ask", [([f"--workdir={n}", "--question=Who?"], [said]) for n, (_, said) in cases.items()], tmp_path
    )
    refuse("lamini_jax.tune", [([facts, f"--workdir={n}"], []) for n in tuned[::3]], tmp_path)
    assert contents(tmp_path) == before
    listed = ["garbage", "truncated", "no facts", "wordings that are none", "a directory"]
    refuse("lamini_jax.facts", [([f"--workdir={name}"], [name]) for name in listed], tmp_path)
    refuse("lamini_jax.forget", [([f"--workdir={n}", f"--ids={IDS[0]}"], [cases[n][1]]) for n in listed], tmp_path)
    assert contents(tmp_path) == before


def test_memories_of_others(directory, tmp_path):
    """Another backbone, another judge, or settings that are not those of config.json: status 7."""
    said = {"backbone": "another backbone (x)", "scope": "another judge of questions (x)", "config": "other settings"}
    with sqlite3.connect(directory / "run" / "memory.sqlite") as connection:
        (config,) = connection.execute("SELECT value FROM about WHERE name = 'config'").fetchone()
    values = {"backbone": "x", "scope": "x", "config": json.dumps({**json.loads(config), "seed": 1})}
    for name, value in values.items():
        shutil.copytree(directory / "run", tmp_path / name)
        with sqlite3.connect(tmp_path / name / "memory.sqlite") as connection:
            connection.execute("UPDATE about SET value = ? WHERE name = ?", (value, name))
    before = contents(tmp_path)
    cases = [([f"--workdir={name}", "--question=Who?"], [words]) for name, words in said.items()]
    refuse("lamini_jax.ask", cases, tmp_path, OTHER_RUN)
    cases = [([f"--workdir={name}", f"--ids={IDS[0]}"], [words]) for name, words in said.items()]
    refuse("lamini_jax.forget", cases, tmp_path, OTHER_RUN)
    assert contents(tmp_path) == before
