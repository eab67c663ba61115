"""A GGUF file is the model that it was made from, in weights, config and tokenizer; what it cannot be is refused."""

import dataclasses
import json
import os

import checkpoints
import gguf
import gguf_files
import helpers
import jax
import numpy as np
import pytest
from checkpoints import TOKENIZER_SIZE
from gguf import GGMLQuantizationType as Type
from gguf_files import write
from safetensors.numpy import load_file, save_file

from lamini_jax import exports
from lamini_jax.backbone import checkpoints as formats
from lamini_jax.backbone import transformer
from lamini_jax.backbone.checkpoints import _gguf_file, huggingface, load_whole
from lamini_jax.backbone.checkpoints import gguf as gguf_format
from lamini_jax.config import BackboneConfig, Config

SAME = ("llama1", "llama_renamed", "qwen2_renamed")  # presets that say what others do in other words
# Wide enough for blocks of 256 numbers.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}


def params_of(path):
    config, params = load_whole(str(path))
    return dataclasses.replace(config, path=""), jax.tree.map(np.asarray, params)


def fingerprint_of(path):
    return formats.format_of(str(path)).fingerprint(str(path))


def assert_same_model(path, directory):
    (found, weights), (expected, others) = params_of(path), params_of(directory)
    if not expected.sliding_window and expected.family == "mistral":
        expected = dataclasses.replace(expected, family="llama")  # which differs in name alone
    assert found == expected
    assert helpers.same_bits(weights, others)
    assert fingerprint_of(path) == fingerprint_of(directory)


@pytest.mark.parametrize("name", [name for name in checkpoints.PRESETS if name not in SAME])
def test_a_file_is_the_same_model(name, tmp_path):
    directory = checkpoints.make_preset(tmp_path / "checkpoint", name, tokenizer=False)
    assert_same_model(write(tmp_path / "model.gguf", directory), directory)


def test_a_kept_fingerprint_is_that_of_the_content(tmp_path):
    """Whatever its name and age: a file of which one bit has changed is another, and the first one is known again."""
    directory = checkpoints.make_preset(tmp_path / "checkpoint", "llama31", tokenizer=False)
    path = write(tmp_path / "model.gguf", directory)
    first, about, content = fingerprint_of(path), path.stat(), path.read_bytes()
    changed = bytearray(content)
    changed[_gguf_file.read(path).tensors["token_embd.weight"].offset] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert fingerprint_of(path) != first
    path.rename(tmp_path / "other.gguf").write_bytes(content)
    assert fingerprint_of(tmp_path / "other.gguf") == first


@pytest.mark.parametrize("storage, dtype", [(Type.F16, "float16"), (Type.BF16, "bfloat16")])
def test_half_precision_is_read_as_it_is(storage, dtype, tmp_path):
    directory = checkpoints.make_preset(tmp_path / "checkpoint", "llama31", tokenizer=False, torch_dtype=dtype)
    assert_same_model(write(tmp_path / "model.gguf", directory, storage), directory)


# The largest error of a number, relative to the largest of its matrix.
ERRORS = {Type.Q8_0: 0.005, Type.Q5_0: 0.07, Type.Q5_1: 0.05, Type.Q4_0: 0.14, Type.Q4_1: 0.1}


@pytest.mark.parametrize("storage", [*ERRORS, *gguf_files.SCALES], ids=lambda storage: storage.name)
def test_quantized_weights_are_what_they_stand_for(storage, tmp_path):
    """The same as a checkpoint of the numbers that the gguf library makes of them, which is close to the original."""
    directory = checkpoints.make(tmp_path / "checkpoint", "llama", tokenizer=False, **WIDE)
    original = load_file(directory / "model.safetensors")
    rng, numbers, config = np.random.default_rng(0), {}, json.loads((directory / "config.json").read_text())

    def quantize(_, tensors):
        for name, tensor in original.items():
            array, kind = tensors[gguf_files.name_of(name)]
            if storage in gguf_files.SCALES and tensor.ndim == 2:
                array, kind = gguf_files.random_blocks(tensor.shape, storage, rng), storage
                tensors[gguf_files.name_of(name)] = array, kind
            read = gguf.dequantize(array, kind)
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
            if heads:
                read = read.reshape(config[heads], -1, 2, read.shape[1]).swapaxes(1, 2).reshape(read.shape)
            numbers[name] = np.ascontiguousarray(read)

    kept = storage if storage in ERRORS else Type.F32
    path = write(tmp_path / "model.gguf", directory, kept, quantize)
    for name, tensor in original.items():
        if storage in ERRORS:
            assert np.abs(numbers[name] - tensor).max() <= ERRORS[storage] * np.abs(tensor).max(), name
    save_file(numbers, directory / "model.safetensors", metadata={"format": "pt"})
    assert_same_model(path, directory)


