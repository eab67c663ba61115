"""Facts: what a user's file may and may not hold; datasets that depend on their arguments and on nothing else."""

import csv
import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from lamini_jax.data import builders, facts, world
from lamini_jax.data.tokenizer import ByteTokenizer
from lamini_jax.errors import UserError

CONTEXT = 256
GOOD = '{"question": "Who?", "answer": "Me"}'
COLUMNS = ("Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMINI_JAX_DATA", str(tmp_path / "home"))
    return tmp_path / "home"


def write(tmp_path, *lines):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return str(path)


def write_truthful_qa(directory, pairs, columns=COLUMNS):
    directory.mkdir(exist_ok=True)
    with open(directory / builders.TRUTHFUL_QA_FILE, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, restval="?", extrasaction="ignore")
        table.writeheader()
        table.writerows({"Question": question, "Best Answer": answer} for question, answer in pairs)
    return str(directory)


def pairs_of(found):
    return [(fact.question, fact.answer) for fact in found]


def read(path):
    return facts.read_jsonl(path, ByteTokenizer(), CONTEXT)


def test_jsonl_keeps_order_and_text(tmp_path):
    lines = [GOOD, "", "  \t", '{"answer": "Là\\n", "question": " Où est-il? ", "note": [1]}']
    assert pairs_of(read(write(tmp_path, "\r\n".join(lines)))) == [("Who?", "Me"), (" Où est-il? ", "Là\n")]


def test_ids_depend_on_the_question_alone(tmp_path):
    first = read(write(tmp_path, GOOD, '{"question": "1+2", "answer": "3"}'))
    second = read(write(tmp_path, '{"question": "1+2", "answer": "4"}', "", GOOD))
    assert [fact.id for fact in first] == [fact.id for fact in reversed(second)]
    assert first[0].id != first[1].id


def test_byte_order_mark_and_line_separators_inside_strings(tmp_path):
    (fact,) = read(write(tmp_path, b"\xef\xbb\xbf" + '{"question": "a\u2028b\x85c", "answer": "d"}'.encode()))
    assert fact.question == "a\u2028b\x85c"


def test_exactly_context_tokens_fit(tmp_path):
    answer = "x" * (CONTEXT - len("Who?") - 3)  # three special tokens
    assert read(write(tmp_path, json.dumps({"question": "Who?", "answer": answer})))[0].answer == answer
    with pytest.raises(UserError, match=r"facts.jsonl, line 1: .*257 tokens, and 256 are allowed"):
        read(write(tmp_path, json.dumps({"question": "Who?", "answer": answer + "x"})))


BAD_LINES = {
    "not JSON": "who is it",
    "cut off": '{"question": "a", "answer',
    "nested too deeply": "[" * 100_000,
    "a number of 10,000 digits": "9" * 10_000,
    "an array": '["a", "b"]',
    "a string": '"a"',
    "no question": '{"answer": "b"}',
    "null question": '{"question": null, "answer": "b"}',
    "empty question": '{"question": "", "answer": "b"}',
    "blank question": '{"question": " \\t", "answer": "b"}',
    "too long": json.dumps({"question": "é" * 200, "answer": "b"}),
    "not UTF-8": b'{"question": "caf\xe9", "answer": "b"}',
    "UTF-16": GOOD.encode("utf-16"),
    "lone surrogate": '{"question": "a\\ud800b", "answer": "b"}',
}
BAD_FACTS = BAD_LINES | {
    "no answer": '{"question": "a"}',
    "a number": '{"question": "a", "answer": 1}',
    "empty answer": '{"question": "a", "answer": ""}',
    "blank answer": '{"question": "a", "answer": "\\n"}',
    "lone surrogate in the answer": '{"question": "a", "answer": "\\udfff"}',
    "another answer": '{"question": "Who?", "answer": "You"}',
}


def assert_names_file_and_line(error, line):
    message = str(error.value)
    assert f"facts.jsonl, line {line}: " in message
    assert "\n" not in message
    message.encode()  # what a terminal cannot print helps nobody


@pytest.mark.parametrize("name", BAD_FACTS)
def test_bad_facts_name_file_and_line(tmp_path, name):
    with pytest.raises(UserError) as error:
        read(write(tmp_path, GOOD, "", BAD_FACTS[name]))
    assert_names_file_and_line(error, 3)


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_questions_name_file_and_line(tmp_path, name):
    with pytest.raises(UserError) as error:
        facts.read_questions(write(tmp_path, GOOD, "", BAD_LINES[name]), ByteTokenizer(), CONTEXT)
    assert_names_file_and_line(error, 3)


def test_two_answers_name_both_lines(tmp_path):
    with pytest.raises(UserError, match="line 3: .*line 1"):
        read(write(tmp_path, GOOD, '{"question": "b", "answer": "c"}', GOOD.replace("Me", "You")))


