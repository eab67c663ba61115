"""What calibration has read is kept for later runs, unless anything that it depends on is another; nothing else is."""

import dataclasses
import os
import subprocess
import sys

import helpers
import numpy as np
import pytest

from lamini_jax.backbone.tokenizer import ByteTokenizer
from lamini_jax.memory.routers import experts as expert_router
from lamini_jax.runtime import user_cache

CONFIG = helpers.replace(helpers.CONFIG, router={"calibration_questions": 5})
QUESTIONS = ["Who?", "Where?"]


class WithSystemMessage(ByteTokenizer):
    """The same tokens after others."""

    def prompt(self, question):
        return [ord("!"), *super().prompt(question)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(user_cache, "_directory", str(tmp_path))
    return tmp_path


@pytest.fixture
def read(model, cache, monkeypatch):
    """Calibrates and returns the features and which questions the model was given for it."""
    asked = []

    def question_features(model, questions, layer):
        asked.extend(questions)
        return np.array([[len(question), layer] for question in questions], np.float32)

    monkeypatch.setattr(expert_router, "question_features", question_features)

    def calibrate(config=CONFIG, **changes):
        asked.clear()
        known = model.replace(**{"fingerprint": "1234", **changes})
        return expert_router.calibration_features(config, known, QUESTIONS), list(asked)

    return calibrate


def files(directory):
    return [path for path in directory.rglob("*") if path.is_file()]


def test_a_second_run_reads_its_own_questions_alone(read, cache):
    features_QD, asked = read()
    assert len(asked) == len(features_QD) == 7 and len(files(cache)) == 1
    again_QD, asked = read()
    assert asked == QUESTIONS and helpers.same_bits(again_QD, features_QD)
    assert len(files(cache)) == 1


OTHERS = {
    "layer": ({"router": {"layer": 1}}, {}),
    "questions": ({"router": {"calibration_questions": 6}}, {}),
    "precision": ({"backbone": {"dtype": "bfloat16"}}, {}),
    "weights": ({}, {"fingerprint": "5678"}),
    "system message": ({}, {"tokenizer": WithSystemMessage()}),
    "kind of questions": ({"backbone": {"path": "checkpoint"}}, {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_depends_on_anything_else_is_read_anew(name, read, cache):
    groups, changes = OTHERS[name]
    read()
    config = helpers.replace(CONFIG, **groups)
    _, asked = read(config, **changes)
    assert len(asked) == len(QUESTIONS) + config.router.calibration_questions
    _, asked = read(config, **changes)
    assert asked == QUESTIONS and len(files(cache)) == 2


def test_another_seed_asks_other_questions(read):
    _, asked = read()
    _, others = read(dataclasses.replace(CONFIG, seed=1))
    assert len(others) == len(asked) and others != asked


def test_weights_without_fingerprint_are_read_each_time(read, cache):
    for _ in range(2):
        assert len(read(fingerprint="")[1]) == 7
    assert files(cache) == []


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array at all", b"PK\x03\x04"])
def test_a_damaged_file_is_made_anew(content, read, cache):
    features_QD, _ = read()
    (path,) = files(cache)
    whole = path.read_bytes()
    for damaged in (content, whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(damaged)
        again_QD, asked = read()
        assert len(asked) == 7 and helpers.same_bits(again_QD, features_QD)
        assert path.read_bytes() == whole and files(cache) == [path]


def test_a_full_disk_leaves_nothing_half_written(read, cache, monkeypatch):
    def fail(file, _):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    assert len(read()[0]) == 7
    assert files(cache) == []


def test_without_a_directory_nothing_is_kept(read, cache, monkeypatch):
    monkeypatch.chdir(cache)
    monkeypatch.setattr(user_cache, "_directory", "")
    for _ in range(2):
        assert len(read()[1]) == 7
    assert files(cache) == []


COMMAND = '''"""Keeps an array, and compiles a little."""

import numpy as np

from lamini_jax.config import MeshConfig
from lamini_jax.runtime import cli, user_cache

cli.define_processes()


def main():
    import jax

    cli.start(MeshConfig())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    user_cache.array("calibration/some", lambda: np.arange(3))
    print(jax.jit(lambda x: x + 1)(np.int32(1)))


cli.run(main)
'''


def test_the_flag_says_where_it_is(tmp_path):
    """The place of caches, another one, nowhere, or one that cannot be written: none of them is an error."""
    (tmp_path / "file").write_text("")
    (tmp_path / "small.py").write_text(COMMAND)
    kept = {}
    for name, flags in {
        "default": [],
        "other": [f"--cache_dir={tmp_path / 'own'}"],
        "nowhere": ["--cache_dir="],
        "unwritable": [f"--cache_dir={tmp_path / 'file' / 'below'}"],
    }.items():
        environment = {**os.environ, "PYTHONPATH": str(helpers.ROOT), "XDG_CACHE_HOME": str(tmp_path / "default")}
        command = [sys.executable, "small.py", *flags]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert (result.returncode, result.stdout, result.stderr) == (0, "2\n", ""), name
        kept[name] = {path.relative_to(tmp_path).parts[0] for path in files(tmp_path)} - {"file", "small.py"}
    assert kept == {"default": {"default"}, "other": {"default", "own"}} | dict.fromkeys(
        ("nowhere", "unwritable"), {"default", "own"}
    )
    for directory in (tmp_path / "default" / "lamini_jax", tmp_path / "own"):
        assert (directory / "calibration" / "some.npy").is_file() and files(directory / "compiled")
