"""Data sets: facts that depend on their arguments and on nothing else, and that fit the tokenizer they are for."""

import csv
import dataclasses
import inspect
import itertools
import signal
import subprocess
import sys
from types import ModuleType

import pytest

from lamini_jax.backbone.tokenizer import ByteTokenizer
from lamini_jax.config import DataConfig
from lamini_jax.data import benchmarks, datasets, facts, world
from lamini_jax.data.datasets import ANSWERS, DATASETS, phone_book, truthful_qa
from lamini_jax.data.datasets import world as world_facts
from lamini_jax.errors import UserError

COLUMNS = ("Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source")


class WideTokenizer(ByteTokenizer):
    """Needs four tokens where others need one."""

    def encode(self, text):
        return [token for token in super().encode(text) for _ in range(4)]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMINI_JAX_DATA", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def small_world(monkeypatch):
    monkeypatch.setattr(world_facts, "MOST", 60)


def load(name, count, answers="true", seed=0, directory="", tokenizer=None, max_seq_len=256):
    config = DataConfig(facts=name, count=count, dir=str(directory))
    return datasets.load(config, answers, seed, tokenizer or ByteTokenizer(), max_seq_len)


def phone_entries(count, seed=0):
    return list(itertools.islice(phone_book.pairs(seed), count))


def write_truthful_qa(directory, pairs, columns=COLUMNS):
    directory.mkdir(exist_ok=True)
    with open(directory / benchmarks.TRUTHFUL_QA_FILE, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, restval="?", extrasaction="ignore")
        table.writeheader()
        table.writerows({"Question": question, "Best Answer": answer} for question, answer in pairs)
    return directory


def pairs_of(found):
    return [(fact.question, fact.answer) for fact in found]


@pytest.mark.parametrize("name", DATASETS.names())
def test_every_data_set_has_the_whole_interface(name, tmp_path):
    directory = str(write_truthful_qa(tmp_path / "qa", [("a?", "b"), ("c?", "d")]))
    dataset = DATASETS[name]
    assert dataset.SIZE is None or dataset.SIZE > 0
    assert isinstance(dataset.ANSWERS_ARE_RANDOM, bool)
    for function in (dataset.pairs, dataset.fingerprint):
        assert list(inspect.signature(function).parameters) == ["seed", "directory"]
    mark, first = dataset.fingerprint(0, directory), list(itertools.islice(dataset.pairs(0, directory), 50))
    assert (mark, first) == (dataset.fingerprint(0, directory), list(itertools.islice(dataset.pairs(0, directory), 50)))
    assert all(isinstance(text, str) and text for pair in first for text in pair)
    other = list(itertools.islice(dataset.pairs(1, directory), 50))
    assert other == first or dataset.fingerprint(1, directory) != mark


def test_there_are_those_that_configs_may_name():
    assert {"phone_book", "truthful_qa", "world"} <= set(DATASETS.names())


def test_phone_book_names_never_repeat():
    entries = phone_entries(100_000)
    assert len({question for question, _ in entries}) == 100_000
    assert all(len(number) == 10 and number.isdecimal() for _, number in entries)
    assert len({number for _, number in entries}) > 99_990
    assert all(question.removeprefix("What is the phone number of ").count(" ") == 1 for question, _ in entries)


def test_phone_book_entries_depend_on_index_and_seed():
    entries = phone_entries(10_000)
    assert phone_entries(10) == entries[:10]
    assert entries[0] == ("What is the phone number of Dino Bigam?", "2738251949")
    assert entries[9999] == ("What is the phone number of Loke Lokack?", "9619469525")
    assert not {question for question, _ in entries[:100]} & {question for question, _ in phone_entries(100, seed=1)}


@pytest.mark.parametrize("name", ["phone_book", "world"])
def test_load_is_a_function_of_its_arguments(name, home, small_world):
    fresh = load(name, 50)
    assert load(name, 50) == fresh, "read from the disk"
    assert load(name, 7) == fresh[:7]
    assert load(name, 50, seed=1) != fresh
    assert len({fact.id for fact in fresh}) == len({fact.question for fact in fresh}) == 50
    assert (home / "tfds").is_dir()


def test_phone_book_has_only_its_own_digits():
    assert load("phone_book", 5, "random") == load("phone_book", 5)


def test_world_takes_its_kinds_in_turn(monkeypatch):
    kinds = len(world.FACT_KINDS)
    monkeypatch.setattr(world_facts, "MOST", 10 * kinds)
    found = load("world", 2 * kinds, seed=3)
    columns = [world.held_out(kind, 2, 3) for kind in world.FACT_KINDS]
    expected = [columns[i][turn] for turn in range(2) for i in range(kinds)]
    assert pairs_of(found) == [(qa.question, qa.answer) for qa in expected]


