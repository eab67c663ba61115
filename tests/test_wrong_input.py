"""Wrong input of the commands by its kinds: one line and the documented status each, and nothing is made or changed."""

import helpers
import kinds
import pytest
from refusals import refuse
from test_commands import FLAGS, contents

from lamini_jax.errors import BAD_INPUT, DEVICES, OTHER_RUN

FACTS = helpers.some_facts(2)
ONE = "--num_processes=2", "--process_id=1"
# In all of these, the directory holds what `directory` below makes.
# kind -> instance -> (arguments of `tune`, words of the message), beside --facts, --workdir and FLAGS unless given.
TUNE = {
    "facts: no such file": {
        "missing": (["--facts=gone.jsonl"], ["gone.jsonl: no such file"]),
        "a directory": (["--facts=empty"], ["empty: is a directory"]),
        "below a file": (["--facts=facts.jsonl/below"], ["facts.jsonl/below: cannot be read"]),
        "a link to nothing": (["--facts=dangling"], ["dangling: no such file"]),
        "a link to itself": (["--facts=loop"], ["loop: cannot be read"]),
        "too long a name": ([f"--facts={'a' * 300}"], ["cannot be read (File name too long)"]),
        "no name": (["--facts="], [": no such file"]),
    },
    "facts: none": {
        "empty": (["--facts=nothing.jsonl"], ["nothing.jsonl: has no facts"]),
        "blank lines": (["--facts=blank.jsonl"], ["blank.jsonl: has no facts"]),
        "the null device": (["--facts=/dev/null"], ["/dev/null: has no facts"]),
    },
    "work directory: cannot be": {
        "a file": (["--workdir=facts.jsonl"], ["--workdir=facts.jsonl: is a file"]),
        "below a file": (["--workdir=facts.jsonl/below"], ["--workdir=facts.jsonl/below: is a file, or below one"]),
        "a device": (["--workdir=/dev/null"], ["--workdir=/dev/null: is a file"]),
        "no name": (["--workdir="], ["--workdir is empty"]),
        "a link to nothing": (["--workdir=dangling"], ["--workdir=dangling: is a file"]),
        "a link to itself": (["--workdir=loop"], ["--workdir=loop"]),
        "too long a name": ([f"--workdir={'a' * 300}"], ["File name too long"]),
        "where nothing can be": (["--workdir=/proc/run"], ["--workdir=/proc/run: No such file or directory"]),
    },
    "settings: out of range": {
        "no experts": (["--config.memory.num_experts=0"], ["--config.memory.num_experts=0"]),
        "no epochs": (["--config.tuning.epochs=0"], ["--config.tuning.epochs=0"]),
        "no batch": (["--config.tuning.batch_size=-1"], ["--config.tuning.batch_size=-1"]),
        "infinite rate": (
            ["--config.tuning.optimizer.learning_rate=inf"],
            ["--config.tuning.optimizer.learning_rate=inf: must be a finite number"],
        ),
        "no width of keys": (["--config.router.key_dim=0"], ["--config.router.key_dim=0"]),
        "negative seed": (["--config.seed=-1"], ["--config.seed=-1"]),
    },
    "settings: names of nothing": {
        name: ([f"--config.{name}=nope"], [f"--config.{name}=nope"])
        for name in ("memory.target", "memory.dtype", "router.kind", "router.lookup", "tuning.optimizer.name")
    },
    "settings: not together": {
        "more selected than there are": (["--config.memory.top_k=9999"], ["--config.memory.top_k=9999"]),
        "memory in all layers": (["--config.memory.num_layers=4"], ["--config.memory.num_layers=4"]),
        "no square": (["--config.router.lookup=product", "--config.memory.num_experts=99"], ["must be a square"]),
        "a size of the backbone": (["--config.backbone.num_heads=3"], ["num_kv_heads=2: must divide"]),
        "a lookup that misses": (["--config.router.lookup=approximate"], ["may miss experts"]),
    },
    "backbone: none": {
        "missing": (["--config.backbone.path=gone"], ["no such directory"]),
        "a file": (["--config.backbone.path=facts.jsonl"], ["facts.jsonl"]),
        "an empty directory": (["--config.backbone.path=empty"], ["config.json"]),
        "a work directory": (["--config.backbone.path=run"], ["run/config.json"]),
    },
    "processes: flags": {
        "without --multihost": (["--num_processes=2"], ["go with --multihost"]),
        "no port": (["--multihost", "--coordinator=here", *ONE], ["HOST:PORT"]),
        "no such port": (
            ["--multihost", "--coordinator=a:99999", "--num_processes=2", "--process_id=1"],
            ["HOST:PORT"],
        ),
        "no cluster": (["--multihost"], ["cannot find each other"]),
        "not one of them": (
            ["--multihost", "--coordinator=localhost:1", "--num_processes=1", "--process_id=7", "--join_timeout=1"],
            ["--process_id=7"],
        ),
        "none": (["--multihost", "--num_processes=0"], ["--num_processes"]),
    },
}
# The same with other statuses.
OTHER = {
    "devices": (
        DEVICES,
        {
            "a mesh of more": (["--config.execution.mesh.model=2"], ["there are 1 devices"]),
            "a mesh of none": (["--config.execution.mesh.data=0"], ["there are 1 devices"]),
            "all twice": (["--config.execution.mesh.model=-1"], ["there are 1 devices"]),
        },
    ),
    "work directory: of another run": (
        OTHER_RUN,
        {
            "seed": (["--workdir=run", "--config.seed=1"], ["config.seed: 0 -> 1"]),
            "facts": (["--workdir=run", "--facts=one.jsonl"], ["facts: "]),
            "memory": (["--workdir=run", "--config.memory.top_k=4"], ["config.memory.top_k: 32 -> 4"]),
            "everything": (["--workdir=other"], ["config.backbone", "more"]),
        },
    ),
}
ASK = {
    "memory: none": {
        "an empty directory": (["--workdir=empty"], ["--workdir=empty: has no finished checkpoint"]),
        "missing": (["--workdir=gone"], ["--workdir=gone: has no finished checkpoint"]),
        "a file": (["--workdir=facts.jsonl"], ["has no finished checkpoint"]),
        "checkpoints alone": (["--workdir=run/checkpoints"], ["has no finished checkpoint"]),
        "no export": (["--memory=run"], ["--memory=run: has no memory.json"]),
        "both": (["--workdir=run", "--memory=run"], ["either --workdir=DIR or --memory=DIR"]),
        "neither": ([], ["either --workdir=DIR or --memory=DIR"]),
    },
    "questions: cannot be asked": {
        "empty": (["--workdir=run", "--question="], ["--question", "is empty"]),
        "blank": (["--workdir=run", "--question=  "], ["--question", "is empty"]),
        "too long": (["--workdir=run", f"--question={'x' * 300}"], ["--question", "are allowed"]),
        "not UTF-8": (["--workdir=run", "--question=a\udcff"], ["--question", "half of a character"]),
        "two ways": (["--workdir=run", "--question=a", "--questions=facts.jsonl", "--output=o"], ["either --question"]),
        "a file that is missing": (["--workdir=run", "--questions=gone", "--output=o"], ["gone: no such file"]),
        "a field that is taken": (["--workdir=run", "--questions=taken.jsonl", "--output=o"], ['field "generated"']),
    },
    "outputs: cannot be": {
        "a directory": (["--workdir=run", "--questions=facts.jsonl", "--output=empty"], ["empty: is a directory"]),
        "nowhere": (["--workdir=run", "--questions=facts.jsonl", "--output=no/a"], ["directory does not exist"]),
        "below a file": (["--workdir=run", "--questions=facts.jsonl", "--output=one.jsonl/a"], ["--output="]),
        "not said": (["--workdir=run", "--questions=facts.jsonl"], ["go together"]),
        "no name": (["--workdir=run", "--questions=facts.jsonl", "--output="], ["--output=: is a directory"]),
    },
    "sampling": {
        "nan": (["--workdir=run", "--question=a", "--temperature=nan"], ["--temperature=nan: must be a finite"]),
        "infinite": (["--workdir=run", "--question=a", "--temperature=inf"], ["--temperature=inf"]),
        "negative": (["--workdir=run", "--question=a", "--temperature=-1"], ["--temperature"]),
        "a word": (["--workdir=run", "--question=a", "--temperature=hot"], ["--temperature"]),
        "seed": (["--workdir=run", "--question=a", "--seed=-1"], ["--seed"]),
        "lookup": (["--workdir=run", "--question=a", "--lookup=fast"], ["--lookup"]),
    },
}
for table in (TUNE, {kind: tried for kind, (_, tried) in OTHER.items()}, ASK):
    for kind, tried in table.items():
        kinds.instances(kind, tried)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Files and directories of every kind, among them what looks like a finished run."""
    directory = tmp_path_factory.mktemp("here")
    (directory / "empty").mkdir()
    (directory / "nothing.jsonl").write_text("")
    (directory / "blank.jsonl").write_text("\n \n\t\n")
    (directory / "taken.jsonl").write_text('{"question": "Who?", "generated": "Me"}\n')
    (directory / "dangling").symlink_to("gone")
    (directory / "loop").symlink_to("loop")
    facts = helpers.write_facts(directory / "facts.jsonl", FACTS)
    helpers.write_facts(directory / "one.jsonl", FACTS[:1])
    (directory / "other").mkdir()
    (directory / "other" / "config.json").write_text('{"config": {"backbone": {"kind": "none"}}}')
    result = helpers.call("tune", f"--facts={facts}", f"--workdir={directory / 'run'}", *FLAGS)
    assert result.returncode == 0, result.stderr
    return directory


def refuse_all(module, cases, directory, status=BAD_INPUT):
    before = contents(directory)
    refuse(module, cases, cwd=directory, status=status)
    assert contents(directory) == before


def tuning(tried, flags):
    """Whole command lines: the last of two equal flags counts."""
    return [(["--facts=facts.jsonl", "--workdir=new", *flags, *arguments], words) for arguments, words in tried]


def test_tune_refuses(directory):
    """With the default kind of memory; what both kinds refuse is refused before they differ."""
    cases, flags = (case for tried in TUNE.values() for case in tried.values()), FLAGS[len(helpers.PAPER) :]
    refuse_all("lamini_jax.tune", tuning(cases, flags), directory)


@pytest.mark.parametrize("kind", OTHER)
def test_tune_refuses_with_another_status(kind, directory):
    status, tried = OTHER[kind]
    refuse_all("lamini_jax.tune", tuning(tried.values(), FLAGS), directory, status)


def test_ask_refuses(directory):
    refuse_all("lamini_jax.ask", [case for tried in ASK.values() for case in tried.values()], directory)
