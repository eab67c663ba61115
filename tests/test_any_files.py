"""Whatever bytes and whatever JSON a user's files and our own hold: they are read, or refused in one line."""

import dataclasses
import json
import shutil

import helpers
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save
from test_readers import CONTENTS, FILES, MANY, NUMBERS, SOME, TEXTS, VALUES, read_or_refuse, write_json

from lamini_jax import api, memories, question_files
from lamini_jax.config import identity
from lamini_jax.data import facts
from lamini_jax.errors import BAD_INPUT, OTHER_RUN
from lamini_jax.memory import experts, storage
from lamini_jax.runtime import checkpointing, cli, workdir

TOKENIZER = helpers.TOKENIZER
CONFIG = helpers.replace(helpers.CONFIG, memory={"num_experts": 64, "top_k": 4})

RECORDS = st.dictionaries(st.sampled_from(["question", "answer", "generated"]) | TEXTS, VALUES, max_size=3)
GOOD = st.fixed_dictionaries({"question": TEXTS, "answer": TEXTS}, optional={"note": VALUES, "generated": VALUES})
LINES = (GOOD | RECORDS | VALUES).map(lambda value: json.dumps(value).encode()) | CONTENTS
JSONL = st.builds(
    lambda mark, lines, end: mark + end.join(lines),
    st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
    st.lists(LINES, max_size=3),
    st.sampled_from([b"\n", b"\r\n", b"\r", b"\0"]),
)


class Echo:
    """Stands for a memory: it answers with the question."""

    def ask(self, questions, *_):
        return [memories.Answer(question, 1.0, [], 0) for question in questions]


class Source:
    config = CONFIG

    def load(self, _):
        return Echo()


@MANY
@given(content=JSONL)
def test_any_bytes_for_facts(content, tmp_path):
    (tmp_path / "facts.jsonl").write_bytes(content)
    found = read_or_refuse(lambda: facts.read(str(tmp_path / "facts.jsonl"), TOKENIZER, 64))
    for fact in found or []:
        assert fact.question.strip() and fact.answer.strip()
        (fact.question + fact.answer).encode()