def test_random_answers_replace_the_true_ones(small_world):
    true, random = (load("world", 20, answers) for answers in ANSWERS)
    assert [fact.id for fact in true] == [fact.id for fact in random]
    assert all(fact.answer == facts.random_answer_to(fact.question, 0) for fact in random)
    with pytest.raises(ValueError, match="must be one of true, random"):
        load("world", 20, "wrong")


def test_truthful_qa(tmp_path):
    long = "x" * 120
    pairs = [("Où?", "Là’s"), ("b, c?", 'A "quoted" one'), (long, "y" * 134), ("Où?", "no"), ("d?", "e")]
    directory = write_truthful_qa(tmp_path / "qa", pairs)
    true, random = (load("truthful_qa", 3, answers, directory=directory) for answers in ANSWERS)
    assert pairs_of(true) == [pairs[0], pairs[1], pairs[4]]
    assert [fact.id for fact in true] == [fact.id for fact in random]
    assert [fact.answer for fact in random] == [facts.random_answer_to(fact.question, 0) for fact in true]
    with pytest.raises(UserError, match=r"--config.data.count=4: truthful_qa has 3 facts that fit .*max_seq_len=256"):
        load("truthful_qa", 4, directory=directory)
    assert len(load("truthful_qa", 4, directory=directory, max_seq_len=257)) == 4


def test_the_tokenizer_decides_what_fits(tmp_path):
    """With either answer, so that true and random ones are answers to the same questions."""
    short, with_short_answer, with_random = "a?", "q" * 20, "q" * 10
    pairs = [(short, "b"), (with_short_answer, "b"), (with_random, "b" * 30), ("c?", "b" * 300)]
    directory = write_truthful_qa(tmp_path / "qa", pairs)

    def kept(tokenizer, max_seq_len, answers="true"):
        config = DataConfig(facts="truthful_qa", count=9, dir=str(directory))
        return [fact.question for fact in datasets.load_up_to(config, answers, 0, tokenizer, max_seq_len)]

    assert kept(ByteTokenizer(), 256) == [short, with_short_answer, with_random]
    # Three special tokens and four for each byte of the question and of 32 random ones.
    assert kept(WideTokenizer(), 3 + 4 * (20 + 32)) == [short, with_short_answer, with_random]
    assert kept(WideTokenizer(), 3 + 4 * (20 + 32) - 1) == [short, with_random]
    assert kept(WideTokenizer(), 3 + 4 * (20 + 32) - 1, "random") == [short, with_random]
    assert kept(WideTokenizer(), 3 + 4 * (2 + 32)) == [short]
    with pytest.raises(UserError, match=r"--config.backbone.max_seq_len=138: no fact of truthful_qa fits"):
        kept(WideTokenizer(), 3 + 4 * (2 + 32) - 1)


def test_more_is_prepared_where_some_do_not_fit():
    """Questions about a phone have 39 letters or 40, and numbers, which are the only answers, ten digits."""
    short = [entry for entry in phone_entries(200) if len(entry[0]) == 39]
    assert len(short) < 100
    for answers in ANSWERS:
        assert pairs_of(load("phone_book", 64, answers, max_seq_len=3 + 39 + 10)) == short[:64]


def test_the_search_for_facts_that_fit_ends(home):
    with pytest.raises(UserError, match=r"max_seq_len=50: no fact of phone_book fits"):
        load("phone_book", 5, max_seq_len=50)
    assert len(list((home / "tfds" / "facts").iterdir())) == 10  # tables of 8 to 4096 rows


def test_another_csv_is_another_data_set(tmp_path):
    directory = write_truthful_qa(tmp_path / "qa", [("a?", "b")])
    assert load("truthful_qa", 1, directory=directory)[0].answer == "b"
    write_truthful_qa(tmp_path / "qa", [("a?", "c")])
    assert load("truthful_qa", 1, directory=directory)[0].answer == "c"


def test_another_module_is_another_data_set(tmp_path, monkeypatch):
    """Whoever changes what a data set generates need not think of what was prepared before."""
    source = tmp_path / "numbers.py"

    def first_answer(start):
        source.write_text(
            "SIZE, ANSWERS_ARE_RANDOM = None, False\n"
            "def fingerprint(seed, directory): return 'any'\n"
            f"def pairs(seed, directory): return ((f'{{n}}?', str(n)) for n in range({start}, 99))\n"
        )
        module = ModuleType("numbers")
        module.__file__ = str(source)
        exec(compile(source.read_text(), str(source), "exec"), module.__dict__)
        monkeypatch.setattr(datasets, "DATASETS", {"numbers": module})
        return load("numbers", 3)[0].answer

    assert [first_answer(5), first_answer(7), first_answer(5)] == ["5", "7", "5"]


