"""A run on a mesh is the run of one device: the same experts, the same losses, the same rows, whatever divides N."""

import dataclasses

import helpers
import jax
import numpy as np
import pytest
from helpers import FACTS, QUESTIONS
from jax.sharding import AxisType

from experiments.compile_ahead import collectives
from lamini_jax.backbone import answering, frozen_model
from lamini_jax.config import MeshConfig, certified_loss
from lamini_jax.data.facts import Fact
from lamini_jax.errors import DEVICES, UserError
from lamini_jax.memory import experts, routers
from lamini_jax.memory.routers import experts as expert_router
from lamini_jax.runtime import sharded_tables, sharding
from lamini_jax.training import FullMethod, LoraMethod, MemoryMethod, loop

MESHES = [(1, 8), (2, 4), (8, 1)]
# 4099 is a prime; 20 facts and batches of 10 are no multiples of 8 either.
CONFIG = helpers.replace(helpers.CONFIG, memory={"num_experts": 4099}, tuning={"batch_size": 10, "epochs": 10})
STEPS = 20
ANSWERS = [fact.answer for fact in FACTS]


def run(config, projection, mesh=None):
    """20 steps; the selection, the losses of each epoch, the rows and the optimizer's state by expert, the answers."""
    with sharding.set_mesh(MeshConfig(*(mesh or (1, 1))), jax.devices() if mesh else jax.devices()[:1]):
        model = helpers.make_model(config)
        router = expert_router.make(config, *projection)
        selection = routers.select_facts(model, router, QUESTIONS, config.memory.top_k)
        method = MemoryMethod.create(config, model, FACTS, selection)
        progress, losses, compiled = loop.new_progress(len(FACTS)), [], method.step._cache_size()  # on other meshes
        for now, _ in loop.epochs(method, method.init(), progress):
            state = now
            if progress.batches == 0:
                losses.append(progress.total_F.copy())
        assert progress.steps == STEPS and method.step._cache_size() == compiled + 1
        answers = answering.answers(*method.adapter(state), QUESTIONS, max_new_tokens=6)
        loop.check(method, state, progress)
        certified_F = progress.worst_F < certified_loss(config.backbone.dtype)
        assert certified_F.any() and all(np.array(answers)[certified_F] == np.array(ANSWERS)[certified_F])
        _, by_expert = helpers.by_expert(state.slots.expert_ids_S, state.slots.state)
        rows_NR = helpers.flat(state.experts_NR)[: config.memory.num_experts]
        return selection.expert_ids_FK, np.array(losses), rows_NR, by_expert, answers


SETTINGS = [("exact", "adam", "answer"), ("product", "adafactor", "all")]


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda settings: settings[0])
def config(request):
    lookup, optimizer, positions = request.param
    memory = {"positions": positions} | ({"num_experts": 67**2} if lookup == "product" else {})
    settings = dataclasses.replace(CONFIG.tuning.optimizer, name=optimizer)
    return helpers.replace(CONFIG, memory=memory, router={"lookup": lookup}, tuning={"optimizer": settings})


@pytest.fixture(scope="module")
def projection(config):
    """A router that keeps the questions apart, so that every shard has experts of its own to train."""
    router = routers.train(config, helpers.make_model(config), QUESTIONS)
    return np.asarray(router.mean_D), np.asarray(router.transform_DC)


@pytest.fixture(scope="module")
def alone(config, projection):
    return run(config, projection)


