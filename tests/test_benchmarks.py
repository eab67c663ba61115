"""Multiple choice: what the files say, what a likelihood is, and what the two benchmarks make of likelihoods."""

import csv
import dataclasses
import functools

import helpers
import jax
import numpy as np
import pytest

from lamini_jax.backbone import answering, linear_layers, transformer
from lamini_jax.data import benchmarks
from lamini_jax.data.benchmarks import MultipleChoice
from lamini_jax.errors import UserError
from lamini_jax.evaluation import intervals, multiple_choice
from lamini_jax.memory import experts, storage

TOKENIZER = helpers.TOKENIZER
COLUMNS = ("Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source")
ALONE = answering.BARE
# Of several lengths, one in a bucket of its own, with choices that share all bytes but the last, some or none.
ITEMS = [
    MultipleChoice("s", "q?", "Q: q?\nA:", (" yes", " no", " né", " yet"), (True, False, False, False)),
    MultipleChoice("s", "r?", "r?", (" A", " B", " C", " D"), (False, False, True, False), "h\n", ("1 A\n", "2 B\n")),
    MultipleChoice("t", "long?", "x" * 70, (" " + "y" * 20, "z"), (True, False)),
]


@pytest.fixture(scope="module")
def alone(model):
    """The scores of ITEMS by the backbone alone."""
    return multiple_choice.score(model, ALONE, ITEMS)


def write_truthful_qa(directory, *rows, columns=COLUMNS):
    with open(directory / benchmarks.TRUTHFUL_QA_FILE, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return directory


def write_mmlu(directory, split, subject, *rows):
    folder = directory / "mmlu" / split
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{subject}_{split}.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def some_mmlu(directory):
    write_mmlu(directory, "dev", "high_tea", *[(f"dev {i}?", "w", "x", "y", "z", "ABCDA"[i]) for i in range(5)])
    write_mmlu(directory, "test", "high_tea", ("Two\nlines?", 'a "b"', "c, d", "e", "f", "D"), ("g?", *"hijk", "A"))
    write_mmlu(directory, "dev", "art", ("dev?", "1", "2", "3", "4", "B"))
    write_mmlu(directory, "test", "art", ("test?", "5", "6", "7", "8", "C"))
    return directory


def memory(model, router, experts_NR, positions="answer"):
    config = helpers.replace(helpers.CONFIG, memory={"positions": positions})
    return storage.with_experts(model, router, lambda ids_BK: experts.gather(experts_NR, ids_BK), config)


def low_rank(decoder, part, up):
    """A LoRA of rank 4 on every linear layer of the prefix or the suffix, all of whose up matrices have one value."""
    rng, config = np.random.default_rng(0), decoder.config
    layers = {"prefix": config.num_layers - decoder.memory_layers, "suffix": decoder.memory_layers}[part]
    adapter = {
        name: linear_layers.LowRank(
            rng.normal(size=(layers, 4, inputs)).astype(np.float32), np.full((layers, 4, outputs), up, np.float32)
        )
        for name, (inputs, outputs) in linear_layers.linear_shapes(config).items()
    }
    return answering.same_for_all(**{part: adapter})


def direct(model, item, choice):
    """The log-likelihood of one choice from the whole model's logits of its whole text."""
    before, after = TOKENIZER.continuation(item.context, item.choices[choice])
    tokens_1T = np.full((1, 128), TOKENIZER.pad_id)  # one length, which compiles once
    tokens_1T[0, : len(before + after)] = before + after
    log_probabilities_TV = np.asarray(jax.nn.log_softmax(_logits(model.decoder.config, model.params, tokens_1T)))[0]
    return sum(float(log_probabilities_TV[len(before) - 1 + i, token]) for i, token in enumerate(after))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens_BT):
    return transformer.logits(config, transformer.join_layers(params), tokens_BT)


def test_truthful_qa(tmp_path):
    write_truthful_qa(
        tmp_path,
        ("", "Law", " Où? ", "b", "a; b ;c;", "d; e;; d", ""),
        ("", "Food", "e?", "f", "g", "h, i", ""),
    )
    assert benchmarks.truthful_qa(tmp_path) == [
        MultipleChoice("Law", "Où?", "Q: Où?\nA:", (" b", " a", " c", " d", " e"), (True,) * 3 + (False,) * 2),
        MultipleChoice("Food", "e?", "Q: e?\nA:", (" f", " g", " h, i"), (True, True, False)),
    ]


def test_mmlu(tmp_path):
    art, tea, last = benchmarks.mmlu(some_mmlu(tmp_path))
    assert (art.subject, tea.subject, last.subject) == ("art", "high tea", "high tea")
    assert art.context == (
        "The following are multiple choice questions (with answers) about art.\n\n"
        "dev?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "test?\nA. 5\nB. 6\nC. 7\nD. 8\nAnswer:"
    )
    assert art.choices == (" A", " B", " C", " D") and art.right == (False, False, True, False)
    assert tea.question == 'Two\nlines?\nA. a "b"\nB. c, d\nC. e\nD. f\nAnswer:'
    assert [shot.splitlines()[0] for shot in tea.shots] == [f"dev {i}?" for i in range(5)]
    assert tea.context.count("Answer:") == 6 and last.right == (True, False, False, False)
    assert benchmarks.mmlu(tmp_path, per_subject=1) == [art, tea]


