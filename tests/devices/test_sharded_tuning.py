"""A run on a mesh is the run of one device: the same experts, the same losses, the same rows, whatever divides N."""

import helpers
import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from lamini_jax import bank, model, recall, router, row_optimizer, runs, sharding, tuning
from lamini_jax.config import MeshConfig
from lamini_jax.errors import DEVICES, UserError
from launch.compile_ahead import collectives

MESHES = [(1, 8), (2, 4), (8, 1)]
# 4099 is a prime; 20 facts and batches of 10 are no multiples of 8 either.
CONFIG = helpers.replace(helpers.CONFIG, memory={"num_experts": 4099}, tuning={"batch_size": 10, "epochs": 10})
STEPS = 20


QUESTIONS = [fact.question for fact in helpers.FACTS]


def run(config, projection, mesh=None):
    """20 steps; the selection, the losses of each epoch, the rows and the optimizer's state by expert, the answers."""
    with sharding.use(MeshConfig(*(mesh or (1, 1))), jax.devices() if mesh else jax.devices()[:1]):
        base = helpers.make_base(config)
        routing = router.make(config, *projection)
        expert_ids_FK = model.select_all(base, routing, QUESTIONS, config.memory.selected)
        ready = helpers.make_tuning(config, base, helpers.FACTS, expert_ids_FK)
        state, log, losses = ready.fresh_state(), tuning.new_log(len(helpers.FACTS)), []
        for _ in range(config.tuning.epochs):
            state = tuning.train_epoch(ready.method, base.params, state, ready.facts, log, config.tuning, 0)
            losses.append(log.total_F.copy())
            log.loss.append(0.0)
        assert log.steps == STEPS and ready.method.step._cache_size() == 1
        rows_NR, ids_S = state.rows_NR, np.asarray(state.slots.expert_ids_S)
        adapt = recall.with_memory(base, routing, lambda ids: runs._gather(rows_NR, ids), config.memory)
        answers = recall.answers(base, adapt, QUESTIONS, longest=6)
        order = np.argsort(ids_S)[: np.count_nonzero(ids_S != row_optimizer.NONE)]
        by_expert = jax.tree.map(lambda x: np.asarray(x)[order], state.slots.state)
        return expert_ids_FK, np.array(losses), helpers.flat(rows_NR)[: config.memory.num_experts], by_expert, answers


@pytest.fixture(scope="module", params=[("exact", "adam"), ("product", "adafactor")], ids=lambda pair: pair[0])
def config(request):
    lookup, optimizer = request.param
    memory = {"num_experts": 67**2} if lookup == "product" else {}
    return helpers.replace(CONFIG, memory=memory, router={"lookup": lookup}, tuning={"optimizer": optimizer})


@pytest.fixture(scope="module")
def projection(config):
    """A router that keeps the questions apart, so that every shard has experts of its own to train."""
    routing = model.make_router(config, helpers.make_base(config), QUESTIONS)
    return np.asarray(routing.mean_D), np.asarray(routing.transform_DC)


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
    for found, expected in zip(jax.tree.leaves(optimizer), jax.tree.leaves(alone[3]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())
    assert answers == alone[4]
    moved = (
        alone[2]
        != helpers.flat(bank.init(np.uint32(2), bank.row_shape(config.backbone, config.memory), 4489))[: len(rows)]
    ).any(axis=1)
    assert set(np.flatnonzero(moved)) == set(selection.ravel())


@pytest.mark.parametrize("mesh", MESHES)
def test_nothing_in_a_step_grows_with_the_bank(mesh):
    """Neither what travels between devices nor what each of them keeps for a while."""
    travels, temporary = {}, {}
    for num_experts in (4099, 16 * 4099):
        with sharding.use(MeshConfig(*mesh)):
            config = helpers.replace(CONFIG, memory={"num_experts": num_experts})
            base = helpers.make_base(config)
            rng = np.random.default_rng(0)
            ids_FK = np.sort(rng.choice(4099, (len(helpers.FACTS), 8), replace=False), axis=1)
            ready = helpers.make_tuning(config, base, helpers.FACTS, ids_FK * (num_experts // 4099))
            rows_B = np.full(16, -1, np.int32)
            arguments = base.params, ready.fresh_state(), ready.facts.buckets[0], rows_B
            compiled = ready.method.step.lower(*arguments).compile()
        travels[num_experts] = collectives(compiled.as_text())
        temporary[num_experts] = compiled.memory_analysis().temp_size_in_bytes
    few, many = travels.values()
    assert few and few == many
    few, many = temporary.values()
    assert many <= 1.01 * few


def test_a_mesh_must_have_all_devices():
    for data, model_axis in ((3, 1), (-1, 3), (16, -1), (2, 2), (-1, -1), (0, -1), (8, 0), (-2, 4)):
        with pytest.raises(UserError, match="8 devices") as error:
            sharding.make_mesh(MeshConfig(data, model_axis))
        assert error.value.status == DEVICES
    for data, model_axis in ((-1, 1), (2, -1), (2, 4), (-1, 8)):
        mesh = sharding.make_mesh(MeshConfig(data, model_axis))
        assert mesh.size == 8 and mesh.axis_types == (AxisType.Auto,) * 2


def test_columns_must_divide():
    config = helpers.replace(CONFIG, backbone={"mlp_width": 44})
    with sharding.use(MeshConfig(1, 8)), pytest.raises(UserError, match="44 and 32"):
        bank.row_shape(config.backbone, config.memory)


def test_each_device_holds_its_part_alone():
    with sharding.use(MeshConfig(2, 4)):
        config = helpers.replace(CONFIG, memory={"num_experts": 4100})
        rows_NR = bank.init(np.uint32(0), bank.row_shape(config.backbone, config.memory), 4100)
        base = helpers.make_base(config)
        keys = helpers.random_router(config).keys
    assert {shard.data.shape for shard in rows_NR["down"].addressable_shards} == {(2050, 2, 12)}
    assert {shard.data.shape for shard in keys.addressable_shards} == {(513, 16)}
    mlp = base.params["suffix_layers"]["gate_proj"]["weight"]
    assert {shard.data.shape for shard in mlp.addressable_shards} == {(2, 32, 12)}
