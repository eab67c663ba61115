"""What was saved on one mesh continues on another, bit for bit."""

import helpers
import jax
import numpy as np
import pytest

from lamini_jax import training
from lamini_jax.config import MeshConfig
from lamini_jax.memory import experts, storage
from lamini_jax.runtime import sharding
from lamini_jax.runtime.checkpointing import Checkpoints

CONFIG = helpers.replace(helpers.CONFIG, memory={"num_experts": 4099}, tuning={"epochs": 4})
MESHES = [(1, 1), (2, 4), (3, 1)]


def on(mesh):
    return sharding.set_mesh(MeshConfig(*mesh), jax.devices()[: mesh[0] * mesh[1]])


def tune(directory, epochs=4):
    model = helpers.make_model(CONFIG)
    config = helpers.replace(CONFIG, tuning={"epochs": epochs})
    router = helpers.random_router(CONFIG)
    return training.memory_run(config, model, helpers.FACTS, directory, "", router).result()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint from every mesh."""
    directories = {}
    for mesh in MESHES:
        directories[mesh] = tmp_path_factory.mktemp("run")
        with on(mesh):
            tune(directories[mesh])
    return directories


@pytest.mark.parametrize("here, there", zip(MESHES, MESHES[1:] + MESHES[:1], strict=True))
def test_restores_bit_for_bit(saved, here, there, monkeypatch):
    """Loaded with its optimizer state, saved again without a step, and read for serving."""
    then, written = helpers.latest(saved[there]), {}
    before = helpers.by_expert(then.arrays["expert_ids_S"], then.tables)

    def keep(self, step, tables, arrays, record):
        written["after"] = helpers.by_expert(arrays["expert_ids_S"], tables)

    with on(here):
        monkeypatch.setattr(Checkpoints, "save", keep)
        tune(saved[there])
        stored = storage.load_run(CONFIG, saved[there])
        served = experts.gather_trained(stored.expert_ids_S, stored.experts_SR, before[0][:, None])
        served = [np.asarray(served[name])[:, 0] for name in ("down", "up")]
    assert helpers.same_bits(written["after"], before)
    assert helpers.same_bits(served, before[1][:2])


def test_continues_elsewhere(saved, tmp_path):
    """Four epochs on a mesh and four on another are eight on one device, to float tolerance."""
    with on((1, 1)):
        straight = tune(tmp_path / "straight", epochs=8)
    with on((2, 4)):
        tune(tmp_path / "moved", epochs=4)
    with on((3, 1)):
        moved = tune(tmp_path / "moved", epochs=8)
    np.testing.assert_allclose(moved.progress.loss, straight.progress.loss, rtol=1e-3)
