"""What programs import: facts are tuned, a memory is loaded and asked, and what is not used is not imported."""

import dataclasses
import json
import os
import subprocess
import sys

import helpers
import jax.numpy as jnp
import numpy as np
import pytest

import lamini_jax
from lamini_jax import api, exports
from lamini_jax.backbone import transformer
from lamini_jax.config import BackboneConfig, Config
from lamini_jax.errors import UserError

CONFIG = helpers.replace(
    Config(),
    memory={"num_experts": 4096},
    router={"calibration_questions": 64},
    tuning={"optimizer": helpers.CONFIG.tuning.optimizer, "batch_size": 3, "epochs": 300},
)
FACTS = [
    {"question": "What is the code of box 000?", "answer": "7X"},
    {"question": "Where is it?", "answer": "in the box", "source": "a book"},
    {"question": "What is the code of box 001?", "answer": "\u20ac5"},
]
QUESTIONS, ANSWERS = ([fact[key] for fact in FACTS] for key in ("question", "answer"))
UNTUNED = "Is it day?"


def run(program, *arguments):
    """What a program prints, as JSON."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    options = {"env": {**os.environ, "PYTHONPATH": str(helpers.ROOT)}, "stdout": subprocess.PIPE, "text": True}
    return json.loads(subprocess.run(command, check=True, **options).stdout)


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The directory of a run, and what tuning returned."""
    directory = tmp_path_factory.mktemp("api") / "run"
    return directory, lamini_jax.tune(FACTS, directory, CONFIG)


@pytest.fixture(scope="module")
def memory(tuned):
    return lamini_jax.load(tuned[0])


def test_the_package_costs_nothing_until_it_is_used():
    program = "import json, sys, lamini_jax; print(json.dumps([dir(lamini_jax), sorted(sys.modules)]))"
    names, loaded = run(program)
    assert [name for name in loaded if name.startswith("lamini_jax")] == ["lamini_jax"]
    assert not {"jax", "flax", "numpy"} & set(loaded)
    assert names == sorted("Answer Config Fact Memory UserError load load_backbone logits open_memory tune".split())


def test_names_are_found_when_they_are_used():
    assert [name for name in dir(lamini_jax) if getattr(lamini_jax, name) is None] == []
    assert (lamini_jax.load, lamini_jax.UserError, lamini_jax.logits) == (api.load, UserError, transformer.logits)
    with pytest.raises(AttributeError, match="'lamini_jax' has no attribute 'laod'"):
        _ = lamini_jax.laod


def test_tune(tuned):
    directory, result = tuned
    assert (result.facts, result.holding, result.recalled, result.certified) == (3, 3, 3, 3)
    assert 0 < result.epochs < 300 and result.seconds > 0
    assert json.loads((directory / "results.json").read_text()) == dataclasses.asdict(result)
    recall = [json.loads(line) for line in (directory / "recall.jsonl").read_text().splitlines()]
    assert [line["generated"] for line in recall] == ANSWERS


def test_tuned_again_nothing_changes(tuned, tmp_path):
    """Also from a file with the same facts, or with a larger budget."""
    directory, result = tuned
    before = contents(directory)
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(map(json.dumps, FACTS)))
    assert lamini_jax.tune(file, str(directory), helpers.replace(CONFIG, tuning={"epochs": 400})) == result
    assert contents(directory) == before


def test_ask(memory):
    """One question has an answer, several have a list in their order, whatever their lengths."""
    answers = memory.ask([*QUESTIONS, UNTUNED])
    assert [answer.text for answer in answers[:3]] == ANSWERS
    assert memory.ask(QUESTIONS[1]).text == ANSWERS[1] and memory.ask([]) == []
    for answer in answers:
        assert isinstance(answer, lamini_jax.Answer)
        assert len(set(answer.experts)) == 32 and max(answer.experts) < 4096
    trained = {expert for answer in answers[:3] for expert in answer.experts}
    assert [answer.trained_experts for answer in answers] == [len(trained & set(answer.experts)) for answer in answers]
    assert answers[-1].trained_experts < 32
    assert all(0.5 < answer.probability <= 1 for answer in answers[:3])  # certified
    assert memory.ask(QUESTIONS[1], max_new_tokens=3).text == ANSWERS[1][:3]


