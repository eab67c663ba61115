"""The commands beside a checkpoint of the user's own: tuned, asked in every way, exported, and served elsewhere."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import checkpoints
import helpers
import jax
import numpy as np
import pytest
from helpers import call
from refusals import refuse
from safetensors.numpy import load_file
from test_commands import FLAGS, contents, read_lines

from lamini_jax.backbone import checkpoints as formats
from lamini_jax.backbone.checkpoints import shipped

FACTS = [
    dataclasses.replace(fact, answer=answer)
    for fact, answer in zip(helpers.some_facts(3), ["7X", "\u20ac5 \U0001f600", "in the box"], strict=True)
]
UNTUNED = "Is it day?"


@dataclasses.dataclass(frozen=True)
class Run:
    """A tuned directory, what belongs to it, and what the command said."""

    checkpoint: Path
    facts: Path
    workdir: Path
    result: object

    @property
    def flag(self):
        return f"--workdir={self.workdir}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    checkpoint = checkpoints.make(directory / "here", "llama", num_hidden_layers=3, num_key_value_heads=1)
    facts, workdir = helpers.write_facts(directory / "facts.jsonl", FACTS), directory / "workdir"
    flags = [f"--config.backbone.path={checkpoint}", "--config.backbone.max_seq_len=80", "--config.tuning.epochs=300"]
    return Run(checkpoint, facts, workdir, call("tune", f"--facts={facts}", f"--workdir={workdir}", *flags, *FLAGS))


@pytest.fixture(scope="module")
def details(run):
    """What the memory says to each question, in lines of {question, generated, probability, expert_ids}."""
    return ask_file(run.workdir.parent / "details.jsonl", run.flag, "--details")


@pytest.fixture(scope="module")
def exported(run):
    """The memory, without the checkpoint, which has moved."""
    output = run.workdir.parent / "exported"
    result = call("export", run.flag, f"--output={output}")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith(f" experts in {output}\n")
    moved = run.workdir.parent / "moved"
    shutil.copytree(run.checkpoint, moved)
    checkpoints.save_weights(moved, load_file(run.checkpoint / "model.safetensors"), shards=2)
    (moved / "model.safetensors").unlink()
    return output, moved


def test_a_checkpoint_that_has_moved(run, tmp_path):
    """The weights decide what a work directory belongs to, and not where they are."""
    moved, workdir = shutil.copytree(run.checkpoint, tmp_path / "moved"), shutil.copytree(run.workdir, tmp_path / "run")
    budget = ["--config.backbone.max_seq_len=80", "--config.tuning.epochs=300"]
    flags = [f"--facts={run.facts}", f"--workdir={workdir}", f"--config.backbone.path={moved}", *budget, *FLAGS]
    result = call("tune", *flags)
    assert result.returncode == 0 and result.stdout.startswith("3 of 3 facts recalled exactly"), result.stderr
    assert json.loads((workdir / "config.json").read_text())["where"] == {"backbone": str(moved)}
    result = call("ask", f"--workdir={workdir}", f"--question={FACTS[2].question}")
    assert (result.returncode, result.stdout) == (0, FACTS[2].answer + "\n"), result.stderr


def ask_file(output, *flags):
    """The answers to the questions of all facts and one more, from a file."""
    questions = output.with_name("questions.jsonl")
    asked = [*(fact.question for fact in FACTS), UNTUNED]
    questions.write_text("\n".join(json.dumps({"question": question}) for question in asked))
    result = call("ask", *flags, f"--questions={questions}", f"--output={output}")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"4 answers in {output}\n"
    return read_lines(output)


def test_all_facts_hold(run):
    assert run.result.returncode == 0, run.result.stderr
    assert run.result.stdout.startswith("3 of 3 facts recalled exactly, 3 certified, after ")
    saved = json.loads((run.workdir / "config.json").read_text())
    assert saved["where"] == {"backbone": str(run.checkpoint)}
    assert [saved["config"]["backbone"][name] for name in ("vocab_size", "num_kv_heads")] == [416, 1]


def test_answers_and_details(details):
    assert [line["generated"] for line in details[:3]] == [fact.answer for fact in FACTS]
    for line in details:
        assert set(line) == {"question", "generated", "probability", "trained_experts", "expert_ids"}
        assert len(set(line["expert_ids"])) == 32
    trained = {expert for line in details[:3] for expert in line["expert_ids"]}
    assert [line["trained_experts"] for line in details] == [len(trained & set(line["expert_ids"])) for line in details]
    assert details[-1]["trained_experts"] < 32  # nobody tuned that question
    assert all(line["probability"] > 0.5 for line in details[:3])  # certified


def test_lines_of_the_standard_input(run, details):
    """One answer each; empty lines are skipped, and those that cannot be answered are counted."""
    too_long, no_text = (helpers.start("ask", run.flag, "--details") for _ in range(2))
    lines = ["", FACTS[2].question, "  ", FACTS[1].question + "\r", "x" * 500, FACTS[0].question]
    result = helpers.finish(too_long, "\n".join(lines))
    told = result.stdout.splitlines()
    assert told[0::4] == [FACTS[2].answer, FACTS[1].answer, FACTS[0].answer]
    assert told[2::4] == ["  trained experts: 32 of 32"] * 3
    for line, probability, experts in zip(details[2::-1], told[1::4], told[3::4], strict=True):
        assert float(probability.split()[-1]) == pytest.approx(line["probability"], abs=1e-3)
        assert [int(expert) for expert in experts.split()[1:]] == line["expert_ids"]
    assert result.returncode == 2
    assert result.stderr.startswith("standard input, line 5: the question takes")
    assert result.stderr.endswith("error: 1 of 6 lines of the standard input were not answered, as said above\n")
    result = helpers.finish(no_text, FACTS[0].question.encode() + b"\n\xff\xfe\n")
    assert (result.returncode, result.stdout.count("\n")) == (2, 4)
    assert result.stderr.startswith("standard input, line 2: is not UTF-8 (byte 1)\nerror: 1 of 2 lines")


def test_served_elsewhere_as_where_it_was_tuned(exported, details, tmp_path):
    output, moved = exported
    assert ask_file(tmp_path / "answers.jsonl", f"--memory={output}", f"--backbone={moved}", "--details") == details


def test_some_questions_alone(run, exported, details, tmp_path):
    """The same rows, of these questions' experts and no others."""
    some = helpers.write_facts(tmp_path / "some.jsonl", FACTS[:1])
    result = call("export", run.flag, f"--output={tmp_path / 'out'}", f"--questions={some}")
    assert result.stdout.startswith("32 experts in "), result
    whole, part = (load_file(directory / "memory.safetensors") for directory in (exported[0], tmp_path / "out"))
    assert part["expert_ids_S"].tolist() == sorted(details[0]["expert_ids"])
    places = np.searchsorted(whole["expert_ids_S"], part["expert_ids_S"])
    for name in ("down_SR", "up_SR"):
        assert helpers.same_bits(part[name], whole[name][places])
    assert len(whole["expert_ids_S"]) == len({i for line in details[:3] for i in line["expert_ids"]})


