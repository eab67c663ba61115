"""What imports are compared with is right itself, and the checkpoints show whatever an import could get wrong."""

import json

import checkpoints
import numpy as np
import pytest
import reference
from reference import relative_error
from safetensors.numpy import load_file
from tokenizers import Tokenizer

TOKENS_BT = np.random.default_rng(0).integers(checkpoints.TOKENIZER_SIZE, size=(2, 24))
# Beside the presets, what an import may refuse.
CHECKPOINTS = {**checkpoints.PRESETS, "qwen2_window": ("qwen2", {"use_sliding_window": True})}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_reference_equals_transformers(name, tmp_path):
    model_type, overrides = CHECKPOINTS[name]
    directory = checkpoints.make(tmp_path / "checkpoint", model_type, tokenizer=False, **overrides)
    expected_BTV = reference.transformers_logits(directory, TOKENS_BT)
    assert relative_error(reference.logits(directory, TOKENS_BT), expected_BTV) <= 1e-5


# preset -> what config.json must say for the reference to ignore what the preset is about
IGNORED = {
    "llama1": {"rope_theta": 500.0},
    "llama31": {"rope_scaling": None},
    "llama_linear": {"rope_scaling": None},
    "mistral": {"rms_norm_eps": 1e-5},
    "llama_renamed": {"rope_parameters": {"rope_theta": 500.0}},
    "mistral_window": {"sliding_window": None},
    "qwen2": {"use_sliding_window": True},
    "qwen3": {"model_type": "llama"},
}


@pytest.mark.parametrize("name", IGNORED)
def test_a_preset_shows_when_its_peculiarity_is_ignored(name, tmp_path):
    directory = checkpoints.make_preset(tmp_path / "checkpoint", name, tokenizer=False)
    heeded_BTV = reference.logits(directory, TOKENS_BT)
    checkpoints.edit(directory / "config.json", **IGNORED[name])
    assert relative_error(reference.logits(directory, TOKENS_BT), heeded_BTV) > 0.01


def test_every_bias_of_a_preset_shows(tmp_path):
    directory = checkpoints.make_preset(tmp_path / "checkpoint", "qwen2", tokenizer=False)
    weights, before_BTV = load_file(directory / "model.safetensors"), reference.logits(directory, TOKENS_BT)
    for name in "qkv":
        tensor = f"model.layers.1.self_attn.{name}_proj.bias"
        changed = weights[tensor].copy()
        changed[3] += 2
        checkpoints.save_weights(directory, {**weights, tensor: changed})
        # A key's bias moves all scores of a query alike, but for the rotation between bias and projection.
        assert relative_error(reference.logits(directory, TOKENS_BT), before_BTV) > 1e-3


def test_scaling_keeps_mixes_and_slows_some_frequencies(tmp_path):
    directory = checkpoints.make_preset(tmp_path / "checkpoint", "llama31", tokenizer=False)
    config = json.loads((directory / "config.json").read_text())
    scaled, plain = (
        np.array(reference.rotary_frequencies(fields, 16)) for fields in (config, {**config, "rope_scaling": None})
    )
    ratios = scaled / plain
    assert {1.0, 1 / 8} < set(ratios.tolist())
    assert ((ratios > 1 / 8) & (ratios < 1)).any()


def test_the_tokenizer_reads_any_text(tmp_path):
    directory = checkpoints.make_preset(tmp_path / "checkpoint", "llama31")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "What is 12 plus 34?\n\u00dcber \u20ac\U0001f600"
    ids = tokenizer.encode(text).ids
    assert ids[0] == checkpoints.BEGIN
    assert len(ids) < len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|eot_id|>", add_special_tokens=False).ids == [checkpoints.END_OF_TURN]
    assert tokenizer.get_vocab_size() <= json.loads((directory / "config.json").read_text())["vocab_size"]
