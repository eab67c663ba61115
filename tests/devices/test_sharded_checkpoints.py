"""A checkpoint read straight into shards is, bit for bit, the one read by a single device."""

import checkpoints as files
import gguf_files
import helpers
import jax
import pytest
from gguf import GGMLQuantizationType

from lamini_jax.backbone import checkpoints, transformer
from lamini_jax.config import MeshConfig
from lamini_jax.runtime import sharding


def read(path, mesh, devices=None):
    """The parameters whole, and split as for two layers of memory."""
    with sharding.set_mesh(mesh, devices):
        config, whole = checkpoints.load_whole(path)
        return whole, checkpoints.format_of(path).load_split(transformer.Decoder(config, 2))


@pytest.mark.parametrize("name", [None, "llama_eight_groups", "qwen2", "qwen3_tied"])
def test_shards_of_a_checkpoint_make_the_whole(name, tmp_path):
    layers = {"num_hidden_layers": 3}
    path = "" if name is None else str(files.make_preset(tmp_path / name, name, tokenizer=False, **layers))
    expected = read(path, MeshConfig(1, 1), jax.devices()[:1])
    for mesh in (MeshConfig(2, 4), MeshConfig(1, 8)):
        found = read(path, mesh)
        assert helpers.same_bits(found, expected)
        assert "model" in found[0]["layers"]["down_proj"]["weight"].sharding.spec


def test_shards_of_a_gguf_file_make_the_whole(tmp_path):
    """Quantized, with rows in llama.cpp's order."""
    directory = files.make_preset(tmp_path / "made", "llama_eight_groups", tokenizer=False)
    path = str(gguf_files.write(tmp_path / "model.gguf", directory, GGMLQuantizationType.Q4_0))
    expected = read(path, MeshConfig(1, 1), jax.devices()[:1])
    for mesh in (MeshConfig(2, 4), MeshConfig(1, 8)):
        found = read(path, mesh)
        assert helpers.same_bits(found, expected)
        assert "model" in found[0]["layers"]["q_proj"]["weight"].sharding.spec