@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_equals_unsharded(config, projection, alone, mesh):
    selection, losses, rows, optimizer, answers = run(config, projection, mesh)
    assert np.unique(selection).size > 100
    np.testing.assert_array_equal(selection, alone[0])
    np.testing.assert_allclose(losses, alone[1], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(rows, alone[2], atol=2e-3)
    for found, expected in zip(optimizer, alone[3], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())
    assert answers == alone[4]
    shape = experts.expert_shape(config.backbone, config.memory)
    fresh = helpers.flat(experts.init(np.uint32(config.seed), shape, len(rows)))
    moved_N = (alone[2] != fresh).any(axis=1)
    assert set(np.flatnonzero(moved_N)) == set(selection.ravel())


@pytest.mark.parametrize("batch", [16, 20])
def test_losses_of_packed_tokens(batch):
    """Each shard packs its own part of the answers; a batch that the shards do not divide is packed as one."""
    rng, A = np.random.default_rng(0), 5
    length_B = rng.integers(A + 1, size=batch)
    hidden_BAD = rng.normal(size=(batch, A, CONFIG.backbone.embed_dim)).astype(np.float32)
    targets_BA, found = rng.integers(256, size=(batch, A)), []
    for mesh in ((1, 1), *MESHES):
        with sharding.set_mesh(MeshConfig(*mesh), jax.devices()[: mesh[0] * mesh[1]]):
            shards = mesh[0] if batch % mesh[0] == 0 else 1
            most = int(length_B.reshape(shards, -1).sum(axis=1).max())
            losses = jax.jit(frozen_model.token_losses, static_argnums=4)
            found.append(losses(helpers.make_model(CONFIG), hidden_BAD, targets_BA, length_B, most))
    for losses_BA, likeliest_BA in found[1:]:
        np.testing.assert_allclose(losses_BA, found[0][0], atol=1e-4)
        np.testing.assert_array_equal(likeliest_BA, found[0][1])
    assert ((np.asarray(found[0][0]) > 0) == (np.arange(A) < length_B[:, None])).all()


@pytest.mark.parametrize("mesh", MESHES)
def test_nothing_in_a_step_grows_with_the_experts(mesh):
    """Neither what travels between devices nor what each of them keeps for a while."""
    travels, temporary = {}, {}
    for num_experts in (4099, 16 * 4099):
        with sharding.set_mesh(MeshConfig(*mesh)):
            config = helpers.replace(CONFIG, memory={"num_experts": num_experts})
            model = helpers.make_model(config)
            rng = np.random.default_rng(0)
            ids_FK = np.sort(rng.choice(4099, (len(FACTS), 8), replace=False), axis=1)
            method = helpers.make_method(config, model, FACTS, ids_FK * (num_experts // 4099))
            index_B = np.full(16, -1, np.int32)
            compiled = method.step.lower(model, method.init(), method.data.buckets[0], index_B).compile()
        travels[num_experts] = collectives(compiled.as_text())
        temporary[num_experts] = compiled.memory_analysis().temp_size_in_bytes
    few, many = travels.values()
    assert few and few == many
    few, many = temporary.values()
    assert many <= 1.01 * few


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("spread", [1, 97])
def test_rows_that_shards_exchange(mesh, spread):
    """Bit for bit those of the table, if all are of one shard, or one twice; zeros for what the table does not have."""
    table_N = np.random.default_rng(0).normal(size=(800, 3)).astype(np.float32)
    table_N[5] = -0.0
    index_BK = np.arange(24 * 5).reshape(24, 5) * spread % 800
    index_BK[0], index_BK[-1] = [5, 5, -1, 800, 2**31 - 1], -1
    known_BK = (index_BK >= 0) & (index_BK < 800)
    expected = np.where(known_BK[..., None], table_N[np.clip(index_BK, 0, 799)], np.float32(0))
    with sharding.set_mesh(MeshConfig(*mesh)):
        owner_BK = np.where(known_BK, index_BK // (800 // mesh[0]), mesh[0])
        most = max(np.bincount(part)[: mesh[0]].max() for part in owner_BK.reshape(mesh[0], -1))
        gather = jax.jit(sharded_tables.gather_rows, static_argnums=(2, 3))
        found = gather(sharding.put(table_N, "experts", None), index_BK.astype(np.int32), ("experts", None), int(most))
    assert helpers.same_bits(found, expected)


def test_devices_exchange_what_their_parts_of_a_batch_need():
    """Rows and their gradients travel once each: less than three times a part's, and not the whole batch's."""
    config = helpers.replace(CONFIG, memory={"top_k": 32}, tuning={"batch_size": 64})
    facts = [Fact(str(i), f"What is {i:03}?", "12345") for i in range(256)]
    with sharding.set_mesh(MeshConfig(8, 1)):
        model = helpers.make_model(config)
        method = helpers.make_method(config, model, facts)
        (bucket,) = method.data.buckets
        step = method.step.lower(model, method.init(), bucket, np.arange(64, dtype=np.int32)).compile()
    part = 64 // 8 * 32 * method.shape.floats * 4
    moved = sum(one["bytes"] * one["count"] for one in collectives(step.as_text()) if one["bytes"] > part / 10)
    assert 2 * part < moved < 2 * 3 * part


@pytest.mark.parametrize("make", [LoraMethod, FullMethod])
def test_sharded_baselines_equal_unsharded_ones(make):
    """And Adam's moments, which are as large as what is trained, lie where that lies."""
    losses = []
    for mesh in ((1, 1), (2, 4)):
        with sharding.set_mesh(MeshConfig(*mesh), jax.devices()[: mesh[0] * mesh[1]]):
            method = make.create(CONFIG, helpers.make_model(CONFIG), FACTS)
            state = method.init()
            moments, trained = jax.tree.leaves(state.optimizer[0].mu), jax.tree.leaves(state.trained)
            for moment, leaf in zip(moments, trained, strict=True):
                assert moment.sharding.shard_shape(moment.shape) == leaf.sharding.shard_shape(leaf.shape)
            for _ in range(3):
                state, found = method.step(method.model, state, method.data.buckets[0], np.arange(8, dtype=np.int32))
                losses.append(np.asarray(found.total_B))
    np.testing.assert_allclose(losses[3:], losses[:3], rtol=1e-4)
    assert losses[2].mean() < 0.95 * losses[0].mean()


def test_a_mesh_must_have_all_devices():
    for data, model_axis in ((3, 1), (-1, 3), (16, -1), (2, 2), (-1, -1), (0, -1), (8, 0), (-2, 4)):
        with pytest.raises(UserError, match="8 devices") as error:
            sharding.make_mesh(MeshConfig(data, model_axis))
        assert error.value.status == DEVICES
    for data, model_axis in ((-1, 1), (2, -1), (2, 4), (-1, 8)):
        mesh = sharding.make_mesh(MeshConfig(data, model_axis))
        assert mesh.size == 8 and mesh.axis_types == (AxisType.Auto,) * 2


def test_columns_must_divide():
    config = helpers.replace(CONFIG, backbone={"mlp_dim": 44})
    with sharding.set_mesh(MeshConfig(1, 8)), pytest.raises(UserError, match="44 and 32"):
        experts.expert_shape(config.backbone, config.memory)


def test_each_device_holds_its_part_alone():
    with sharding.set_mesh(MeshConfig(2, 4)):
        config = helpers.replace(CONFIG, memory={"num_experts": 4100})
        experts_NR = experts.init(np.uint32(0), experts.expert_shape(config.backbone, config.memory), 4100)
        model = helpers.make_model(config)
        keys = helpers.random_router(config).keys
    assert {shard.data.shape for shard in experts_NR["down"].addressable_shards} == {(2050, 2, 12)}
    assert {shard.data.shape for shard in keys.addressable_shards} == {(513, 16)}
    mlp = model.params["suffix_layers"]["0"]["gate_proj"]["weight"]
    assert {shard.data.shape for shard in mlp.addressable_shards} == {(32, 12)}