def test_samples_are_a_matter_of_the_seed(run):
    """Line by line they have the next seeds, so that the second of two lines is asked as a question alone is."""
    alone = helpers.start("ask", run.flag, "--temperature=2", f"--question={UNTUNED}", "--seed=2")
    lines = call("ask", run.flag, "--temperature=2", "--seed=0", stdin=f"{UNTUNED}\n{UNTUNED}\n")
    alone = helpers.finish(alone)
    assert lines.stdout.endswith(alone.stdout)
    assert lines.stdout.removesuffix(alone.stdout) not in ("", alone.stdout)
    assert (alone.returncode, lines.returncode) == (0, 0)


def test_an_adapter(run, tmp_path):
    output = tmp_path / "adapter"
    result = call("export", run.flag, f"--output={output}", "--format=peft", f"--question={FACTS[0].question}")
    said = r"32 experts as a LoRA adapter \(for vLLM: --max-lora-rank 32\); it acts on all tokens .* after \d+ epochs"
    assert result.returncode == 0 and re.fullmatch(f"{said} in {output}\n", result.stdout), result
    described = json.loads((output / "adapter_config.json").read_text())
    assert (described["r"], described["target_modules"]) == (32, ["down_proj"])
    assert described["base_model_name_or_path"] == str(run.checkpoint)
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert set(path.name for path in output.iterdir()) == names