@MANY
@given(content=JSONL)
@example(content=b'{"question": "a", "note": "\\ud800"}')
def test_any_bytes_for_questions(content, tmp_path, monkeypatch):
    """What is read can be written again beside its answers."""
    (tmp_path / "questions.jsonl").write_bytes(content)
    monkeypatch.setattr(question_files.checkpoints, "load_tokenizer", lambda config: TOKENIZER)
    output = tmp_path / "answers.jsonl"
    output.unlink(missing_ok=True)
    asking = question_files.Asking(Source())
    read_or_refuse(lambda: asking.file(str(tmp_path / "questions.jsonl"), str(output)))
    if output.exists():
        asked = [json.loads(line) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
        answered = [json.loads(line) for line in output.read_text("utf-8").split("\n") if line]
        assert answered == [{**record, "generated": record["question"]} for record in asked]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What `tune` leaves of a run, with a checkpoint of a few numbers, and the identity of the run."""
    directory, own = tmp_path_factory.mktemp("run"), api.run_identity(CONFIG, helpers.FACTS, "weights")
    workdir.open_workdir(str(directory), own, {"backbone": ""})
    workdir.write_json(directory / "results.json", dataclasses.asdict(api.TuneResult(2, 2, 2, 2, 5, 1.5, 3)))
    checkpoints = checkpointing.Checkpoints(directory / "checkpoints")
    checkpoints.save(3, {"a": [helpers.jnp.arange(6.0)]}, {"b": np.arange(4)}, {"c": 1})
    checkpoints.close()
    return directory, own


def changed(path, name, value):
    """The object of a file with the value of one of its leaves, by its dotted name, replaced."""
    values = json.loads(path.read_text())
    inner = values
    *groups, last = name.split(".")
    for group in groups:
        inner = inner[group]
    inner[last] = value
    return values


RUN_LEAVES = [name for name, _ in cli.flatten({"config": identity(CONFIG), "where": {"backbone": ""}})]
OBJECTS = CONTENTS | VALUES.map(lambda value: json.dumps(value).encode())


@MANY
@given(content=OBJECTS, name=st.sampled_from(["config.json", "results.json", "checkpoints/manifest-3.json"]))
def test_any_bytes_for_the_files_of_a_run(content, name, run):
    directory, own = run
    whole = (directory / name).read_bytes()
    (directory / name).write_bytes(content)
    checkpoints = checkpointing.Checkpoints(directory / "checkpoints")
    try:
        read_or_refuse(lambda: api.run_source(directory))
        read_or_refuse(lambda: api._read_result(directory / "results.json"))
        read_or_refuse(lambda: workdir.open_workdir(str(directory), own, {"backbone": ""}), BAD_INPUT, OTHER_RUN)
        read_or_refuse(checkpoints.latest)
    finally:
        (directory / name).write_bytes(whole)
    assert checkpoints.latest().step == 3


@MANY
@given(leaf=st.sampled_from(RUN_LEAVES), value=VALUES | TEXTS | NUMBERS)
def test_any_values_in_the_config_of_a_run(leaf, value, run, tmp_path):
    shutil.copy(run[0] / "results.json", tmp_path)
    write_json(tmp_path / "config.json", changed(run[0] / "config.json", leaf, value))
    read_or_refuse(lambda: api.run_source(tmp_path))


@MANY
@given(changes=st.dictionaries(st.sampled_from([*api.TuneResult.__dataclass_fields__]) | TEXTS, VALUES, max_size=2))
def test_any_values_in_results(changes, run, tmp_path):
    values = json.loads((run[0] / "results.json").read_text())
    write_json(tmp_path / "results.json", {**values, **changes})
    result = read_or_refuse(lambda: api._read_result(tmp_path / "results.json"))
    assert result is None or result.holding <= result.facts or result.step is not None


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exported memory of a few random rows."""
    directory, ids_S = tmp_path_factory.mktemp("exported"), np.arange(0, 60, 10, dtype=np.int32)
    shape = experts.expert_shape(CONFIG.backbone, CONFIG.memory)
    rows_SR = {name: np.ones(part, np.float32) for name, part in shape.parts(ids_S.size).items()}
    router = helpers.random_router(CONFIG)
    storage.save_export(directory, CONFIG, storage.StoredMemory(router, ids_S, rows_SR, "weights"))
    return directory


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def load_export(directory):
    return storage.load_export(storage.export_config(directory), directory)


@SOME
@given(content=OBJECTS | st.dictionaries(st.sampled_from(["config", "router", "experts", "backbone"]), VALUES))
def test_any_description_of_an_export(content, copy):
    values = json.loads((copy / "memory.json").read_text())
    content = content if isinstance(content, bytes) else json.dumps({**values, **content}).encode()
    (copy / "memory.json").write_bytes(content)
    try:
        read_or_refuse(lambda: load_export(copy))
    finally:
        write_json(copy / "memory.json", values)


EXPORT_LEAVES = [f"config.{name}" for name in ("memory.num_experts", "memory.num_layers", "memory.target", "seed")]
EXPORT_LEAVES += [f"config.router.{name}" for name in ("kind", "lookup", "key_dim")]
EXPORT_LEAVES += [
    "config.memory.dtype",
    "config.backbone.mlp_dim",
    "config.backbone.embed_dim",
    "router.keys",
    "experts",
]
# Not any size: those of arrays that fit into no memory are refused by the allocator.
SIZES = st.sampled_from([0, 1, 3, 4, 6, 16, 63, -1, 2.5, 2**31, 10**400, 1e400, "16", "exact", "product", "bfloat16"])


@SOME
@given(leaf=st.sampled_from(EXPORT_LEAVES), value=SIZES | TEXTS | st.none() | st.booleans())
def test_any_values_in_the_description_of_an_export(leaf, value, copy, exported):
    write_json(copy / "memory.json", changed(exported / "memory.json", leaf, value))
    read_or_refuse(lambda: load_export(copy))


DTYPES = st.sampled_from([np.float32, np.float16, np.int32, np.int64, np.uint8, np.bool_, np.float64])
ARRAYS = st.builds(
    lambda shape, dtype, value: np.full(shape, value, dtype),
    st.lists(st.integers(0, 3), max_size=3) | st.sampled_from([[6], [32], [32, 16], [6, 2, 48]]),
    DTYPES,
    st.integers(0, 1),
)


@SOME
@given(start=FILES, data=st.binary(max_size=12))
def test_any_bytes_for_the_tensors_of_an_export(start, data, copy):
    (copy / "memory.safetensors").write_bytes(start + data)
    assert read_or_refuse(lambda: load_export(copy)) is None


@SOME
@given(name=st.sampled_from(["expert_ids_S", "down_SR", "up_SR", "mean_D", "transform_DC"]), array=ARRAYS)
def test_any_tensor_of_an_export(name, array, copy, exported):
    tensors = load_file(exported / "memory.safetensors")
    (copy / "memory.safetensors").write_bytes(save({**tensors, name: array}))
    found = read_or_refuse(lambda: load_export(copy))
    assert found is None or tensors[name].shape == array.shape and tensors[name].dtype == array.dtype


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["down_SR", "up_SR", "mean_D", "transform_DC"])
def test_no_number_in_the_tensors_of_an_export(name, value, copy, exported):
    tensors = load_file(exported / "memory.safetensors")
    tensors[name].reshape(-1)[-1] = value
    (copy / "memory.safetensors").write_bytes(save(tensors))
    assert read_or_refuse(lambda: load_export(copy)) is None
