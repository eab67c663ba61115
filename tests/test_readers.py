"""Whatever bytes and whatever JSON the files of a checkpoint hold: it is read, or refused in one line."""

import json
import shutil

import checkpoints
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamini_jax.backbone import tokenizer as tokenizers
from lamini_jax.backbone.checkpoints import _config_json, _config_keys, _safetensors, huggingface, load_whole
from lamini_jax.errors import BAD_INPUT, UserError

OPTIONS = {"deadline": None, "database": None, "derandomize": True}
OPTIONS["suppress_health_check"] = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
MANY, SOME = settings(max_examples=100, **OPTIONS), settings(max_examples=30, **OPTIONS)

# JSON as Python's reader takes it: with NaN and infinities, whole numbers of any size, halves of surrogate pairs.
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 4, -1, 64.0, 1e400, 10**400, 2**31, 2**63])
TEXTS = st.text(st.characters(codec=None), max_size=12)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
# Bytes, and what begins like JSON.
CONTENTS = st.binary(max_size=200) | st.builds(lambda depth: b"[" * depth, st.sampled_from([5, 900, 100_000]))
CONTENTS |= st.builds(lambda digits: b'{"a": ' + b"9" * digits + b"}", st.sampled_from([20, 5000]))


def read_or_refuse(read, *statuses):
    """What it reads; None if it refuses, in one line and with one of these statuses (else that of bad input)."""
    try:
        return read()
    except UserError as error:
        assert error.status in (statuses or (BAD_INPUT,)) and str(error).isprintable(), repr(str(error))
        assert len(str(error)) < 1000
        return None


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return checkpoints.make(tmp_path_factory.mktemp("original") / "checkpoint", "qwen3")


@pytest.fixture(scope="module")
def directory(original, tmp_path_factory):
    """A checkpoint whose files the tests of this module write anew each time."""
    return shutil.copytree(original, tmp_path_factory.mktemp("strange") / "checkpoint")


def write_json(path, value):
    path.write_text(json.dumps(value))


READ_KEYS = sorted(key for key, rule in _config_keys.RULES.items() if rule.verdict == "read")
ROPE_KEYS = [*_config_json._ROPE_KINDS, *_config_json._ROPE_NEUTRAL]
ROPE = st.dictionaries(
    st.sampled_from(ROPE_KEYS) | TEXTS, VALUES | st.sampled_from(["linear", "llama3", 2.0]), max_size=5
)
CONFIGS = st.dictionaries(st.sampled_from(READ_KEYS) | TEXTS, VALUES | ROPE, max_size=4)


@MANY
@given(content=CONTENTS)
def test_any_bytes_for_a_config(content, directory):
    (directory / "config.json").write_bytes(content)
    read_or_refuse(lambda: _config_json.read(directory / "config.json"))


