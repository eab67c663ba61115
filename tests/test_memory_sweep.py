"""The sweep over memories runs every combination that is asked for, and refuses what is none."""

import types

import helpers
import pytest

from experiments import memory_sweep
from lamini_jax.errors import UserError


def asked(**changes):
    flags = {"layers": ["1", "2"], "top_k": ["8"], "optimizers": ["adam:0.1", "adafactor:0.04"], **changes}
    return types.SimpleNamespace(**flags)


def test_every_combination_is_a_config():
    found = memory_sweep.settings(helpers.CONFIG, asked())
    assert len(found) == 4
    config = found["2 layers, K = 8, adafactor:0.04"]
    assert (config.memory.num_layers, config.memory.top_k) == (2, 8)
    assert (config.tuning.optimizer.name, config.tuning.optimizer.learning_rate) == ("adafactor", 0.04)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"layers": ["4"]}, "--layers=4: must be below the backbone's 4 layers"),
        ({"layers": ["two"]}, "'two' is not a positive whole number"),
        ({"optimizers": ["adam"]}, "must be NAME:RATE"),
        ({"optimizers": ["adam:nan"]}, "must be a positive number"),
        ({"optimizers": ["lion:0.1"]}, "must be one of"),
    ],
)
def test_refuses(changes, words):
    with pytest.raises(UserError, match=words):
        memory_sweep.settings(helpers.CONFIG, asked(**changes))


def test_the_table_has_the_best_first():
    run = {"layers": 2, "top_k": 8, "optimizer": "adam:0.1", "seconds_per_epoch": 0.5, "floats_per_fact": 10}
    runs = {"slow": run | {"holding": 4, "epochs": 9}, "fails": run | {"holding": 3, "epochs": 5}}
    runs["fast"] = run | {"holding": 4, "epochs": 7, "layers": 3}
    text = memory_sweep.table({"facts": 4, "target": "down_proj", "positions": "answer", "runs": runs})
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["3", "2", "2"] and "75.0%" in text.splitlines()[3]
