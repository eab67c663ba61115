"""A fingerprint names weights: every number of them, and nothing of how and where they are stored."""

import shutil

import checkpoints
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lamini_jax.backbone.checkpoints import _fingerprint, huggingface


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return checkpoints.make(tmp_path_factory.mktemp("here") / "checkpoint", "llama", tokenizer=False)


@pytest.fixture(scope="module")
def weights(directory):
    return load_file(directory / "model.safetensors")


def spread(directory, weights, shards=1):
    """The fingerprint of weights in files of this directory, which are made for it."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    checkpoints.save_weights(directory, weights, shards)
    return huggingface.fingerprint(directory)


def test_a_fingerprint_is_of_the_weights_and_not_of_their_files(directory, weights, tmp_path):
    expected = huggingface.fingerprint(directory)
    assert expected == spread(tmp_path / "shards", weights, shards=4)
    (tmp_path / "shards" / "model.safetensors.index.json").unlink()
    assert huggingface.fingerprint(tmp_path / "shards") == expected
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    assert spread(tmp_path / "again", weights | rotary) == expected


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_a_fingerprint_is_of_the_values_and_not_of_their_format(storage, weights, tmp_path):
    """Whatever holds a format's numbers exactly; what rounds them makes other weights."""
    rounded = {name: tensor.astype(checkpoints.STORAGE[storage]) for name, tensor in weights.items()}
    expected = spread(tmp_path / "there", rounded)
    for wider in (np.float32, np.float64):
        assert spread(tmp_path / "there", {name: tensor.astype(wider) for name, tensor in rounded.items()}) == expected
    mixed = {name: rounded[name].astype([np.float32, np.float64][i % 2]) for i, name in enumerate(rounded)}
    assert spread(tmp_path / "there", mixed) == expected
    assert (expected == spread(tmp_path / "there", weights)) == (storage == "float32")


def test_every_number_is_in_the_fingerprint(weights, tmp_path):
    """Also one alone, wherever it is, by the least that it can change."""
    rng, found = np.random.default_rng(0), {spread(tmp_path / "there", weights)}
    for name in weights:
        changed = weights[name].copy()
        place = tuple(rng.integers(changed.shape))
        changed[place] = np.nextafter(changed[place], np.float32(9))
        found.add(spread(tmp_path / "there", {**weights, name: changed}))
    assert len(found) == 1 + len(weights)
    norm = weights["model.norm.weight"]
    found.add(spread(tmp_path / "there", {**weights, "model.norm.weight": norm[:-1].copy()}))
    found.add(spread(tmp_path / "there", {**weights, "model.norm.weight": norm[None].copy()}))
    swapped = {"model.norm.weight": weights["model.layers.0.input_layernorm.weight"]}
    found.add(spread(tmp_path / "there", {**weights, **swapped, "model.layers.0.input_layernorm.weight": norm}))
    assert len(found) == 4 + len(weights)


def test_large_tensors_are_hashed_in_pieces(tmp_path, monkeypatch):
    """As many as there are, each in the narrowest format that has it."""
    rng = np.random.default_rng(0)
    weights = {"a": rng.normal(size=(37, 5)).astype(np.float32), "b": rng.normal(size=64).astype(np.float32)}
    weights["a"][:30] = weights["a"][:30].astype(ml_dtypes.bfloat16)
    monkeypatch.setattr(_fingerprint, "_AT_ONCE", 32)
    found = {spread(tmp_path / "there", weights)}
    assert spread(tmp_path / "there", {name: tensor.astype(np.float64) for name, tensor in weights.items()}) in found
    for name, place in (("a", (0, 0)), ("a", (29, 4)), ("a", (36, 4)), ("b", (63,))):
        changed = weights[name].copy()
        changed[place] += 1
        found.add(spread(tmp_path / "there", {**weights, name: changed}))
    assert len(found) == 5


def test_processes_share_the_hashing(directory, weights, monkeypatch):
    """Each reads its part, and all make the same name of the parts."""
    parts, read = [], []

    def gather(digests):
        parts.append(digests)
        return np.stack(parts)

    class Tensor:
        def __init__(self, tensor):
            self.tensor, self.shape = tensor, tensor.shape

        def __getitem__(self, index):
            read.append(id(self))
            return self.tensor[index]

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(_fingerprint.multihost_utils, "process_allgather", gather)
    tensors = {name: Tensor(tensor) for name, tensor in weights.items()}
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        found = _fingerprint.fingerprint(tensors)
    assert found == huggingface.fingerprint(directory) and sorted(read) == sorted(map(id, tensors.values()))
