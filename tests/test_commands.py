"""`tune` and `ask` as their users meet them: what they print, what they leave behind, and how they end."""

import json
import shutil
import subprocess
import sys

import helpers
import pytest
from refusals import refuse

from lamini_jax.errors import BAD_INPUT, OTHER_RUN
from lamini_jax.runtime.workdir import alone

FACTS = helpers.some_facts(2, answer_length=3)
FLAGS = (
    *helpers.PAPER,
    "--config.memory.num_experts=4096",
    "--config.router.calibration_questions=64",
    "--config.tuning.optimizer.name=adam",
    "--config.tuning.optimizer.learning_rate=0.1",
    "--config.tuning.batch_size=2",
)

HOLD = (
    "import sys, time; from lamini_jax.runtime import workdir\n"
    "with workdir.alone(sys.argv[1]): print('x', flush=True); time.sleep(60)"
)


def contents(directory):
    return {path.relative_to(directory): path.is_file() and path.read_bytes() for path in directory.rglob("*")}


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return helpers.write_facts(tmp_path_factory.mktemp("facts") / "facts.jsonl", FACTS)


@pytest.fixture(scope="module")
def stopped(facts, tmp_path_factory):
    """A work directory whose budget ended too early, and what the command said."""
    workdir = tmp_path_factory.mktemp("run") / "below" / "workdir"
    result = helpers.call("tune", f"--facts={facts}", f"--workdir={workdir}", "--config.tuning.epochs=1", *FLAGS)
    return workdir, result, contents(workdir)


@pytest.fixture(scope="module")
def finished(facts, stopped):
    """The same directory, gone on with until all facts hold, and what the command said."""
    workdir, _, _ = stopped
    result = helpers.call("tune", f"--facts={facts}", f"--workdir={workdir}", "--config.tuning.epochs=300", *FLAGS)
    return workdir, result


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_budget_ended(stopped):
    _, result, files = stopped
    told = result.stderr.splitlines()[-1]
    assert result.returncode == 3 and told.startswith("error: "), result.stderr
    assert "2 of 2 facts" in told and "--config.tuning.epochs=2" in told
    results = json.loads(next(content for path, content in files.items() if path.name == "results.json"))
    assert results["facts"] == 2 and results["holding"] == 0 and results["epochs"] == 1


def test_all_hold(finished):
    workdir, result = finished
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("2 of 2 facts recalled exactly, 2 certified, after ")
    lines = read_lines(workdir / "recall.jsonl")
    assert [(line["question"], line["answer"]) for line in lines] == [(fact.question, fact.answer) for fact in FACTS]
    for line in lines:
        assert line["generated"] == line["answer"]
        assert line["exact"] is line["certified"] is True
        assert 0 <= line["worst_token_loss"] < 0.6932
    results = json.loads((workdir / "results.json").read_text())
    assert results["facts"] == results["holding"] == results["recalled"] == results["certified"] == 2
    assert 1 < results["epochs"] < 300
    assert {path.name for path in workdir.iterdir()} == {"config.json", "checkpoints", "recall.jsonl", "results.json"}


def test_a_finished_directory_is_done(finished, facts):
    """The same line again, and nothing is changed."""
    workdir, first = finished
    before = contents(workdir)
    result = helpers.call("tune", f"--facts={facts}", f"--workdir={workdir}", "--config.tuning.epochs=300", *FLAGS)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == first.stdout and result.stdout.count("\n") == 1
    assert contents(workdir) == before


