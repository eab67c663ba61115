"""The study of capacity counts what it says: bits only of what was recalled, over the rows that facts have trained."""

import dataclasses
import math

import helpers
import jax
import pytest

from experiments import capacity
from experiments.shared import flops
from lamini_jax.data.facts import Fact
from lamini_jax.memory import experts
from lamini_jax.memory.routers import experts as expert_router
from lamini_jax.training import LoraMethod

CONFIG = helpers.replace(helpers.CONFIG, tuning={"epochs": 300})
FACTS = [
    Fact(fact.id, fact.question, f"{number * 6_700_417 % 10**10:010d}") for number, fact in enumerate(helpers.FACTS)
]
FACTS = FACTS[:6]
MEMORY = capacity.Cell(len(FACTS), "down_proj", 8, 64)


def measured(model, cell, directory, **settings):
    config = helpers.replace(CONFIG, tuning=settings)
    features_QD = expert_router.calibration_features(config, model, [fact.question for fact in FACTS])
    return capacity.measure(cell, config, model, FACTS, lambda count: features_QD, (directory, cell.name))


@pytest.fixture(scope="module")
def memory(model, tmp_path_factory):
    return measured(model, MEMORY, tmp_path_factory.mktemp("memory"))


def test_a_memory_is_counted_by_what_it_recalls_and_trains(memory):
    floats = 2 * (helpers.BACKBONE.mlp_dim + helpers.BACKBONE.embed_dim)
    assert memory["recall"] == 1 and memory["recalled"] == memory["certificates"]["certified"] == len(FACTS)
    assert memory["load"] == len(FACTS) * 8 / 64
    assert 8 <= memory["experts_used"] <= 48 and memory["trained_parameters"] == memory["experts_used"] * floats
    bits = len(FACTS) * math.log2(10**10)
    assert memory["bits_per_parameter"] == pytest.approx(bits / memory["trained_parameters"])
    # Tuned until certain, the digits still cost something.
    assert 0 < memory["coded_bits_per_parameter"] < memory["bits_per_parameter"]


def test_what_is_not_recalled_counts_nothing(model, tmp_path):
    result = measured(model, MEMORY, tmp_path, epochs=1)
    assert result["epochs"] == 1 and result["recalled"] == 0
    assert result["bits_per_parameter"] == result["facts_per_second"] == 0


def test_a_lora_of_equal_size(model):
    cells = capacity.cells(CONFIG, [7, 3])
    per_rank = flops.lora_rank_parameters(CONFIG.backbone)
    lora = LoraMethod.create(helpers.replace(CONFIG, lora={"rank": 3}), model, FACTS)
    assert sum(leaf.size for leaf in jax.tree.leaves(lora.fresh())) == 3 * per_rank
    ranks = [cell.rank for cell in cells if cell.rank]
    for (target, num_experts), rank in zip(capacity.BESIDE, ranks, strict=True):
        shape = experts.expert_shape(CONFIG.backbone, dataclasses.replace(CONFIG.memory, target=target))
        assert rank == 1 or abs(rank * per_rank - num_experts * shape.floats) <= per_rank / 2
    assert [cell.count for cell in cells[-2:]] == [3, 7] and cells[-1].num_experts == CONFIG.memory.num_experts


def cell(**changes):
    """The result of a memory that holds a thousand facts."""
    numbers = {
        "count": 1000,
        "recall": 1.0,
        "load": 0.1,
        "epochs": 9,
        "facts_per_second": 5.0,
        "rank": 0,
        "top_k": 2,
    }
    bits = {"bits_per_parameter": 0.5}
    return {"name": "c", "target": "o_proj", **numbers, **bits, **changes}


def verdicts(results, own):
    cells = [result | {"own": False} for result in results] + [result | {"own": True} for result in own]
    cells = [result | {"name": f"cell {number}"} for number, result in enumerate(cells)]
    arithmetic = capacity.arithmetic(max(result["bits_per_parameter"] for result in cells))
    return [claim.verdict for claim in capacity.claims({"cells": cells, "paper_arithmetic": arithmetic})]


def test_verdicts_follow_the_measurements():
    full, shared = cell(), cell(load=4.0)
    broken, spoiled = cell(recall=0.9, count=2000), cell(load=16.0, recall=0.99)
    whole, partly, never = "reproduced", "reproduced in part", "not reproduced"
    assert verdicts([full, shared], [full]) == [whole, whole, never]
    assert verdicts([full, shared, broken, spoiled], [full, broken]) == [partly, partly, never]
    assert verdicts([broken, spoiled], [broken]) == [never, never, never]
    assert verdicts([cell(bits_per_parameter=4.0)], [full])[2] == partly
    assert verdicts([full], [cell(count=10)])[0] == partly  # complete, but no large set
    assert verdicts([cell(bits_per_parameter=17.0)], [full])[2] == whole


def test_the_paper_needs_more_bits_than_there_are():
    """1B facts of log2(10^10) bits in 2B parameters, or in 10B."""
    numbers = capacity.arithmetic(2.0)
    assert numbers["needed_bits_per_trained_parameter"] == pytest.approx(16.61, abs=0.01)
    assert numbers["needed_bits_per_parameter_with_backbone"] == pytest.approx(3.322, abs=0.001)
    assert numbers["facts_at_best_measured"] == pytest.approx(4e9 / 33.22, rel=1e-3)


def test_where_recall_breaks():
    series = [cell(load=load, recall=1.0 - (load > 8)) for load in (0.1, 4.0, 64.0, 16.0)]
    assert capacity.breaking(series) == {"o_proj, K = 2": {"holds": 4.0, "breaks": 16.0}}
    assert capacity.breaking(series[:1])["o_proj, K = 2"]["breaks"] is None