def test_repeated_facts_count_once_with_a_warning(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        found = read(write(tmp_path, GOOD, '{"question": "b", "answer": "c"}', GOOD))
    assert [fact.question for fact in found] == ["Who?", "b"]
    assert "facts.jsonl: line 3 repeats line 1" in caplog.text


@pytest.mark.parametrize("reader", [facts.read_jsonl, facts.read_questions])
def test_bad_files_are_named(tmp_path, reader):
    for path in (str(tmp_path / "missing.jsonl"), str(tmp_path), write(tmp_path, ""), write(tmp_path, "\n \n")):
        with pytest.raises(UserError) as error:
            reader(path, ByteTokenizer(), CONTEXT)
        assert str(error.value).startswith(f"{path}: ")


def test_questions_keep_their_objects(tmp_path):
    objects = [{"question": "a", "id": 7}, {"question": "b"}, {"question": "a", "id": 7}]
    path = write(tmp_path, *map(json.dumps, objects))
    assert facts.read_questions(path, ByteTokenizer(), CONTEXT) == objects


def test_a_question_leaves_room_for_a_token(tmp_path):
    path = write(tmp_path, json.dumps({"question": "x" * (CONTEXT - 3)}))
    assert facts.read_questions(path, ByteTokenizer(), CONTEXT)
    with pytest.raises(UserError, match="255 tokens, and 253 are"):
        facts.read_questions(path, ByteTokenizer(), CONTEXT - 2)


def test_random_answers():
    answers = [facts.random_answer_to(f"question {i}", seed=0) for i in range(2000)]
    assert len(set(answers)) == 2000
    assert {len(answer) for answer in answers} == {32}
    assert set("".join(answers)) == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    assert facts.random_answer_to("question 3", seed=0) == answers[3] != facts.random_answer_to("question 3", seed=1)
    assert facts.random_answer(np.random.default_rng(5)) == facts.random_answer(np.random.default_rng(5))


def test_phone_book_names_never_repeat():
    entries = list(builders.phone_entries(100_000, seed=0))
    assert len({question for question, _ in entries}) == 100_000
    assert all(len(number) == 10 and number.isdecimal() for _, number in entries)
    assert len({number for _, number in entries}) > 99_990
    assert all(question.removeprefix("What is the phone number of ").count(" ") == 1 for question, _ in entries)


def test_phone_book_entries_depend_on_index_and_seed():
    entries = list(builders.phone_entries(1000, seed=0))
    assert list(builders.phone_entries(10, seed=0)) == entries[:10]
    assert not {question for question, _ in entries[:100]} & {q for q, _ in builders.phone_entries(100, seed=1)}


def test_load_is_a_function_of_its_arguments(home, monkeypatch):
    monkeypatch.setattr(builders, "WORLD_LIMIT", 60)
    for name, count in (("phone_book", 50), ("world", 50)):
        fresh = facts.load(name, "true", count, 0, "")
        assert facts.load(name, "true", count, 0, "") == fresh, "read from the disk"
        assert facts.load(name, "true", 7, 0, "") == fresh[:7]
        assert facts.load(name, "true", count, 1, "") != fresh
        assert len({fact.id for fact in fresh}) == len({fact.question for fact in fresh}) == count
    assert (home / "tfds").is_dir()


def test_phone_book_has_only_its_own_digits():
    assert facts.load("phone_book", "random", 5, 0, "") == facts.load("phone_book", "true", 5, 0, "")


def test_world_takes_its_kinds_in_turn(monkeypatch):
    kinds = len(world.FACT_KINDS)
    monkeypatch.setattr(builders, "WORLD_LIMIT", 10 * kinds)
    found = facts.load("world", "true", 2 * kinds, 3, "")
    columns = [world.held_out(kind, 2, 3) for kind in world.FACT_KINDS]
    expected = [columns[i][turn] for turn in range(2) for i in range(kinds)]
    assert pairs_of(found) == [(qa.question, qa.answer) for qa in expected]


def test_random_answers_replace_the_true_ones(monkeypatch):
    monkeypatch.setattr(builders, "WORLD_LIMIT", 30)
    true, random = (facts.load("world", answers, 20, 0, "") for answers in facts.ANSWERS)
    assert [fact.id for fact in true] == [fact.id for fact in random]
    assert all(fact.answer == facts.random_answer_to(fact.question, 0) for fact in random)


def test_truthful_qa(tmp_path):
    long = "x" * 120
    pairs = [("Où?", "Là’s"), ("b, c?", 'A "quoted" one'), (long, "y" * 134), ("Où?", "no"), ("d?", "e")]
    directory = write_truthful_qa(tmp_path / "qa", pairs)
    true, random = (facts.load("truthful_qa", answers, 3, 0, directory) for answers in facts.ANSWERS)
    assert pairs_of(true) == [pairs[0], pairs[1], pairs[4]]
    assert [fact.id for fact in true] == [fact.id for fact in random]
    assert [fact.answer for fact in random] == [facts.random_answer_to(fact.question, 0) for fact in true]
    with pytest.raises(UserError, match=r"--config.data.count=4: truthful_qa has 3 facts"):
        facts.load("truthful_qa", "true", 4, 0, directory)
    assert builders.size(builders.truthful_qa("true", 0, directory, context=257)) == 4


def test_another_csv_is_another_dataset(tmp_path):
    directory = write_truthful_qa(tmp_path / "qa", [("a?", "b")])
    assert facts.load("truthful_qa", "true", 1, 0, directory)[0].answer == "b"
    write_truthful_qa(tmp_path / "qa", [("a?", "c")])
    assert facts.load("truthful_qa", "true", 1, 0, directory)[0].answer == "c"


def test_truthful_qa_is_downloaded_once(tmp_path, monkeypatch):
    source = write_truthful_qa(tmp_path / "qa", [("a?", "b")])
    monkeypatch.setattr(builders, "TRUTHFUL_QA_URL", (tmp_path / "qa" / builders.TRUTHFUL_QA_FILE).as_uri())
    expected = facts.load("truthful_qa", "true", 1, 0, source)
    assert facts.load("truthful_qa", "true", 1, 0, "") == expected
    (tmp_path / "qa" / builders.TRUTHFUL_QA_FILE).unlink()
    assert facts.load("truthful_qa", "true", 1, 0, "") == expected


def test_what_cannot_be_downloaded_is_said_and_what_is_no_csv_is_not_kept(tmp_path, monkeypatch, home):
    page = tmp_path / "page.html"
    monkeypatch.setattr(builders, "TRUTHFUL_QA_URL", page.as_uri())
    with pytest.raises(UserError, match=r"--config.data.dir is empty .* cannot be downloaded"):
        facts.load("truthful_qa", "true", 1, 0, "")
    page.write_text("<html>please log in</html>\nhello\n")
    with pytest.raises(UserError, match="page.html: is not TruthfulQA's CSV"):
        facts.load("truthful_qa", "true", 1, 0, "")
    assert not (home / "downloads").exists()


def test_bad_truthful_qa_files(tmp_path):
    with pytest.raises(UserError, match=r"--config.data.dir=.*TruthfulQA.csv"):
        facts.load("truthful_qa", "true", 1, 0, str(tmp_path))
    directory = tmp_path / "qa"
    for pairs, columns in (
        ([("a?", "b")], COLUMNS[:3]),
        ([], COLUMNS),
        ([("a?", " ")], COLUMNS),
        ([("a?", "b" * 255)], COLUMNS),
    ):
        write_truthful_qa(directory, pairs, columns)
        with pytest.raises(UserError, match=r"TruthfulQA.csv(, line 2)?: "):
            facts.load("truthful_qa", "true", 1, 0, str(directory))
    (directory / builders.TRUTHFUL_QA_FILE).write_bytes(b"Question,Best Answer\ncaf\xe9?,b\n")
    with pytest.raises(UserError, match=r"TruthfulQA.csv(, line 2)?: "):
        facts.load("truthful_qa", "true", 1, 0, str(directory))


@pytest.mark.parametrize(
    ("name", "count", "flag"),
    [
        ("truth", 1, "--config.data.facts=truth: "),
        ("world", 0, "--config.data.count=0: "),
        ("world", 61, "--config.data.count=61: world has 60 facts"),
        ("phone_book", 2**28 + 1, "--config.data.count=268435457: phone_book has 268435456 facts"),
    ],
)
def test_bad_values_name_their_flag(name, count, flag, monkeypatch):
    monkeypatch.setattr(builders, "WORLD_LIMIT", 60)
    with pytest.raises(UserError) as error:
        facts.load(name, "true", count, 0, "")
    assert str(error.value).startswith(flag)


def test_a_folder_that_cannot_keep_datasets_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAMINI_JAX_DATA", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file: cannot keep datasets there .* set LAMINI_JAX_DATA"):
        facts.load("phone_book", "true", 3, 0, "")


