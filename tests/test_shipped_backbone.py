"""The backbone inside the package: small, good at what it was never shown, and read from a file that is checked."""

import dataclasses
import json

import helpers
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from lamini_jax.backbone import answering, checkpoints, frozen_model, transformer
from lamini_jax.backbone.checkpoints import shipped
from lamini_jax.config import BackboneConfig, Config
from lamini_jax.data import world
from lamini_jax.errors import UserError
from lamini_jax.evaluation import recall


def test_it_is_small():
    config, params = shipped.load()
    assert shipped.PATH.stat().st_size <= 8e6
    assert 0.5e6 <= sum(leaf.size for leaf in jax.tree.leaves(params)) <= 2e6
    assert config.max_seq_len >= 256


def test_it_is_the_default_config():
    assert shipped.load()[0] == Config().backbone


def test_its_fingerprint_is_what_runs_are_bound_to():
    """Another one, for the same weights, refuses every run and every export that there is."""
    assert shipped.fingerprint("") == "d02f1fab2b89e7f5"


def test_it_answers_what_training_held_out():
    """91.3% of them, as `experiments/pretrain_backbone.py` says; these are others, ten of each kind."""
    model = frozen_model.load(Config())
    questions = [qa for kind in world.KINDS for qa in world.held_out(kind, 10, seed=7)]
    right = recall.accuracy(model, answering.BARE, questions)
    wrong = sorted({qa.kind for qa, ok in zip(questions, right, strict=True) if not ok})
    assert sum(right) >= 0.9 * len(questions), f"{sum(right)} of {len(questions)} right; wrong in {', '.join(wrong)}"


@pytest.mark.parametrize(
    "name, value", [("num_layers", 6), ("max_seq_len", 128), ("family", "qwen2"), ("qk_norm", True)]
)
def test_another_model_than_the_shipped_one_is_refused(name, value):
    asked = dataclasses.replace(BackboneConfig(dtype="bfloat16"), **{name: value})
    for read in (checkpoints.resolve, lambda asked: shipped.load_split(transformer.Decoder(asked, 2))):
        with pytest.raises(UserError, match=f"^--config.backbone.{name}={value}: the backbone that ships has "):
            read(asked)
    assert checkpoints.resolve(BackboneConfig(dtype="bfloat16")) == BackboneConfig(dtype="bfloat16")


def test_whole_and_split_are_the_same_weights():
    config, whole = checkpoints.load_whole("", dtype="bfloat16")
    assert config == BackboneConfig(dtype="bfloat16")
    assert helpers.same_bits(transformer.join_layers(shipped.load_split(transformer.Decoder(config, 2))), whole)
    assert helpers.same_bits(jax.tree.map(np.asarray, whole), shipped.load()[1])


UNTIED = dataclasses.replace(helpers.BACKBONE, tied_embeddings=False)


@pytest.mark.parametrize("config", [helpers.BACKBONE, UNTIED], ids=["tied", "untied"])
def test_save_and_load_are_inverse(config, tmp_path):
    params, path = helpers.random_params(config), tmp_path / "backbone.safetensors"
    shipped.save(path, config, params)
    loaded_config, loaded = shipped.read(path)
    assert loaded_config == config
    assert helpers.same_bits(loaded, params)


def other_file(path, **metadata):
    save_file({"embedding": np.zeros((2, 2), np.float32)}, path, metadata=metadata or None)


BAD_FILES = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_text(""),
    "text": lambda path: path.write_text("hello " * 100),
    "no metadata": other_file,
    "other metadata": lambda path: other_file(path, format="pt"),
    "not JSON": lambda path: other_file(path, backbone="{"),
    "another field": lambda path: other_file(path, backbone=json.dumps({"experts": 8})),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_named(kind, tmp_path):
    path = tmp_path / "backbone.safetensors"
    BAD_FILES[kind](path)
    with pytest.raises(UserError) as error:
        shipped.read(path)
    assert str(error.value).startswith(f"{path}: ")