def test_tune_refuses_bad_input(facts, tmp_path):
    """One line each, and nothing is made."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text(facts.read_text() + "who is it\n")
    workdir = f"--workdir={tmp_path / 'workdir'}"
    cases = (
        ([workdir, f"--facts={tmp_path / 'missing.jsonl'}"], ["missing.jsonl"]),
        ([workdir, f"--facts={bad}"], [bad, "line 3"]),
        (
            [workdir, f"--facts={facts}", "--config.memory.num_experts=8", "--config.memory.top_k=9"],
            ["--config.memory.top_k=9"],
        ),
        ([workdir, f"--facts={facts}", "--config.backbone.embed_dim=64"], ["--config.backbone.embed_dim=64"]),
    )
    refuse("lamini_jax.tune", cases)
    assert list(tmp_path.iterdir()) == [bad]


def test_tune_refuses_a_directory_of_another_run(finished, facts, tmp_path):
    workdir, _ = finished
    flag = f"--workdir={workdir}"
    other = helpers.write_facts(tmp_path / "other.jsonl", FACTS[:1])
    before = contents(workdir)
    cases = (
        ([flag, f"--facts={facts}", *FLAGS, "--config.seed=1"], [flag, "config.seed: 0 -> 1"]),
        ([flag, f"--facts={other}", *FLAGS], [flag, "facts: "]),
    )
    refuse("lamini_jax.tune", cases, status=OTHER_RUN)
    assert contents(workdir) == before


def test_ask_prints_the_answer_alone(finished):
    workdir, _ = finished
    result = helpers.call("ask", f"--workdir={workdir}", f"--question={FACTS[1].question}")
    assert (result.returncode, result.stdout) == (0, FACTS[1].answer + "\n")


def test_ask_answers_a_file(finished, tmp_path):
    workdir, _ = finished
    asked = [{"question": FACTS[1].question, "id": 7}, {"question": "Who?"}, {"question": FACTS[0].question}]
    questions, output = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text("\n\n".join(map(json.dumps, asked)))
    result = helpers.call("ask", f"--workdir={workdir}", f"--questions={questions}", f"--output={output}")
    assert result.returncode == 0, result.stderr
    answered = read_lines(output)
    assert [{key: line[key] for key in line if key != "generated"} for line in answered] == asked
    assert [answered[0]["generated"], answered[2]["generated"]] == [FACTS[1].answer, FACTS[0].answer]
    assert set(tmp_path.iterdir()) == {questions, output}


def test_ask_refuses_bad_input(finished, facts, tmp_path):
    """The directory of another command, say, which has results too but no checkpoints."""
    workdir, _ = finished
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("config.json", "results.json"):
        (tmp_path / "other" / name).write_bytes((workdir / name).read_bytes())
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "Who?"}\n{"answer": "Me"}\n')
    flag, output = f"--workdir={workdir}", f"--output={tmp_path / 'answers.jsonl'}"
    before = contents(tmp_path)
    cases = (
        ([f"--workdir={tmp_path / 'empty'}", "--question=Who?"], [tmp_path / "empty", "no finished checkpoint"]),
        ([f"--workdir={tmp_path / 'other'}", "--question=Who?"], [tmp_path / "other", "checkpoint"]),
        ([flag, "--question=Who?", f"--questions={facts}", output], ["--question", "--questions"]),
        ([], ["--workdir", "--memory"]),
        ([flag, f"--memory={tmp_path}", "--question=Who?"], ["--workdir", "--memory"]),
        ([f"--memory={tmp_path / 'empty'}", "--question=Who?"], ["--memory=", tmp_path / "empty", "memory.json"]),
        ([flag, "--multihost"], ["--multihost", "--question"]),
        ([flag, "--question=Who?", "--temperature=-1"], ["--temperature"]),
        ([flag, "--question=Who?", "--seed=-1"], ["--seed"]),
        ([flag, f"--backbone={tmp_path / 'gone'}", "--question=Who?"], [tmp_path / "gone", "no such directory"]),
        ([flag, f"--questions={facts}"], ["--output"]),
        ([flag, f"--questions={bad}", output], [bad, "line 2"]),
        ([flag, f"--questions={facts}", f"--output={tmp_path / 'no' / 'a'}"], ["--output="]),
    )
    refuse("lamini_jax.ask", cases)
    assert contents(tmp_path) == before


def test_a_directory_in_which_a_run_is_at_work(finished, facts, tmp_path):
    """A second one says so and changes nothing; when the first has ended, however it did, another may begin."""
    workdir, _ = finished
    arguments = [f"--facts={facts}", f"--workdir={workdir}", "--config.tuning.epochs=300", *FLAGS]
    before = contents(workdir)
    with alone(workdir):
        refuse("lamini_jax.tune", [(arguments, [f"--workdir={workdir}", "another run is at work in it"])])
    assert contents(workdir) == before
    killed = subprocess.Popen([sys.executable, "-c", HOLD, str(workdir)], stdout=subprocess.PIPE)
    assert killed.stdout.read(1) == b"x"
    killed.kill()
    killed.communicate()
    with alone(workdir):
        pass


def test_several_commands_at_once(finished, tmp_path):
    """They answer and export as each does alone."""
    flag = f"--workdir={finished[0]}"
    asking = [helpers.start("ask", flag, f"--question={FACTS[0].question}") for _ in range(2)]
    exporting = [helpers.start("export", flag, f"--output={tmp_path / name}") for name in "ab"]
    results = [helpers.finish(process) for process in (*asking, *exporting)]
    assert [result.returncode for result in results] == [0] * 4, results
    assert [result.stdout for result in results[:2]] == [FACTS[0].answer + "\n"] * 2
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and len(contents(tmp_path / "a")) == 2


def test_asking_and_exporting_while_it_tunes(stopped, facts, tmp_path):
    """Each ends well or in one line; the run is not disturbed."""
    for path, content in stopped[2].items():
        place = tmp_path / "run" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir(exist_ok=True) if content is False else place.write_bytes(content)
    flag, output = f"--workdir={tmp_path / 'run'}", tmp_path / "exported"
    tuning = helpers.start("tune", f"--facts={facts}", flag, "--config.tuning.epochs=300", *FLAGS)
    results = []
    while tuning.poll() is None:
        both = (
            helpers.start("ask", flag, "--question=Who?"),
            helpers.start("export", flag, f"--output={output}"),
        )
        results += [helpers.finish(process) for process in both]
        shutil.rmtree(output, ignore_errors=True)
    assert helpers.finish(tuning).returncode == 0 and results
    for result in results:
        lines = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")]
        assert (result.returncode, len(lines)) in ((0, 0), (BAD_INPUT, 1)), (result.stdout, result.stderr)
    result = helpers.call("ask", flag, f"--question={FACTS[0].question}")
    assert (result.returncode, result.stdout) == (0, FACTS[0].answer + "\n")
