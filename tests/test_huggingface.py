"""An imported Hugging Face checkpoint computes what its files say; whatever would compute something else is refused."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoints
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checkpoints import ABSENT
from reference import relative_error
from safetensors.numpy import load_file

from lamini_jax.backbone import tokenizer, transformer
from lamini_jax.backbone.checkpoints import huggingface, load_whole
from lamini_jax.backbone.checkpoints.families import FAMILIES
from lamini_jax.config import BackboneConfig
from lamini_jax.errors import BAD_INPUT, UserError

# What says the same in other words, or stores it otherwise: preset -> (another, what that must say for both to agree)
SAME_MODELS = {
    "llama1": ("llama_no_groups", {"rope_theta": 10_000.0}),
    "llama_renamed": ("llama31", {}),
    "qwen2_renamed": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}

TOKENS_BT = np.random.default_rng(0).integers(checkpoints.TOKENIZER_SIZE, size=(2, 24)).astype(np.int32)
logits = jax.jit(transformer.logits, static_argnums=0)


def imported_logits(directory, **arguments):
    config, params = load_whole(str(directory), **arguments)
    return np.asarray(logits(dataclasses.replace(config, path=""), params, TOKENS_BT))


@pytest.fixture(scope="module", params=[name for name in checkpoints.PRESETS if name not in SAME_MODELS])
def preset(request, tmp_path_factory):
    """A checkpoint of each preset that is a model of its own."""
    directory = tmp_path_factory.mktemp(request.param) / "checkpoint"
    return checkpoints.make_preset(directory, request.param, tokenizer=False)


@pytest.fixture(scope="module")
def found_BTV(preset):
    """What the package computes."""
    return imported_logits(preset)


def test_logits_equal_the_reference(preset, found_BTV):
    assert found_BTV.dtype == np.float32
    assert relative_error(found_BTV, reference.logits(preset, TOKENS_BT)) <= 1e-4


def test_logits_equal_those_of_transformers(preset, found_BTV):
    assert relative_error(found_BTV, reference.transformers_logits(preset, TOKENS_BT)) <= 1e-4


@pytest.mark.parametrize("name", SAME_MODELS)
def test_configs_of_the_same_model_are_equal(name, tmp_path):
    """The other's logits are compared above; the weights of both are read as its are."""
    other, changes = SAME_MODELS[name]
    found = []
    for directory in (
        checkpoints.make_preset(tmp_path / "checkpoint", name, tokenizer=False),
        checkpoints.make_preset(tmp_path / "other", other, tokenizer=False, **changes),
    ):
        found.append(dataclasses.replace(huggingface.resolve(BackboneConfig(path=str(directory))), path=""))
    assert found[0] == found[1]


def test_a_window_of_some_layers_is_right_or_refused(tmp_path):
    directory = checkpoints.make_preset(tmp_path / "checkpoint", "qwen2", use_sliding_window=True, tokenizer=False)
    try:
        found_BTV = imported_logits(directory)
    except UserError as error:
        assert "sliding_window" in str(error)
    else:
        assert relative_error(found_BTV, reference.logits(directory, TOKENS_BT)) <= 1e-4


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def say_tied(directory, change):
    """A checkpoint whose flag says that its head is its embedding, with a change of its weights."""
    checkpoints.make_preset(directory, "qwen2_tied", tokenizer=False, torch_dtype="float32")
    weights = load_file(directory / "model.safetensors")
    change(weights)
    checkpoints.save_weights(directory, weights)
    return directory


