"""The table that a memory of facts answers from: each change makes another one, of which little is made anew."""

import contextlib
import dataclasses
import itertools

import jax
import numpy as np
import pytest
from test_fact_memory import CONFIG, judged, make_model  # noqa: F401 (a fixture of all tests here)

from lamini_jax.memory import experts, scope, storage
from lamini_jax.memory.fact_table import FactTable
from lamini_jax.memory.routers import facts as fact_router
from lamini_jax.memory.store import Contents, StoredFact
from lamini_jax.runtime import sharding

FLOATS = experts.expert_shape(CONFIG.backbone, CONFIG.memory).floats
THRESHOLD = 0.8


@pytest.fixture(scope="module")
def model():
    return make_model()


def some(first, count, **values):
    """What a store keeps of facts that nobody has tuned."""
    rng = np.random.default_rng(first)
    put = []
    for number in range(first, first + count):
        fact = StoredFact(str(number), f"Who has box {number}?", "Ida", (), True, "", (2 * number, 2 * number + 1))
        fact = dataclasses.replace(fact, **values)
        put.append((fact, rng.normal(size=(len(fact.wordings), CONFIG.backbone.embed_dim)).astype(np.float16)))
    return put


def rows_of(put):
    """A row for each of their experts."""
    ids = [expert for fact, _ in put for expert in fact.experts]
    noise = np.random.default_rng(len(ids)).normal(scale=0.02, size=(len(ids), FLOATS)).astype("bfloat16")
    return {expert: row.tobytes() for expert, row in zip(ids, noise, strict=True)}


def table_of(model, put):
    contents = Contents([fact for fact, _ in put], [key_WC for _, key_WC in put], rows_of(put))
    return FactTable.of(CONFIG, model, scope.load(""), contents)


def everything(table):
    """All that a table answers from, apart from what it was made of."""
    router = table.router
    lists = router.facts, router.places, router.texts, router.fact_W.tolist(), router.most, router.holding
    asking = {text: sorted(ids) for text, ids in router.asking.items()}
    statistics = router.statistics.count, dict(router.statistics._stored)
    keys = np.asarray(router.keys_WC).tobytes(), [key_WC.tobytes() for key_WC in router.keys]
    return *map(str, lists), asking, statistics, keys, table.loads_N.tolist(), dict(table.contents.rows)


def changes():
    """Arguments of `FactTable.changed`, which follow each other."""
    put = some(0, 60)
    changed = [(dataclasses.replace(fact, answer="Ole"), key_WC) for fact, key_WC in put[3:5]]
    yield {"put": put, "rows": rows_of(put)}
    yield {"put": some(60, 1), "rows": rows_of(some(60, 1))}
    yield {"put": some(61, 80)}  # more than there is room for
    yield {"put": some(200, 70)}  # more than are sent alone
    yield {"put": some(270, 2, certified=False) + some(280, 1, experts=tuple(range(600, 608)))}
    yield {"put": changed}
    yield {"put": some(7, 1, certified=False) + some(300, 1)}
    yield {"put": some(8, 1, also=("Whose is box eight?", "who has box 7")) + some(270, 1)}
    yield {"put": some(9, 1)}  # the same wording with another key
    yield {"forget": ["280", "8", "271"], "free": [560, 561]}
    yield {"forget": [str(number) for number in range(40, 300)]}
    yield {"put": some(40, 3), "forget": ["0"], "rows": rows_of(some(40, 3)), "free": [0, 1]}


def test_a_table_that_was_changed_is_the_one_that_is_read(model):
    table = table_of(model, [])
    for arguments in changes():
        table = table.changed(**arguments)
        again = FactTable.of(CONFIG, model, table.router.scope, table.contents)
        assert everything(table) == everything(again) and again.contents.version == table.contents.version


def test_a_table_stays_as_it_was_when_others_are_made_of_it(model):
    """Somebody may be answering from it."""
    asked = ["Who has box 3?", "who has box 60", "Who has box 7?"]
    tables, before = [table_of(model, some(300, 1))], []
    for arguments in changes():
        before.append((everything(tables[-1]), jax.tree.map(np.asarray, tables[-1].find(asked, THRESHOLD))))
        tables.append(tables[-1].changed(**(arguments | {"put": arguments.get("put", [])})))
        tables[-2].changed(put=some(400, 2))
    for table, (kept, found) in itertools.islice(zip(tables, before, strict=False), len(before)):
        assert everything(table) == kept
        jax.tree.map(np.testing.assert_array_equal, table.find(asked, THRESHOLD), found)


def test_an_equal_wording_is_found_whatever_its_key(model):
    """Of two facts that have it in the one that answers."""
    also = {"also": ("whose is it",)}
    table = table_of(model, some(0, 40) + some(40, 1, **also) + some(41, 1, certified=False, **also))
    assert table.find(["  WHOSE is it?"], THRESHOLD).fact_B == [40]
    assert table.changed(some(41, 1, **also), forget=["40"]).find(["whose is it"], THRESHOLD).fact_B == [40]
    assert table.changed(forget=["40"]).find(["whose is it"], THRESHOLD).fact_B == [fact_router.NONE]


@contextlib.contextmanager
def sent():
    """The sizes of all arrays that are put on the devices meanwhile, or made of keys and of rows."""
    sizes = []

    def counting(function, size):
        def counted(*arguments):
            sizes.append(size(result := function(*arguments)))
            return result

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "put", counting(sharding.put, lambda x: x.nbytes))
        patch.setattr(fact_router, "_table", counting(fact_router._table, lambda x: x.nbytes))
        rows = counting(storage.rows_from_bytes, lambda parts: sum(part.nbytes for part in parts.values()))
        patch.setattr(storage, "rows_from_bytes", rows)
        yield sizes


def test_a_new_fact_sends_and_converts_as_much_in_a_memory_of_any_size(model):
    """And an answer needs the rows of its own experts alone."""
    told, width = [], CONFIG.backbone.embed_dim
    for size in (5, 1000):
        table, new = table_of(model, some(0, size)), some(1500, 1)
        with sent() as growing:
            table = table.changed(new, rows_of(new))
        with sent() as asking:
            table.ask([new[0][0].question], table.find([new[0][0].question], THRESHOLD), 2)
        told.append((growing, asking))
    assert told[0] == told[1]
    assert sum(told[0][0]) == 64 * 4 * width and sum(told[0][1]) == 2 * 2 * 2 * FLOATS
