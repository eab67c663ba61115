"""Facts that are added on a mesh are those of one device, and a memory opens on any other mesh and without one."""

import jax
import numpy as np
import test_fact_table
from test_fact_memory import FACTS, OUTSIDE, judged, make_model, opened, questions_of  # noqa: F401 (a fixture of all tests here)

from lamini_jax.config import MeshConfig
from lamini_jax.memory.routers import facts as fact_router
from lamini_jax.runtime import sharding

FACTS = FACTS[:4]
ASKED = [*questions_of(FACTS), "what is the code of box 003", OUTSIDE[0]]


def on(mesh, directory, do):
    """What `do` makes of the memory in a directory, opened on a mesh, or on one device alone."""
    with sharding.set_mesh(MeshConfig(*(mesh or (1, 1))), jax.devices() if mesh else jax.devices()[:1]):
        return do(opened(make_model(), directory))


def told(memory):
    """The rows by expert, what is found for each question, and all answers."""
    rows = {expert: np.frombuffer(row, np.uint16) for expert, row in memory.table.contents.rows.items()}
    found = [(each.fact, each.best, each.runner_up) for each in memory.find(ASKED)]
    return rows, found, [answer.text for answer in memory.ask(ASKED, 8)]


def add(memory):
    memory.add(FACTS[:2])
    change = memory.add(FACTS[2:])
    assert (change.facts, change.holding) == (4, 4)
    return told(memory)


def test_added_on_a_mesh_and_opened_anywhere(tmp_path):
    (tmp_path / "alone").mkdir()
    alone = on(None, tmp_path / "alone", add)
    rows, found, answers = on((2, 4), tmp_path, add)
    assert rows.keys() == alone[0].keys() and found == alone[1]
    assert answers[: len(FACTS)] == [fact["answer"] for fact in FACTS] and answers == alone[2]
    for other in (None, (1, 8)):
        rows_again, *again = on(other, tmp_path, told)
        assert again == [found, answers]
        assert all(np.array_equal(rows_again[expert], row) for expert, row in rows.items())


def test_a_table_is_changed_on_a_mesh_as_it_is_read():
    """New keys go to the devices that have their places, which need no others for that."""
    with sharding.set_mesh(MeshConfig(2, 4), jax.devices()):
        test_fact_table.test_a_table_that_was_changed_is_the_one_that_is_read(make_model())
        keys_WC, key_XC = sharding.put(np.ones((128, 8), np.float32), "keys", None), np.ones((64, 8), np.float32)
        program = fact_router._with_keys.lower(keys_WC, key_XC, np.int32(30)).compile().as_text()
        assert not any(name in program for name in ("all-gather", "all-reduce", "all-to-all", "collective"))
