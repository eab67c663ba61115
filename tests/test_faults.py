"""What strangers run into: odd paths, damaged and stale files, closed pipes, full devices, missing devices.

Each ends in the right result or in one line with its status, and nothing that was saved is lost.
"""

import json
import os
import shutil
import subprocess
import sys

import helpers
import kinds
import pytest

import lamini_jax
from lamini_jax import api
from lamini_jax.config import DataConfig
from lamini_jax.errors import BAD_INPUT, DEVICES, UserError
from lamini_jax.runtime import checkpointing, processes, workdir

FACTS = helpers.some_facts(2, answer_length=3)
CONFIG = lamini_jax.Config(
    memory=helpers.CONFIG.memory,
    router=helpers.CONFIG.router,
    tuning=helpers.replace(helpers.CONFIG, tuning={"epochs": 300}).tuning,
    data=DataConfig(count=2),
)
# kind -> instance -> the path of a work directory, from where the command is
ODD_PATHS = {
    "paths: patterns": {"brackets": "[lab] data", "star": "a*b", "question mark": "a?b"},
    "paths: the shell's": {
        "backslash": "a\\b",
        "tilde": "~x",
        "blanks around": " a  b ",
    },
    "paths: letters": {
        "unicode": "donn\u00e9es \u65e5\u672c",
        "line break": "a\nb",
        "not UTF-8": "a\udcffb",
    },
    "paths: ways": {
        "slashes at the end": "a///",
        "a link": "link",
        "long": "a" * 200 + "/" + "b" * 200,
    },
}