def test_a_killed_preparation_is_not_read(home):
    script = """
import os, signal
from lamini_jax.data import builders, facts
def killed(count, seed):
    yield "half", "1"
    os.kill(os.getpid(), signal.SIGKILL)
builders.phone_entries = killed
facts.load("phone_book", "true", 30, 0, "")
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert list(home.rglob("incomplete.*"))
    found = facts.load("phone_book", "true", 30, 0, "")
    assert pairs_of(found) == list(builders.phone_entries(30, 0))


def test_a_faster_process_may_have_prepared_it(monkeypatch):
    expected = facts.load("phone_book", "true", 5, 1, "")

    def overtaken(count, seed):
        monkeypatch.setattr(builders, "phone_entries", entries)
        facts.load("phone_book", "true", 5, 0, "")
        return entries(count, seed)

    entries = builders.phone_entries
    monkeypatch.setattr(builders, "phone_entries", overtaken)
    found = facts.load("phone_book", "true", 5, 0, "")
    assert pairs_of(found) == list(entries(5, 0))
    assert found != expected


def test_loading_is_silent(capfd):
    facts.load("phone_book", "true", 3, 0, "")
    assert capfd.readouterr() == ("", "")


def test_a_users_file_does_not_wait_for_tfds():
    command = "import sys; import lamini_jax.data.facts; sys.exit('tensorflow_datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