def test_examples_are_dropped_until_the_prompt_fits(tmp_path):
    items = benchmarks.mmlu(some_mmlu(tmp_path))
    kept = {}
    for max_seq_len in range(1, 400):
        fitting = benchmarks.fitting(items, TOKENIZER, max_seq_len)
        for item in fitting:
            whole = next(other for other in items if other.question == item.question)
            shots = whole.shots[: len(item.shots)]
            assert dataclasses.replace(whole, shots=shots) == item
            # Begin token, context and a choice of two bytes; one example more would not have fitted.
            assert 1 + len(item.context.encode()) + 2 <= max_seq_len
            if item != whole:
                more = dataclasses.replace(whole, shots=whole.shots[: len(shots) + 1])
                assert 1 + len(more.context.encode()) + 2 > max_seq_len
            kept.setdefault(item.question, set()).add(len(shots))
        left_out = [item for item in items if item.question not in {other.question for other in fitting}]
        assert all(1 + len((item.header + item.ending).encode()) + 2 > max_seq_len for item in left_out)
    assert sorted(map(sorted, kept.values())) == [[0, 1], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


def test_other_items_have_another_fingerprint():
    marks = {benchmarks.fingerprint(items) for items in (ITEMS, ITEMS[::-1], ITEMS[:2])}
    assert len(marks) == 3 and benchmarks.fingerprint(list(ITEMS)) in marks


def complaint(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "TruthfulQA.csv: cannot be read"),
        (b"", "TruthfulQA.csv: is not TruthfulQA's CSV (line 1 does not name 'Category')"),
        (b"Category,Question,Best Answer\na,b,c\n", "line 1 does not name 'Correct Answers'"),
        (",".join(COLUMNS).encode(), "TruthfulQA.csv: has no questions"),
        (",".join(COLUMNS).encode() + b"\n1,a,b,c,d,e,f\n1,a,b,c,;,e,f\n", "csv, line 3: has nothing in the column"),
        (",".join(COLUMNS).encode() + b"\n1,a,b\n", "line 2: has nothing in the column 'Best Answer'"),
        (",".join(COLUMNS).encode() + b"\n1,a,caf\xe9,c,d,e,f\n", "line 2: is not UTF-8"),
        (b"a" * 200_000, "line 1: is not CSV"),
    ],
)
def test_bad_truthful_qa(tmp_path, content, said):
    if content is not None:
        (tmp_path / benchmarks.TRUTHFUL_QA_FILE).write_bytes(content)
    assert said in complaint(benchmarks.truthful_qa, tmp_path)


def test_bad_mmlu(tmp_path):
    assert f"{tmp_path / 'mmlu' / 'test'}: has no SUBJECT_test.csv" in complaint(benchmarks.mmlu, tmp_path)
    good = ("q?", *"abcd", "A")
    write_mmlu(tmp_path, "test", "art", good)
    assert "art_dev.csv: cannot be read" in complaint(benchmarks.mmlu, tmp_path)
    write_mmlu(tmp_path, "dev", "art")
    assert "art_dev.csv: has no questions" in complaint(benchmarks.mmlu, tmp_path)
    write_mmlu(tmp_path, "dev", "art", good)
    for row, said in (
        (("two\nlines?", *"abcd", "E"), "art_test.csv, line 3: the right answer is 'E'"),
        (("q?", *"abcd", "AB"), "art_test.csv, line 2: the right answer is 'AB'"),
        (("q?", *"abcd", ""), "art_test.csv, line 2: the right answer is ''"),
        (("q?", *"abc", "A"), "art_test.csv, line 2: has 5 columns"),
    ):
        write_mmlu(tmp_path, "test", "art", good, row)
        assert said in complaint(benchmarks.mmlu, tmp_path)


def test_a_continuation_is_plain_text():
    assert TOKENIZER.continuation("é", " b") == ([TOKENIZER.begin_id, 0xC3, 0xA9], [0x20, 0x62])


def test_a_score_is_the_sum_of_the_choice_s_log_probabilities(model, alone):
    for item, score_C in zip(ITEMS, alone, strict=True):
        expected_C = [direct(model, item, choice) for choice in range(len(item.choices))]
        np.testing.assert_allclose(score_C, expected_C, rtol=1e-5)


def test_progress_is_told_in_choices(model):
    scored = []
    multiple_choice.score(model, ALONE, ITEMS, scored.append)
    assert len(scored) == 2 and sum(scored) == sum(len(item.choices) for item in ITEMS)
    assert multiple_choice.score(model, ALONE, []) == []