@MANY
@given(changes=CONFIGS, model_type=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
def test_any_values_in_a_config(changes, model_type, directory, original):
    values = json.loads((original / "config.json").read_text())
    write_json(directory / "config.json", {**values, "model_type": model_type, **changes})
    read_or_refuse(lambda: _config_json.read(directory / "config.json"))


@SOME
@given(changes=st.dictionaries(st.sampled_from(READ_KEYS), st.integers(0, 9) | NUMBERS | st.none(), max_size=2))
def test_any_numbers_in_a_config_beside_weights(changes, directory, original):
    """Sizes that are not the tensors' are found out before anything is allocated."""
    values = json.loads((original / "config.json").read_text())
    write_json(directory / "config.json", {**values, **changes})
    read_or_refuse(lambda: load_whole(str(directory), max_seq_len=1))


def header(content: bytes, length=None) -> bytes:
    """The beginning of a safetensors file."""
    return (len(content) if length is None else length).to_bytes(8, "little") + content


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "F8_E4M3", "BOOL", "F4"]) | VALUES,
        "shape": st.lists(st.integers(0, 3) | NUMBERS, max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(0, 64) | NUMBERS, min_size=2, max_size=2) | VALUES,
    }
)
NAMES = st.sampled_from(["__metadata__", "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]) | TEXTS
HEADERS = st.dictionaries(NAMES, ENTRY | VALUES, max_size=3).map(lambda value: json.dumps(value).encode())
FILES = st.binary(max_size=100) | st.builds(header, HEADERS, st.none() | st.integers(0, 2**64 - 1))
WHOLE = st.integers(0, 3).map(lambda size: {"dtype": "F16", "shape": [size], "data_offsets": [0, 2 * size]})
FILES |= st.dictionaries(NAMES, WHOLE, max_size=1).map(lambda value: header(json.dumps(value).encode()))


@MANY
@given(start=FILES, data=st.binary(max_size=12))
def test_any_bytes_for_weights(start, data, directory):
    (directory / "model.safetensors").write_bytes(start + data)
    (directory / "config.json").write_text("{}")
    read_or_refuse(lambda: huggingface.fingerprint(str(directory)))


FILE_NAMES = st.sampled_from(["model.safetensors", "model-00001-of-00002.safetensors", "../x.safetensors"]) | TEXTS


@MANY
@given(
    content=CONTENTS
    | st.dictionaries(
        st.sampled_from(["weight_map", "metadata"]), VALUES | st.dictionaries(NAMES, FILE_NAMES | VALUES)
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_index(content, tmp_path_factory):
    directory = tmp_path_factory.mktemp("index")
    (directory / "model.safetensors.index.json").write_bytes(content)
    assert read_or_refuse(lambda: _safetensors.find(directory)) is None


# Pieces of templates, and of what templates are given.
PIECES = st.sampled_from(
    [
        *("{% if x %}", "{% endif %}", "{% for m in messages %}", "{% endfor %}", "{% break %}", "{% set x = 1 %}"),
        *("{% generation %}", "{% endgeneration %}", "{% macro f() %}", "{% endmacro %}", "{{ f() }}", "{% raw %}"),
        *("{{ messages }}", "{{ messages[0].content }}", "{{ messages | tojson }}", "{{ 1 | tojson(indent=x) }}"),
        *(
            "{{ strftime_now('%Y') }}",
            "{{ strftime_now(1) }}",
            "{{ raise_exception(x) }}",
            "{{ eos_token }}",
            "{{ 1/0 }}",
        ),
        *(
            "{{ messages.__class__ }}",
            "{% extends x %}",
            "{% include 'a' %}",
            "{{ m.content }}",
            "{{",
            "{%-",
            "#}",
            "'",
        ),
    ]
)
TEMPLATES = st.lists(PIECES | TEXTS, max_size=8).map("".join)


def use_tokenizer(directory):
    tokenizer = tokenizers.load(directory, 416)
    tokenizer.prompt("Who?")
    tokenizer.completion("Me")
    tokenizer.save(directory.with_name("saved"))


@MANY
@given(
    changes=st.dictionaries(
        st.sampled_from(["chat_template", "eos_token", "pad_token", "bos_token", "unk_token"]) | TEXTS,
        VALUES | TEMPLATES | st.lists(st.fixed_dictionaries({"name": VALUES, "template": VALUES}), max_size=2),
        max_size=4,
    ),
    eos=VALUES,
)
def test_any_values_in_a_tokenizers_config(changes, eos, directory, original):
    directory.with_name("saved").mkdir(exist_ok=True)
    values = json.loads((original / "tokenizer_config.json").read_text())
    write_json(directory / "tokenizer_config.json", {**values, **changes})
    write_json(directory / "generation_config.json", {"eos_token_id": eos})
    read_or_refuse(lambda: use_tokenizer(directory))


@MANY
@given(template=TEMPLATES)
def test_any_template(template, original, tmp_path_factory):
    directory = tmp_path_factory.mktemp("template")
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(original / name, directory)
    settings = json.loads((original / "tokenizer_config.json").read_text())
    write_json(directory / "tokenizer_config.json", {**settings, "chat_template": template})
    for system in ("", "Be brief."):
        read_or_refuse(lambda system=system: tokenizers.load(directory, 416, system).prompt("Who?"))


@SOME
@given(
    content=CONTENTS | VALUES.map(lambda value: json.dumps({"model": value}).encode()),
    name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]),
)
def test_any_bytes_for_a_tokenizer(content, name, original, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    for path in original.glob("*.json"):
        shutil.copy(path, directory)
    (directory / name).write_bytes(content)
    read_or_refuse(lambda: tokenizers.load(directory, 416))
