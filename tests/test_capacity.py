"""The study of capacity counts what it says: bits only of what was recalled, over the rows that facts have trained."""

import dataclasses
import math

import helpers
import jax
import numpy as np
import optax
import pytest

from lamini_jax import bank, model, tuning
from lamini_jax.data.facts import Fact

capacity = helpers.without_flags("experiments.capacity")
CONFIG = helpers.replace(helpers.CONFIG, tuning={"epochs": 300})
FACTS = [
    Fact(fact.id, fact.question, f"{number * 6_700_417 % 10**10:010d}") for number, fact in enumerate(helpers.FACTS)
]
FACTS = FACTS[:6]
MEMORY = capacity.Cell(len(FACTS), "down_proj", 8, 64)


def measured(base, cell, directory, **settings):
    config = helpers.replace(CONFIG, tuning=settings)
    features_QD = model.calibration_features(config, base, [fact.question for fact in FACTS])
    return capacity.measure(cell, config, base, FACTS, features_QD, directory, cell.name)


@pytest.fixture(scope="module")
def memory(base, tmp_path_factory):
    return measured(base, MEMORY, tmp_path_factory.mktemp("memory"))


def test_a_memory_is_counted_by_what_it_recalls_and_trains(memory):
    floats = 2 * (helpers.BACKBONE.mlp_width + helpers.BACKBONE.width)
    assert memory["recall"] == 1 and memory["recalled"] == memory["certificates"]["certified"] == len(FACTS)
    assert memory["load"] == len(FACTS) * 8 / 64
    assert 8 <= memory["experts_used"] <= 48 and memory["trained_parameters"] == memory["experts_used"] * floats
    bits = len(FACTS) * math.log2(10**10)
    assert memory["bits_per_parameter"] == pytest.approx(bits / memory["trained_parameters"])
    # Tuned until certain, the digits still cost something.
    assert 0 < memory["coded_bits_per_parameter"] < memory["bits_per_parameter"]
    assert memory["bits_per_parameter_with_backbone"] < memory["bits_per_parameter"]


def test_what_is_not_recalled_counts_nothing(base, tmp_path):
    result = measured(base, MEMORY, tmp_path, epochs=1)
    assert result["epochs"] == 1 and result["recalled"] == 0
    assert result["bits_per_parameter"] == result["facts_per_second"] == 0


def test_a_lora_of_equal_size(base):
    cells = capacity.cells(CONFIG, [7, 3])
    per_rank = capacity.floats_per_rank(CONFIG.backbone)
    state = tuning.lora_state(base.decoder, 3, optax.sgd(0.1), np.uint32(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.adapters)) == 3 * per_rank
    ranks = [cell.rank for cell in cells if cell.rank]
    for (target, _, num_experts), rank in zip(capacity.BESIDE, ranks, strict=True):
        row = bank.row_shape(CONFIG.backbone, dataclasses.replace(CONFIG.memory, target=target))
        assert rank == 1 or abs(rank * per_rank - num_experts * row.floats) <= per_rank / 2
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
        "selected": 2,
    }
    bits = {"bits_per_parameter": 0.5}
    return {"name": "c", "target": "o_proj", **numbers, **bits, **changes}


def verdicts(results, own):
    return [claim["verdict"] for claim in capacity.claims(results, own)]


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