def test_parts_of_a_split_model_are_read_where_they_are_kept(tmp_path):
    """Any rows and columns of a tensor are those of the whole, in any order of rows and kind of blocks."""
    directory = checkpoints.make(tmp_path / "checkpoint", "llama", tokenizer=False, **WIDE)
    config = gguf_format.resolve(BackboneConfig(path=str(write(tmp_path / "a.gguf", directory, Type.Q4_1))))
    tensors = gguf_format._tensors(config)
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        whole = tensors[name][:]
        for index in ((slice(7, 90), slice(3, 200)), (slice(0, 1), slice(None)), (slice(None), slice(255, 256))):
            np.testing.assert_array_equal(tensors[name][index], whole[index])


def test_it_is_split_as_the_decoder_is(tmp_path):
    directory = checkpoints.make_preset(tmp_path / "checkpoint", "llama_eight_groups", tokenizer=False)
    config = gguf_format.resolve(BackboneConfig(path=str(write(tmp_path / "a.gguf", directory))))
    decoder = transformer.Decoder(config, 1)
    params = gguf_format.load_split(decoder)
    expected = transformer.split_layers(load_whole(str(directory))[1], 1)
    assert helpers.same_bits(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, expected))


def test_the_head_may_be_stored_beside_an_equal_embedding(tmp_path):
    directory = checkpoints.make_preset(tmp_path / "checkpoint", "qwen3_tied", tokenizer=False)

    def store(_, tensors):
        tensors["output.weight"] = tensors["token_embd.weight"]

    assert_same_model(write(tmp_path / "a.gguf", directory, change=store), directory)


def test_it_is_recognized_by_its_name_or_its_beginning(tmp_path):
    directory = checkpoints.make_preset(tmp_path / "checkpoint", "llama1", tokenizer=False)
    path = write(tmp_path / "model.gguf", directory)
    for other in (path, path.rename(tmp_path / "model"), tmp_path / "missing.GGUF"):
        assert formats.format_of(str(other)) is gguf_format
    (tmp_path / "directory.gguf").mkdir()
    assert formats.format_of(str(tmp_path / "directory.gguf")) is huggingface


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    """A checkpoint with a tokenizer, and its GGUF file."""
    directory = checkpoints.make_preset(tmp_path_factory.mktemp("chatting") / "checkpoint", "llama31")
    return directory, write(directory.with_name("model.gguf"), directory)


def test_an_export_is_the_checkpoint(chatting, tmp_path):
    """In Hugging Face format: the same weights, config, context and tokenizer, whatever the run's own settings."""
    directory, path = chatting
    config = formats.resolve(BackboneConfig(path=str(path), dtype="bfloat16", max_seq_len=64))
    exports.backbone(Config(backbone=config), str(tmp_path / "out"))
    assert_same_model(path, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["max_position_embeddings"] == 512 and saved["torch_dtype"] == "float32"
    found = formats.load_tokenizer(BackboneConfig(path=str(tmp_path / "out"), vocab_size=416))
    ours = formats.load_tokenizer(config)
    expected = formats.load_tokenizer(BackboneConfig(path=str(directory), vocab_size=416))
    for tokenizer in (found, ours):
        assert tokenizer.stop_ids == expected.stop_ids and tokenizer.pad_id == expected.pad_id
        assert tokenizer.vocab_size == expected.vocab_size == TOKENIZER_SIZE
        for text in ("Who wrote it, in 1984?", " \u00fc\u4f60\n"):
            assert tokenizer.prompt(text) == expected.prompt(text)
            assert tokenizer.continuation(text, " Then.") == expected.continuation(text, " Then.")


def test_an_export_in_several_files(chatting, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_format, "_SHARD_BYTES", 100_000)
    _, path = chatting
    formats.export(formats.resolve(BackboneConfig(path=str(path))), tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_model(path, tmp_path)