def test_a_stream_ends_in_the_answer(memory):
    texts = [answer.text for answer in memory.stream(QUESTIONS[1])]
    assert texts[-1] == ANSWERS[1] and len(texts) > 3
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    *_, last = memory.stream(QUESTIONS[1])
    asked = memory.ask(QUESTIONS[1])
    assert (last.text, last.experts, last.trained_experts) == (asked.text, asked.experts, asked.trained_experts)
    assert last.probability == pytest.approx(asked.probability, rel=1e-4)


def test_samples_are_a_matter_of_the_seed(memory):
    first, again, other = (memory.ask([UNTUNED] * 3, 8, temperature=2.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_what_cannot_be_asked(memory):
    with pytest.raises(UserError, match="^question 2: the question takes 502 tokens, and 255 are allowed"):
        memory.ask(["Who?", "x" * 500])
    with pytest.raises(UserError, match='^the question: "question" is empty'):
        next(memory.stream(" "))


BAD_FACTS = {
    "no facts": ([], "facts: has no facts"),
    "no answer": ([FACTS[0], {"question": "Who?"}], 'facts, fact 2: has no "answer"'),
    "a number": ([{"question": "Who?", "answer": 5}], 'facts, fact 1: "answer" is not a string'),
    "two answers": ([FACTS[0], {**FACTS[0], "answer": "8Y"}], "facts, fact 2: answers the question of fact 1"),
    "too long": ([{"question": "Who?", "answer": "x" * 500}], "facts, fact 1: the fact takes 507 tokens"),
    "no mapping": (["question and answer"], "facts, fact 1: is not an object"),
    "no file": ("missing.jsonl", "missing.jsonl: no such file"),
}


@pytest.mark.parametrize("name", BAD_FACTS)
def test_bad_facts_are_named(name, tmp_path):
    facts, message = BAD_FACTS[name]
    with pytest.raises(UserError) as error:
        lamini_jax.tune(facts, tmp_path / "run", CONFIG)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_bad_config_is_named(tmp_path):
    """Also where only a registry knows the names that there are."""
    config = helpers.replace(CONFIG, memory={"target": "mlp"})
    with pytest.raises(UserError, match="^--config.memory.target=mlp: must be one of q_proj, "):
        lamini_jax.tune(FACTS, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_an_approximate_lookup_serves(tuned, memory):
    """What exact keys have tuned."""
    fast = lamini_jax.load(tuned[0], lookup="approximate")
    assert fast.stored.router.lookup == "approximate" != memory.stored.router.lookup
    assert fast.ask(QUESTIONS[0]).text == ANSWERS[0]
    with pytest.raises(UserError, match="^--lookup=product: must be approximate"):
        lamini_jax.load(tuned[0], lookup="product")


def test_there_is_nothing_to_load(tmp_path):
    with pytest.raises(UserError, match="has no finished checkpoint"):
        lamini_jax.load(tmp_path)


PROGRAM = """
import json, sys, lamini_jax
memory = lamini_jax.load(sys.argv[1])
answers = [vars(answer) for answer in memory.ask(json.loads(sys.argv[2]))]
print(json.dumps([answers, sorted(sys.modules)]))
"""


def test_an_exported_memory_answers_the_same_without_training(tuned, memory, tmp_path):
    """In a process of its own, which imports nothing of `lamini_jax.training`."""
    assert exports.memory(api.run_source(tuned[0]), None, str(tmp_path / "out")).endswith(" experts")
    questions = [*QUESTIONS, UNTUNED]
    answers, loaded = run(PROGRAM, tmp_path / "out", json.dumps(questions))
    assert answers == [vars(answer) for answer in memory.ask(questions)]
    assert [name for name in loaded if name.startswith(("lamini_jax.training", "lamini_jax.configure"))] == []


def test_the_shipped_backbone():
    config, params = lamini_jax.load_backbone()
    assert config == BackboneConfig()
    questions = "What is 12 plus 34?", "What is 21 plus 34?"
    tokens_BT = np.array([helpers.TOKENIZER.prompt(question) for question in questions])
    logits_BTV = lamini_jax.logits(config, params, tokens_BT)
    assert logits_BTV.shape == (*tokens_BT.shape, 256) and logits_BTV.dtype == jnp.float32
    assert helpers.TOKENIZER.decode(np.asarray(logits_BTV[:, -1].argmax(-1))) == "45"