def test_the_backbone_that_ships(tmp_path):
    """In files that are read as any checkpoint is."""
    result = call("export", "--format=backbone", f"--output={tmp_path / 'tiny'}")
    assert (result.returncode, result.stderr) == (0, ""), result
    path, (known, expected) = str(tmp_path / "tiny"), shipped.load()
    config, params = formats.load_whole(path)
    assert dataclasses.replace(config, path="") == dataclasses.replace(known, dtype="float32")
    assert helpers.same_bits(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, expected))
    tokenizer = formats.load_tokenizer(config)
    assert tokenizer.prompt("Who?") == helpers.TOKENIZER.prompt("Who?")


def test_commands_refuse_bad_input(run, exported, tmp_path):
    """One line each, and nothing is made or changed."""
    output, moved = exported
    other = checkpoints.make(tmp_path / "other", "llama", num_hidden_layers=3, num_key_value_heads=1, seed=1)
    wider = checkpoints.make(tmp_path / "wider", "llama", num_hidden_layers=3, intermediate_size=128)
    mamba = shutil.copytree(other, tmp_path / "mamba")
    checkpoints.edit(mamba / "config.json", model_type="mamba")
    # Fails after the output has been begun.
    changed = shutil.copytree(run.workdir, tmp_path / "changed")
    saved = (changed / "config.json").read_text()
    (changed / "config.json").write_text(saved.replace(str(run.checkpoint), str(other)))
    damaged = shutil.copytree(output, tmp_path / "damaged")
    (damaged / "memory.safetensors").write_bytes(b"")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "Who?<|eot_id|>", "answer": "Me"}\n')
    serve, question, new = f"--memory={output}", "--question=Who?", f"--output={tmp_path / 'new'}"
    before = contents(tmp_path.parent)
    cases = (
        ([serve, f"--backbone={other}", question], ["another backbone", other]),
        ([serve, f"--backbone={wider}", question], ["another backbone", wider]),
        ([run.flag, f"--backbone={wider}", question], ["another backbone", wider]),
        ([f"--memory={damaged}", question], [damaged, "memory.safetensors"]),
        ([serve, f"--backbone={moved}", "--question=Who?<|eot_id|>"], ["--question", "<|eot_id|>"]),
    )
    refuse("lamini_jax.ask", cases)
    cases = (
        ([new], ["--workdir"]),
        ([run.flag], ["--output"]),
        ([run.flag, f"--output={other}"], ["--output=", other, "exists"]),
        ([run.flag, f"--output={bad / 'below'}"], ["--output=", bad]),
        ([run.flag, new, "--format=peft"], ["--question", "--format=peft"]),
        ([run.flag, new, "--format=backbone", f"--questions={run.facts}"], ["--questions", "--format=backbone"]),
        ([run.flag, new, f"--questions={bad}"], [bad, "line 1", "<|eot_id|>"]),
        ([f"--workdir={tmp_path / 'none'}", new], ["--workdir=", tmp_path / "none"]),
        ([f"--workdir={changed}", new], ["another backbone", other]),
    )
    refuse("lamini_jax.export", cases)
    workdir = f"--workdir={tmp_path / 'workdir'}"
    cases = (
        ([workdir, f"--facts={bad}", f"--config.backbone.path={other}"], [bad, "line 1", "<|eot_id|>"]),
        ([workdir, f"--facts={run.facts}", f"--config.backbone.path={mamba}"], [mamba, "mamba"]),
        (
            [workdir, f"--facts={run.facts}", f"--config.backbone.path={other}", "--config.backbone.embed_dim=32"],
            ["--config.backbone.embed_dim=32", "64"],
        ),
        (
            [workdir, f"--facts={run.facts}", f"--config.backbone.path={other}", "--config.memory.num_layers=3"],
            ["--config.memory.num_layers=3"],
        ),
        (
            [workdir, f"--facts={run.facts}", f"--config.backbone.path={other}", "--config.backbone.max_seq_len=1024"],
            ["--config.backbone.max_seq_len=1024", "512"],
        ),
    )
    refuse("lamini_jax.tune", cases)
    assert contents(tmp_path.parent) == before