DAMAGES = {
    "a byte more": lambda whole: whole + b"x",
    "a byte less": lambda whole: whole[:-1],
    "another byte": lambda whole: bytes([whole[0] ^ 1]) + whole[1:] if whole else b"x",
}
kinds.instances("checkpoints: any file", [*DAMAGES, "missing"])
NO_RESULTS = {
    "results.json: no result": {
        "empty": "",
        "a list": "[]",
        "nothing": "{}",
        "too little": '{"facts": 2}',
        "too much": '{"holding": 2, "more": 1}',
        "words": json.dumps(dict.fromkeys(api.TuneResult.__dataclass_fields__, "2")),
        "nested": "[" * 100_000,
    }
}
kinds.instances("streams", ["full output", "closed input", "not UTF-8", "a line too long", "a reader that has enough"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose facts hold, in a directory whose name is a pattern, and its result."""
    directory = tmp_path_factory.mktemp("runs") / "[lab] data"
    return directory, api.tune(FACTS, directory, CONFIG)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy to break."""
    return shutil.copytree(finished[0], tmp_path / "copy")


def steps(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal())


@pytest.mark.parametrize("path", kinds.cases(ODD_PATHS))
def test_a_memory_tuned_under_any_path_answers(path, finished, tmp_path, monkeypatch):
    """Tuned there, found finished, and asked; nothing is left elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    monkeypatch.chdir(tmp_path)
    first = api.tune(FACTS, path, CONFIG)
    assert first == api.tune(FACTS, path, CONFIG) and first.holding == 2
    assert lamini_jax.load(path).ask(FACTS[1].question).text == FACTS[1].answer


def test_a_missing_checkpoint_is_not_answered_from_an_older_one(copied):
    """It says so, and tuning again ends where it ended before."""
    result = api.TuneResult(**json.loads((copied / "results.json").read_text()))
    assert len(steps(copied)) == 2 and steps(copied)[-1] == result.step
    shutil.rmtree(copied / "checkpoints" / str(result.step))
    with pytest.raises(UserError, match=f"step {result.step}, which results.json describes, is missing"):
        lamini_jax.load(copied)
    again = api.tune(FACTS, copied, CONFIG)
    assert (again.holding, again.epochs, again.step) == (2, result.epochs, result.step)
    assert lamini_jax.load(copied).ask(FACTS[0].question).text == FACTS[0].answer


def test_any_damaged_file_of_a_checkpoint_is_found(copied):
    """One byte more, one byte other, one file less: each is named, and put right all is well again."""
    newest = copied / "checkpoints" / str(steps(copied)[-1])
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        whole = path.read_bytes()
        for damage in (make(whole) for make in DAMAGES.values()):
            path.write_bytes(damage)
            if damage != whole:
                with pytest.raises(UserError, match="missing or damaged") as caught:
                    checkpointing.Checkpoints(copied / "checkpoints").latest()
                assert path.relative_to(newest).as_posix() in str(caught.value) and "\n" not in str(caught.value)
        path.unlink()
        with pytest.raises(UserError, match="missing or damaged"):
            checkpointing.Checkpoints(copied / "checkpoints").latest()
        path.write_bytes(whole)
    assert checkpointing.Checkpoints(copied / "checkpoints").latest().step == steps(copied)[-1]


def test_a_checkpoint_counts_from_its_manifest_on(copied):
    """Killed before it was written, a run continues from the checkpoint before, and saves that step again."""
    older, newest = steps(copied)
    (copied / "checkpoints" / f"manifest-{newest}.json").unlink()
    checkpoints = checkpointing.Checkpoints(copied / "checkpoints")
    assert checkpoints.latest_step() == older
    again = api.tune(FACTS, copied, CONFIG)
    assert (again.holding, again.step) == (2, newest)
    assert lamini_jax.load(copied).ask(FACTS[1].question).text == FACTS[1].answer


def test_outputs_are_checked_and_written_where_they_lead(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    workdir.check_output("output", str(link))
    workdir.write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE, text=True) as reader:
        workdir.write_text(tmp_path / "pipe", "through")
        assert reader.communicate()[0] == "through"
    for path, words in ((tmp_path, "is a directory"), (tmp_path / "no" / "a", "directory does not exist")):
        with pytest.raises(UserError, match=f"--output=.*{words}"):
            workdir.check_output("output", str(path))


def ask(directory, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(helpers.ROOT), **options.pop("environment", {})}
    command = [sys.executable, "-m", "lamini_jax.ask", f"--workdir={directory}", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, env=environment, text=True, **pipes)


def test_the_edges_of_a_process(finished):
    """A device that is full or missing, an input that is closed or wrong, a reader that has enough."""
    directory, question = finished[0], f"--question={FACTS[0].question}"
    with open("/dev/full", "w") as full:
        result = ask(directory, question, stdout=full)
    assert result.returncode == BAD_INPUT and result.stderr.count("\n") == 1 and "No space left" in result.stderr
    result = ask(directory, question, environment={"JAX_PLATFORMS": "cuda"})
    assert result.returncode == DEVICES and result.stderr.count("\n") == 1 and "JAX_PLATFORMS=cuda" in result.stderr
    command = [sys.executable, "-m", "lamini_jax.export", f"--workdir={directory}", f"--output={directory}/exported"]
    environment = {**os.environ, "PYTHONPATH": str(helpers.ROOT), "JAX_PLATFORMS": "cuda"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == DEVICES and result.stderr.count("\n") == 1 and "JAX_PLATFORMS=cuda" in result.stderr
    result = ask(directory, question, environment={"JAX_ENABLE_X64": "1", "PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stdout) == (0, FACTS[0].answer + "\n")
    closed = f"{sys.executable} -m lamini_jax.ask --workdir='{directory}' <&-"
    environment = {**os.environ, "PYTHONPATH": str(helpers.ROOT)}
    result = subprocess.run(["bash", "-c", closed], env=environment, capture_output=True, text=True)
    assert result.returncode == BAD_INPUT and "standard input is closed" in result.stderr
    lines = f"{FACTS[0].question}\n\udcff\n{'x' * 1000}\n{FACTS[1].question}\n"
    result = ask(directory, input=lines, errors="surrogateescape")
    assert result.stdout.splitlines() == [fact.answer for fact in FACTS] and result.returncode == BAD_INPUT
    assert "line 2: is not UTF-8" in result.stderr and "line 3: the question takes" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: 2 of 4 lines")


def test_a_reader_that_has_enough(finished):
    """`ask | head -1` ends without a word."""
    command = f"yes '{FACTS[0].question}' | head -200 | {sys.executable} -m lamini_jax.ask --workdir='{finished[0]}'"
    environment = {**os.environ, "PYTHONPATH": str(helpers.ROOT)}
    result = subprocess.run(["bash", "-c", f"{command} | head -1"], env=environment, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == (FACTS[0].answer + "\n", "")


def test_a_disk_that_is_too_small_is_found_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpointing.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="the disk is too small: it takes 0.00 GB for checkpoints"):
        api.tune(FACTS, tmp_path / "run", CONFIG)
    assert not steps(tmp_path / "run")


@pytest.mark.parametrize(
    "index, visible, devices",
    [
        ("3", "5", [0]),
        ("3", "4,5", [0, 1]),
        ("1", "0,1,2,3", None),
        ("0", "2", None),
        (None, "0", None),
        ("2", None, None),
    ],
)
def test_the_devices_of_a_slurm_task(monkeypatch, index, visible, devices):
    """Where a task sees fewer GPUs than its index on the node, those that it sees are its own."""
    for name, value in (("SLURM_LOCALID", index), ("CUDA_VISIBLE_DEVICES", visible)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert processes._local_devices() == devices


def test_a_memory_whose_facts_do_not_all_hold_says_so(copied, caplog):
    results = json.loads((copied / "results.json").read_text())
    (copied / "results.json").write_text(json.dumps(results | {"holding": 1}))
    lamini_jax.load(copied)
    assert "1 of 2 facts of this memory do not hold" in caplog.text


@pytest.mark.parametrize("content", kinds.cases(NO_RESULTS))
def test_results_that_are_none(copied, content):
    """One line that says what to do, from whoever reads it."""
    (copied / "results.json").write_text(content)
    for use in (lambda: lamini_jax.load(copied), lambda: api.tune(FACTS, copied, CONFIG)):
        with pytest.raises(UserError, match="results.json: is no result of tune .*; remove it") as caught:
            use()
        assert "\n" not in str(caught.value)
