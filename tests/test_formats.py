"""Every format of checkpoints and every family of models has the whole interface, and a new one is a new file."""

import inspect
import sys

import pytest

from lamini_jax.backbone import checkpoints
from lamini_jax.backbone.checkpoints import FORMATS, families
from lamini_jax.backbone.checkpoints.families import FAMILIES
from lamini_jax.config import BackboneConfig
from lamini_jax.errors import UserError

FORMAT = {
    "recognizes": ["path"],
    "resolve": ["asked"],
    "load_split": ["decoder"],
    "load_whole": ["path", "dtype", "max_seq_len"],
    "load_tokenizer": ["config"],
    "fingerprint": ["path"],
    "export": ["config", "directory"],
}
FAMILY = {"block_fields": ["values"], "extra_values": ["config"]}


def assert_has(module, interface):
    for name, parameters in interface.items():
        assert list(inspect.signature(getattr(module, name)).parameters) == parameters, name


@pytest.mark.parametrize("name", FORMATS.names())
def test_a_format_has_the_interface(name):
    assert_has(FORMATS[name], FORMAT)


@pytest.mark.parametrize("name", FAMILIES.names())
def test_a_family_has_the_interface(name):
    family = FAMILIES[name]
    assert_has(family, FAMILY)
    values = {"sliding_window": None, **family.DEFAULTS}
    fields = family.block_fields(values)
    assert list(fields) == ["qkv_bias", "qk_norm", "sliding_window"]
    config = BackboneConfig(family=name, **fields)
    assert family.block_fields({**values, **family.extra_values(config)}) == fields
    assert family.ARCHITECTURE.endswith("ForCausalLM")


def test_the_interfaces_are_documented():
    for package, interface in ((checkpoints, FORMAT), (families, FAMILY)):
        for name, parameters in interface.items():
            assert f"{name}({', '.join(parameters)}) -> " in package.__doc__


def test_each_path_has_one_format():
    for path, name in {"": "shipped", "/no/directory": "huggingface", "meta-llama/Llama-3.1-8B": "huggingface"}.items():
        assert checkpoints.format_of(path) is FORMATS[name]
    with pytest.raises(UserError, match="^--config.backbone.path=/no/directory: no such directory"):
        checkpoints.resolve(BackboneConfig(path="/no/directory"))


def test_a_new_file_is_a_new_format(tmp_path, monkeypatch):
    """Nothing else knows of it, not even where its name comes after that of the format that takes what is left."""
    (tmp_path / "zipped.py").write_text(
        "import dataclasses\n\n\n"
        "def recognizes(path):\n    return path.endswith('.zip')\n\n\n"
        "def resolve(asked):\n    return dataclasses.replace(asked, vocab_size=7)\n"
    )
    monkeypatch.setattr(checkpoints, "__path__", [*checkpoints.__path__, str(tmp_path)])
    monkeypatch.setattr(checkpoints.__spec__, "submodule_search_locations", checkpoints.__path__)
    monkeypatch.delitem(sys.modules, "lamini_jax.backbone.checkpoints.zipped", raising=False)
    assert checkpoints.resolve(BackboneConfig(path="model.zip")).vocab_size == 7
    monkeypatch.delattr(checkpoints, "zipped")