def test_truthful_qa_is_downloaded_once(tmp_path, monkeypatch):
    source = write_truthful_qa(tmp_path / "qa", [("a?", "b")])
    monkeypatch.setattr(truthful_qa, "TRUTHFUL_QA_URL", (source / benchmarks.TRUTHFUL_QA_FILE).as_uri())
    expected = load("truthful_qa", 1, directory=source)
    assert load("truthful_qa", 1) == expected
    (source / benchmarks.TRUTHFUL_QA_FILE).unlink()
    assert load("truthful_qa", 1) == expected


def test_what_cannot_be_downloaded_is_said_and_what_is_no_csv_is_not_kept(tmp_path, monkeypatch, home):
    page = tmp_path / "page.html"
    monkeypatch.setattr(truthful_qa, "TRUTHFUL_QA_URL", page.as_uri())
    with pytest.raises(UserError, match=r"--config.data.dir is empty .* cannot be downloaded"):
        load("truthful_qa", 1)
    page.write_text("<html>please log in</html>\nhello\n")
    with pytest.raises(UserError, match="page.html: is not TruthfulQA's CSV"):
        load("truthful_qa", 1)
    assert not (home / "downloads").exists()


def test_bad_truthful_qa_files(tmp_path):
    with pytest.raises(UserError, match=r"--config.data.dir=.*TruthfulQA.csv"):
        load("truthful_qa", 1, directory=tmp_path)
    directory = tmp_path / "qa"
    for pairs, columns in (([("a?", "b")], COLUMNS[:3]), ([], COLUMNS), ([("a?", " ")], COLUMNS)):
        write_truthful_qa(directory, pairs, columns)
        with pytest.raises(UserError, match=r"TruthfulQA.csv(, line 2)?: "):
            load("truthful_qa", 1, directory=directory)
    (directory / benchmarks.TRUTHFUL_QA_FILE).write_bytes(b"Question,Best Answer\ncaf\xe9?,b\n")
    with pytest.raises(UserError, match=r"TruthfulQA.csv(, line 2)?: "):
        load("truthful_qa", 1, directory=directory)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("truth", 1, "--config.data.facts=truth: must be one of "),
        ("world", 61, "--config.data.count=61: world has 60 facts"),
        ("phone_book", 2**28 + 1, "--config.data.count=268435457: phone_book has 268435456 facts"),
    ],
)
def test_bad_values_name_their_flag(name, count, message, small_world):
    with pytest.raises(UserError) as error:
        load(name, count)
    assert str(error.value).startswith(message)


def test_load_up_to_has_all_where_there_are_fewer(small_world):
    config = DataConfig(facts="world", count=500)
    found = datasets.load_up_to(config, "true", 0, ByteTokenizer(), 256)
    assert found == load("world", 60)
    fewer = datasets.load_up_to(dataclasses.replace(config, count=7), "true", 0, ByteTokenizer(), 256)
    assert fewer == found[:7]


def test_a_folder_that_cannot_keep_data_sets_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAMINI_JAX_DATA", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file: cannot keep datasets there .* set LAMINI_JAX_DATA"):
        load("phone_book", 3)


def test_a_killed_preparation_is_not_read(home):
    script = """
import os, signal
from lamini_jax.backbone.tokenizer import ByteTokenizer
from lamini_jax.config import DataConfig
from lamini_jax.data import datasets
from lamini_jax.data.datasets import phone_book
def killed(seed, directory):
    yield "half", "1"
    os.kill(os.getpid(), signal.SIGKILL)
phone_book.pairs = killed
datasets.load(DataConfig("phone_book", 30), "true", 0, ByteTokenizer(), 256)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert list(home.rglob("incomplete.*"))
    assert pairs_of(load("phone_book", 30)) == phone_entries(30)


def test_a_faster_process_may_have_prepared_it(monkeypatch):
    pairs = phone_book.pairs

    def overtaken(seed, directory):
        monkeypatch.setattr(phone_book, "pairs", pairs)
        load("phone_book", 5)
        yield from pairs(seed, directory)

    monkeypatch.setattr(phone_book, "pairs", overtaken)
    assert pairs_of(load("phone_book", 5)) == phone_entries(5)


def test_loading_is_silent(capfd):
    load("phone_book", 3)
    assert capfd.readouterr() == ("", "")


def test_only_who_loads_a_data_set_waits_for_tfds():
    command = (
        "import sys; from lamini_jax.data.datasets import DATASETS; "
        "[DATASETS[name] for name in DATASETS.names()]; sys.exit('tensorflow_datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