HEADS = {
    "no head": lambda weights: None,
    "the same head": lambda weights: weights.update({HEAD: weights[EMBEDDING]}),
    "the head in place of the embedding": lambda weights: weights.update({HEAD: weights.pop(EMBEDDING)}),
    "another head": lambda weights: weights.update({HEAD: weights[EMBEDDING][::-1].copy()}),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_tied_head_is_what_transformers_makes_of_it(name, tmp_path, caplog):
    """What is stored goes before what config.json says, and where the two are at odds that is said, once."""
    directory = say_tied(tmp_path / "checkpoint", HEADS[name])
    found_BTV = imported_logits(directory)
    assert relative_error(found_BTV, reference.logits(directory, TOKENS_BT)) <= 1e-4
    own = name == "another head"
    assert huggingface.resolve(BackboneConfig(path=str(directory))).tied_embeddings != own
    warnings = [record.getMessage() for record in caplog.records if "lm_head.weight" in record.getMessage()]
    assert len(warnings) == own and all(str(directory / "config.json") in text for text in warnings)
    if not own:
        tied = say_tied(tmp_path / "tied", HEADS["no head"])
        assert huggingface.fingerprint(str(directory)) == huggingface.fingerprint(str(tied))


def test_a_head_of_the_same_values_is_the_embedding(tmp_path):
    """Whatever the flag says: the model is the same one."""
    tied, both = (
        say_tied(tmp_path / str(number), HEADS[name]) for number, name in enumerate(["no head", "the same head"])
    )
    checkpoints.edit(both / "config.json", tie_word_embeddings=False)
    found = [load_whole(str(directory)) for directory in (tied, both)]
    assert dataclasses.replace(found[0][0], path="") == dataclasses.replace(found[1][0], path="")
    assert helpers.same_bits(found[0][1], found[1][1])


@pytest.mark.parametrize("name", HEADS)
def test_transformers_reads_a_tied_head_alike(name, tmp_path):
    directory = say_tied(tmp_path / "checkpoint", HEADS[name])
    expected_BTV = reference.transformers_logits(directory, TOKENS_BT)
    assert relative_error(reference.logits(directory, TOKENS_BT), expected_BTV) <= 1e-4


def test_buffers_that_old_checkpoints_carry_are_skipped(tmp_path):
    directory = checkpoints.make_preset(tmp_path / "checkpoint", "llama1", tokenizer=False)
    before = load_whole(str(directory))
    weights = load_file(directory / "model.safetensors")
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    checkpoints.save_weights(directory, weights)
    assert helpers.same_bits(load_whole(str(directory))[1], before[1])


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3"])
def test_shards_change_nothing(name, tmp_path):
    one, four = (
        load_whole(str(checkpoints.make_preset(tmp_path / str(shards), name, shards=shards, tokenizer=False)))
        for shards in (1, 4)
    )
    assert dataclasses.replace(one[0], path="") == dataclasses.replace(four[0], path="")
    assert helpers.same_bits(one[1], four[1])


def test_what_the_caller_chooses(tmp_path):
    directory = checkpoints.make_preset(tmp_path / "checkpoint", "llama31", tokenizer=False)
    config, params = load_whole(str(directory), dtype="bfloat16", max_seq_len=64)
    assert (config.dtype, config.max_seq_len) == ("bfloat16", 64)
    assert params["embedding"].dtype == params["layers"]["q_proj"]["weight"].dtype == jnp.bfloat16
    expected_BTV = reference.logits(directory, TOKENS_BT)
    assert 0 < relative_error(logits(config, params, TOKENS_BT), expected_BTV) < 0.05


def test_tokens_beyond_the_vocabulary(tmp_path):
    directory = checkpoints.make_preset(tmp_path / "checkpoint", "llama31")
    tokenizer.load(directory, checkpoints.TOKENIZER_SIZE)
    with pytest.raises(UserError) as error:
        tokenizer.load(directory, checkpoints.TOKENIZER_SIZE - 1)
    assert_one_line(error, tmp_path, "tokenizer", str(checkpoints.TOKENIZER_SIZE - 1))


def assert_one_line(error, tmp_path, *words):
    """What a user reads; the path of the test's own directory, which holds any numbers, says nothing."""
    message = str(error.value).replace(str(tmp_path), "")
    assert error.value.status == BAD_INPUT
    assert "\n" not in message
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


# Fields of config.json that make another model of it: name -> (model type, changes, words of the message)
BAD_FIELDS = {
    "unknown model type": ("llama", {"model_type": "mamba"}, ["model_type", "mamba"]),
    "no model type": ("llama", {"model_type": ABSENT}, ["model_type"]),
    "unknown scaling": ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["yarn"]),
    "old name of unknown scaling": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["dynamic"]),
    "scaling without a factor": ("llama", {"rope_scaling": {"rope_type": "linear"}}, ["factor"]),
    "scaling that is no object": ("llama", {"rope_scaling": "linear"}, ["rope_scaling"]),
    "other activation": ("llama", {"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
    "quantized": ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantization_config"]),
    "unknown field": ("llama", {"attention_logit_softcapping": 30.0}, ["attention_logit_softcapping"]),
    "partly rotated": ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    "biases of attention": ("llama", {"attention_bias": True}, ["attention_bias"]),
    "biases of the MLP": ("llama", {"mlp_bias": True}, ["mlp_bias"]),
    "biases of Qwen3's attention": ("qwen3", {"attention_bias": True}, ["attention_bias"]),
    "field missing": ("llama", {"hidden_size": ABSENT}, ["hidden_size"]),
    "text for a number": ("llama", {"num_hidden_layers": "two"}, ["num_hidden_layers"]),
    "more layers than tensors": ("llama", {"num_hidden_layers": 3}, ["model.layers.2."]),
    "heads that do not divide": ("llama", {"num_key_value_heads": 3}, ["num_key_value_heads"]),
    "untied without an own unembedding": ("qwen2", {"tie_word_embeddings": True}, ["lm_head.weight"]),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_fields_of_another_model_are_refused(name, tmp_path):
    model_type, changes, words = BAD_FIELDS[name]
    directory = checkpoints.make(tmp_path / "checkpoint", model_type, tokenizer=False)
    if name.startswith("untied"):  # made without that tensor, then said to need it
        directory = checkpoints.make(tmp_path / "tied", model_type, tokenizer=False, **changes)
        changes = {"tie_word_embeddings": False}
    checkpoints.edit(directory / "config.json", **changes)
    with pytest.raises(UserError) as error:
        load_whole(str(directory))
    assert_one_line(error, tmp_path, *words)


def change_tensor(directory, name, change):
    """Replaces a tensor by what `change` makes of it; None takes it out."""
    file = directory / "model.safetensors"
    weights = load_file(file)
    tensor = change(weights.pop(name))
    checkpoints.save_weights(directory, weights if tensor is None else {**weights, name: tensor})


def truncate(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def only_pickle(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02.")


DOWN = "model.layers.1.mlp.down_proj.weight"
SECOND = "model-00002-of-00004.safetensors"
INDEX = "model.safetensors.index.json"

# name -> (shards, what happened to the directory, words of the message)
BAD_FILES = {
    "no directory": (1, lambda d: d.rename(d.with_name("elsewhere")), ["checkpoint"]),
    "no config": (1, lambda d: (d / "config.json").unlink(), ["config.json"]),
    "config not JSON": (1, lambda d: (d / "config.json").write_text("{"), ["config.json"]),
    "config not an object": (1, lambda d: (d / "config.json").write_text("[]"), ["config.json"]),
    "no weights": (1, lambda d: (d / "model.safetensors").unlink(), ["model.safetensors"]),
    "only pickle": (1, only_pickle, ["pytorch_model.bin", "pickle"]),
    "truncated": (1, lambda d: truncate(d / "model.safetensors"), ["model.safetensors"]),
    "empty": (1, lambda d: (d / "model.safetensors").write_bytes(b""), ["model.safetensors"]),
    "tensor missing": (1, lambda d: change_tensor(d, DOWN, lambda x: None), [DOWN]),
    "norm missing": (1, lambda d: change_tensor(d, "model.norm.weight", lambda x: None), ["model.norm.weight"]),
    "other shape": (1, lambda d: change_tensor(d, DOWN, lambda x: x[:, :-3].copy()), [DOWN, "64", "96", "93"]),
    "other rank": (1, lambda d: change_tensor(d, DOWN, lambda x: x.ravel()), [DOWN, "64", "96", "6144"]),
    "transposed": (1, lambda d: change_tensor(d, DOWN, lambda x: x.T.copy()), [DOWN, "64", "96"]),
    "integers": (1, lambda d: change_tensor(d, DOWN, lambda x: x.astype(np.int8)), [DOWN]),
    "shard missing": (4, lambda d: (d / SECOND).unlink(), [SECOND]),
    "shard truncated": (4, lambda d: truncate(d / SECOND), [SECOND]),
    "index not JSON": (4, lambda d: (d / INDEX).write_text("{"), [INDEX]),
    "index without a map": (4, lambda d: (d / INDEX).write_text("{}"), [INDEX, "weight_map"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(name, tmp_path):
    shards, damage, words = BAD_FILES[name]
    directory = checkpoints.make(tmp_path / "checkpoint", "llama", shards=shards, tokenizer=False)
    damage(directory)
    with pytest.raises(UserError) as error:
        load_whole(str(directory))
    assert_one_line(error, tmp_path, *words)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_import_holds_little_beside_the_parameters(tmp_path):
    """Two tensors at most: as the file has it and transposed; never a file, nor a stack of layers twice."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "head_dim": 32}
    directory = checkpoints.make(
        tmp_path / "checkpoint", "llama", shards=4, tokenizer=False, tie_word_embeddings=True, **sizes
    )
    # What malloc keeps of freed memory is not the import's: let it keep nothing.
    environment = {**os.environ, "PYTHONPATH": str(helpers.ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(Path(__file__).with_name("import_memory.py")), str(directory)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True).stdout
    found = json.loads(output)
    largest = 1024 * 4096 * 4
    assert found["params"] > 9 * largest
    # The slack, a quarter of a tensor, is for small objects: headers, norms, what the interpreter allocates.
    assert found["peak"] - found["before"] - found["params"] <= 2.25 * largest, found


@pytest.mark.parametrize("family", FAMILIES.names())
def test_an_exported_config_of_every_family_reads_back(family, tmp_path):
    """Also where the family's config.json means something else when it is silent."""
    values = {"sliding_window": 8, **FAMILIES[family].DEFAULTS}
    for window in (values["sliding_window"], None):
        block = FAMILIES[family].block_fields({**values, "sliding_window": window})
        config = dataclasses.replace(helpers.BACKBONE, family=family, rope_scaling="linear", rope_factor=2.0, **block)
        directory = tmp_path / str(window)
        huggingface.save_backbone(directory, config, {})
        assert huggingface.resolve(BackboneConfig(path=str(directory), max_seq_len=128)) == dataclasses.replace(
            config, path=str(directory)
        )


def test_a_block_that_a_family_has_not_is_not_exported(tmp_path):
    config = dataclasses.replace(helpers.BACKBONE, family="llama", qk_norm=True)
    with pytest.raises(UserError) as error:
        huggingface.save_backbone(tmp_path / "exported", config, {})
    assert_one_line(error, tmp_path, "--config.backbone.qk_norm=True", "llama")
    assert not (tmp_path / "exported" / "config.json").exists()


def test_another_family_than_the_checkpoints_is_refused(tmp_path):
    directory = checkpoints.make_preset(tmp_path / "checkpoint", "llama31", tokenizer=False)
    with pytest.raises(UserError) as error:
        huggingface.resolve(BackboneConfig(path=str(directory), family="qwen3"))
    assert_one_line(error, tmp_path, "--config.backbone.family=qwen3", "llama")


def test_split_as_whole(tmp_path):
    """Whichever layers carry the memory."""
    directory = checkpoints.make_preset(tmp_path / "checkpoint", "llama_eight_groups", tokenizer=False)
    config, whole = load_whole(str(directory))
    for layers in (1, 2):
        parts = huggingface.load_split(transformer.Decoder(config, layers))
        assert helpers.same_bits(parts, transformer.split_layers(whole, layers))
