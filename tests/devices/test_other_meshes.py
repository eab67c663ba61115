"""What was saved on one mesh goes on on another, bit for bit."""

import helpers
import jax
import numpy as np
import pytest

from lamini_jax import bank, checkpoint, memory, row_optimizer, runs, sharding
from lamini_jax.config import MeshConfig

CONFIG = helpers.replace(helpers.CONFIG, memory={"num_experts": 4099}, tuning={"epochs": 4})
MESHES = [(1, 1), (2, 4), (3, 1)]


def on(mesh):
    return sharding.use(MeshConfig(*mesh), jax.devices()[: mesh[0] * mesh[1]])


def tune(directory, epochs=4):
    base = helpers.make_base(CONFIG)
    config = helpers.replace(CONFIG, tuning={"epochs": epochs})
    return runs.tune_memory(config, base, lambda: helpers.random_router(CONFIG), helpers.FACTS, directory, "")


def by_expert(directory):
    """What a checkpoint holds of each trained expert, and the rest of it."""
    saved = checkpoint.Checkpoints(directory).latest()
    ids_S = saved.arrays["expert_ids_S"]
    order = np.argsort(ids_S)[: np.count_nonzero(ids_S != row_optimizer.NONE)]
    return ids_S[order], [np.asarray(leaf)[order] for leaf in saved.tables["rows"] + saved.tables["optimizer"]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint from every mesh."""
    directories = {}
    for mesh in MESHES:
        directories[mesh] = tmp_path_factory.mktemp("run")
        with on(mesh):
            tune(directories[mesh])
    return directories


@pytest.mark.parametrize("there", MESHES)
@pytest.mark.parametrize("here", MESHES)
def test_restores_bit_for_bit(saved, here, there, monkeypatch, tmp_path):
    """Loaded with its optimizer state, saved again without a step, and read for serving."""
    before = by_expert(saved[there])
    written = {}

    def keep(self, tables, arrays, log, extra):
        ids_S = arrays["expert_ids_S"]
        order = np.argsort(ids_S)[: np.count_nonzero(ids_S != row_optimizer.NONE)]
        leaves = jax.tree.leaves(tables["rows"]) + jax.tree.leaves(tables["optimizer"])
        written["after"] = ids_S[order], [np.asarray(leaf)[order] for leaf in leaves]

    with on(here):
        monkeypatch.setattr(checkpoint.Checkpoints, "save", keep)
        tune(saved[there])
        tuned = memory.of_run(CONFIG, saved[there])
        served = bank.gather_trained(tuned.expert_ids_S, tuned.rows_SR, before[0][:, None])
        served = [np.asarray(served[name])[:, 0] for name in ("down", "up")]
    assert helpers.same_bits(written["after"], before)
    assert helpers.same_bits(served, before[1][:2])


def test_goes_on_elsewhere(saved, tmp_path):
    """Four epochs on a mesh and four on another are eight on one device, to float tolerance."""
    with on((1, 1)):
        straight = tune(tmp_path / "straight", epochs=8)
    with on((2, 4)):
        tune(tmp_path / "moved", epochs=4)
    with on((3, 1)):
        moved = tune(tmp_path / "moved", epochs=8)
    np.testing.assert_allclose(moved.log.loss, straight.log.loss, rtol=1e-3)
