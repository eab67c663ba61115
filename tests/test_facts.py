"""Facts: what a user's file may and may not hold, and answers that are random."""

import gzip
import json

import kinds
import numpy as np
import pytest

from lamini_jax.backbone.tokenizer import ByteTokenizer
from lamini_jax.data import facts
from lamini_jax.errors import UserError

MAX_SEQ_LEN = 256
GOOD = '{"question": "Who?", "answer": "Me"}'


def write(tmp_path, *lines):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return str(path)


def pairs_of(found):
    return [(fact.question, fact.answer) for fact in found]


def read(path):
    return facts.read(path, ByteTokenizer(), MAX_SEQ_LEN)


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


def test_exactly_max_seq_len_tokens_fit(tmp_path):
    answer = "x" * (MAX_SEQ_LEN - len("Who?") - 3)  # three special tokens
    assert read(write(tmp_path, json.dumps({"question": "Who?", "answer": answer})))[0].answer == answer
    with pytest.raises(UserError, match=r"facts.jsonl, line 1: .*257 tokens, and 256 are allowed"):
        read(write(tmp_path, json.dumps({"question": "Who?", "answer": answer + "x"})))


# kind -> instance -> the line
BAD_LINES = {
    "lines: not JSON": {
        "words": "who is it",
        "cut off": '{"question": "a", "answer',
        "CSV": "question,answer",
        "nested too deeply": "[" * 100_000,
        "a number of 10,000 digits": "9" * 10_000,
        "NaN": '{"question": "a", "answer": "b", "score": NaN}',
        "a number beyond floats": '{"question": "a", "answer": "b", "score": 1e999}',
        "a key twice": '{"question": "a", "answer": "b", "question": "c"}',
    },
    "lines: not UTF-8": {
        "Latin-1": b'{"question": "caf\xe9", "answer": "b"}',
        "UTF-16": GOOD.encode("utf-16"),
        "gzip": gzip.compress(GOOD.encode()),
        "NUL": b"\0" * 20,
    },
    "lines: not an object": {"an array": '["a", "b"]', "a string": '"a"', "a number": "1", "null": "null"},
    "questions": {
        "none": '{"answer": "b"}',
        "null": '{"question": null, "answer": "b"}',
        "empty": '{"question": "", "answer": "b"}',
        "blank": '{"question": " \\t", "answer": "b"}',
        "too long": json.dumps({"question": "\u00e9" * 200, "answer": "b"}),
        "half of a character": '{"question": "a\\ud800b", "answer": "b"}',
    },
}
BAD_ANSWERS = {
    "answers": {
        "none": '{"question": "a"}',
        "a number": '{"question": "a", "answer": 1}',
        "a list": '{"question": "a", "answer": ["b"]}',
        "empty": '{"question": "a", "answer": ""}',
        "blank": '{"question": "a", "answer": "\\n"}',
        "half of a character": '{"question": "a", "answer": "\\udfff"}',
        "another than before": '{"question": "Who?", "answer": "You"}',
        "too long": json.dumps({"question": "a", "answer": "b" * 300}),
    },
}


LINES = kinds.cases(BAD_LINES)


def assert_names_file_and_line(error, line):
    message = str(error.value)
    assert f"facts.jsonl, line {line}: " in message
    assert "\n" not in message
    message.encode()  # what a terminal cannot print helps nobody


@pytest.mark.parametrize("line", [*kinds.cases(BAD_ANSWERS), *LINES])
def test_bad_facts_name_file_and_line(tmp_path, line):
    with pytest.raises(UserError) as error:
        read(write(tmp_path, GOOD, "", line))
    assert_names_file_and_line(error, 3)


@pytest.mark.parametrize("line", LINES)
def test_bad_questions_name_file_and_line(tmp_path, line):
    with pytest.raises(UserError) as error:
        facts.read_questions(write(tmp_path, GOOD, "", line), ByteTokenizer(), MAX_SEQ_LEN)
    assert_names_file_and_line(error, 3)


def test_two_answers_name_both_lines(tmp_path):
    with pytest.raises(UserError, match="line 3: .*line 1"):
        read(write(tmp_path, GOOD, '{"question": "b", "answer": "c"}', GOOD.replace("Me", "You")))


def test_repeated_facts_count_once_with_a_warning(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        found = read(write(tmp_path, GOOD, '{"question": "b", "answer": "c"}', GOOD))
    assert [fact.question for fact in found] == ["Who?", "b"]
    assert "facts.jsonl: line 3 repeats line 1" in caplog.text


@pytest.mark.parametrize("reader", [facts.read, facts.read_questions])
def test_bad_files_are_named(tmp_path, reader):
    for path in (str(tmp_path / "missing.jsonl"), str(tmp_path), write(tmp_path, ""), write(tmp_path, "\n \n")):
        with pytest.raises(UserError) as error:
            reader(path, ByteTokenizer(), MAX_SEQ_LEN)
        assert str(error.value).startswith(f"{path}: ")


def test_questions_keep_their_objects(tmp_path):
    objects = [{"question": "a", "id": 7}, {"question": "b"}, {"question": "a", "id": 7}]
    path = write(tmp_path, *map(json.dumps, objects))
    assert facts.read_questions(path, ByteTokenizer(), MAX_SEQ_LEN) == objects


def test_a_question_leaves_room_for_a_token(tmp_path):
    path = write(tmp_path, json.dumps({"question": "x" * (MAX_SEQ_LEN - 3)}))
    assert facts.read_questions(path, ByteTokenizer(), MAX_SEQ_LEN)
    with pytest.raises(UserError, match="255 tokens, and 253 are"):
        facts.read_questions(path, ByteTokenizer(), MAX_SEQ_LEN - 2)


def test_random_answers():
    answers = [facts.random_answer_to(f"question {i}", seed=0) for i in range(2000)]
    assert len(set(answers)) == 2000
    assert {len(answer) for answer in answers} == {32}
    assert set("".join(answers)) == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    assert facts.random_answer_to("question 3", seed=0) == answers[3] != facts.random_answer_to("question 3", seed=1)
    assert facts.random_answer(np.random.default_rng(5)) == facts.random_answer(np.random.default_rng(5))