def test_scores_do_not_depend_on_what_else_is_scored(model):
    """70 items, more than a batch, in another order and each alone."""
    items = [dataclasses.replace(ITEMS[i % 3], ending=f"{i} {ITEMS[i % 3].ending}") for i in range(70)]
    scores = multiple_choice.score(model, ALONE, items)
    order = np.random.default_rng(0).permutation(len(items))
    for place, score_C in zip(order, multiple_choice.score(model, ALONE, [items[i] for i in order]), strict=True):
        np.testing.assert_allclose(score_C, scores[place], rtol=1e-5)
    for place in (0, 2):
        np.testing.assert_allclose(multiple_choice.score(model, ALONE, [items[place]])[0], scores[place], rtol=1e-5)


def test_nothing_compiles_in_the_loop(model, caplog):
    items = [dataclasses.replace(ITEMS[1], ending=f"{i:03d}?") for i in range(200)]
    with jax.log_compiles():
        multiple_choice.score(model, ALONE, items)
        scoring = [name for name in helpers.compilations(caplog) if "likelihoods" in name]
    assert len(scoring) == 1


def test_untrained_memory_changes_no_score(model, router, alone):
    experts_NR = experts.init(np.uint32(0), experts.expert_shape(helpers.BACKBONE, helpers.CONFIG.memory), 4096)
    assert helpers.same_bits(multiple_choice.score(model, memory(model, router, experts_NR, "all"), ITEMS), alone)
    # The context is read by itself where memory acts on answers, so that sums are rounded in another order.
    scores = multiple_choice.score(model, memory(model, router, experts_NR), ITEMS)
    for found_C, expected_C in zip(scores, alone, strict=True):
        np.testing.assert_allclose(found_C, expected_C, rtol=1e-5)


def test_experts_are_selected_by_the_question(model, router, alone):
    """Trained experts act where the question selects them, whatever the context says."""
    experts_NR = experts.init(np.uint32(0), experts.expert_shape(helpers.BACKBONE, helpers.CONFIG.memory), 4096)
    prompts = [np.array([TOKENIZER.prompt(text)]) for text in ("first?", "and another")]
    selected = [memory(model, router, experts_NR).select(ids_BT, np.array([ids_BT.size])) for ids_BT in prompts]
    first_K, second_K = (np.asarray(selection.expert_ids_BK)[0] for selection in selected)
    own_K = np.setdiff1d(first_K, second_K)
    assert own_K.size
    adapters = memory(model, router, {**experts_NR, "up": experts_NR["up"].at[own_K].set(0.5)})
    first, second = (
        multiple_choice.score(model, adapters, [dataclasses.replace(item, question=text) for item in ITEMS])
        for text in ("first?", "and another")
    )
    assert all(np.abs(one - other).max() > 1e-3 for one, other in zip(first, alone, strict=True))
    assert helpers.same_bits(second, multiple_choice.score(model, memory(model, router, experts_NR), ITEMS))


@pytest.mark.parametrize("part", ["prefix", "suffix"])
def test_a_lora_is_judged_too(model, alone, part):
    assert helpers.same_bits(multiple_choice.score(model, low_rank(model.decoder, part, 0.0), ITEMS), alone)
    changed = multiple_choice.score(model, low_rank(model.decoder, part, 0.05), ITEMS)
    assert all(np.abs(one - other).max() > 1e-3 for one, other in zip(changed, alone, strict=True))


def test_mc1_and_mc2():
    """Best answer, another correct one, two incorrect ones, with the probabilities that are given."""
    item = MultipleChoice("s", "q", "q", (" a", " b", " c", " d"), (True, True, False, False))
    likelihoods = [(0.4, 0.2, 0.1, 0.3), (0.1, 0.5, 0.2, 0.2), (0.3, 0.1, 0.3, 0.3)]
    # Unnormalized, and so small that they are no float64 any more.
    scores = [np.log(likelihood) - 1000 for likelihood in likelihoods]
    results = multiple_choice.truthful_qa_results([item] * 3, scores)
    # A correct answer that is not the best does not count; nor does a tie.
    assert results["mc1"] == pytest.approx(1 / 3)
    assert results["mc1_interval"] == intervals.wilson(1, 3)
    assert results["mc2"] == pytest.approx(1.6 / 3)
    margin = 1.959964 * np.std([0.6, 0.6, 0.4], ddof=1) / 3**0.5
    assert results["mc2_interval"] == pytest.approx((1.6 / 3 - margin, 1.6 / 3 + margin))
    assert results["questions"] == 3
    assert multiple_choice.truthful_qa_results([item], scores[:1])["mc2_interval"] == (0.0, 1.0)


def test_mmlu_results():
    items = [dataclasses.replace(ITEMS[1], subject=subject) for subject in ("art", "tea", "tea")]
    scores = [np.array(score_C, float) for score_C in ((-9, -8, -7, -8), (-1, -2, -3, -4), (-4, -4, -1, -4))]
    assert multiple_choice.mmlu_results(items, scores, 5) == {
        "accuracy": 2 / 3,
        "interval": intervals.wilson(2, 3),
        "questions": 3,
        "left_out": 5,
        "by_subject": {"art": {"accuracy": 1.0, "questions": 1}, "tea": {"accuracy": 0.5, "questions": 2}},
    }
