"""Whatever a GGUF file holds: it is read, or refused in one line that names the file and what is wrong in it."""

import math
import sys

import checkpoints
import gguf_files
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refuse

from lamini_jax.backbone import checkpoints as formats
from lamini_jax.backbone.checkpoints import _gguf_metadata, load_whole
from lamini_jax.backbone.checkpoints import gguf as gguf_format
from lamini_jax.config import BackboneConfig
from lamini_jax.errors import BAD_INPUT, UserError

OPTIONS = {"deadline": None, "database": None, "derandomize": True, "max_examples": 150}
OPTIONS["suppress_health_check"] = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("faults") / "checkpoint"
    return checkpoints.make_preset(directory, "llama31", torch_dtype="float32")


@pytest.fixture(scope="module")
def content(directory):
    """A file without faults."""
    return gguf_files.write(directory.with_name("whole.gguf"), directory, Type.Q8_0).read_bytes()


def read_all(path):
    """Whatever a command may read of a file."""
    config, _ = load_whole(str(path))
    gguf_format.load_tokenizer(config).prompt("Who?")
    gguf_format.fingerprint(str(path))


def refusal(read):
    """The line in which it is refused; None if it is not."""
    try:
        read()
    except UserError as error:
        assert error.status == BAD_INPUT and str(error).isprintable() and len(str(error)) < 1000, repr(str(error))
        return str(error)
    return None


def says(**values):
    """Metadata of the model; None: without it."""

    def change(metadata, _):
        for key, value in values.items():
            metadata[f"llama.{key.replace('__', '.')}"] = value
        for key in [key for key, value in metadata.items() if value is None]:
            del metadata[key]

    return change


def general(**values):
    return lambda metadata, _: metadata.update({f"general.{key}": value for key, value in values.items()})


def tensor(name, array, storage=Type.F32):
    """Another tensor of this name; None: without it."""

    def change(_, tensors):
        tensors[name] = (array, storage)
        if array is None:
            del tensors[name]

    return change


def spoiled(name, value):
    """One number of a tensor is another."""

    def change(_, tensors):
        array, kind = tensors[name]
        array = array.copy()
        array.reshape(-1)[-1] = value
        tensors[name] = array, kind

    return change


def infinite_scale(_, tensors):
    array, _ = tensors["blk.0.ffn_up.weight"]
    blocks = gguf_files.gguf.quantize(array, Type.Q8_0)
    blocks[3, :2] = np.array([math.inf], np.float16).view(np.uint8)
    tensors["blk.0.ffn_up.weight"] = blocks, Type.Q8_0


def scaled_twice(metadata, _):
    metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}


def odd_heads(metadata, tensors):
    says(attention__key_length=15, rope__dimension_count=None)(metadata, tensors)
    del tensors["rope_freqs.weight"]


SQUARE = np.zeros((64, 64), np.float32)
# name -> (change of what is written, words of the message)
FAULTS = {
    "architecture": (general(architecture="gemma3"), ["architecture", '"gemma3"', "llama, qwen2, qwen3"]),
    "no model": (general(type="adapter"), ["adapter"]),
    "alignment": (general(alignment=48), ["general.alignment 48"]),
    "no layers": (says(block_count=None), ["block_count"]),
    "no context": (says(context_length=None), ["context_length"]),
    "heads in a list": (says(attention__head_count=[4, 4]), ["attention.head_count", "[4, 4]"]),
    "layers as text": (says(block_count="2"), ["block_count", '"2"']),
    "no width": (says(embedding_length=0), ["embedding_length", "0"]),
    "another width": (
        says(embedding_length=128, attention__key_length=16),
        ["token_embd.weight", "[416, 64]", "[416, 128]"],
    ),
    "many layers": (says(block_count=2**31 - 1), ["blk.2."]),
    "fewer layers": (says(block_count=1), ["blk.1."]),
    "groups": (says(attention__head_count_kv=3), ["num_key_value_heads"]),
    "odd heads": (odd_heads, ["head_dim", "15"]),
    "values of another width": (says(attention__value_length=32), ["attention.value_length", "32", "16"]),
    "partly rotated": (says(rope__dimension_count=8), ["rope.dimension_count", "8"]),
    "vocabulary": (says(vocab_size=400), ["vocab_size", "400", "416"]),
    "epsilon": (says(attention__layer_norm_rms_epsilon=math.nan), ["layer_norm_rms_epsilon", "NaN"]),
    "theta": (says(rope__freq_base=0.0), ["rope.freq_base"]),
    "experts": (says(expert_count=8), ["expert_count 8", "mixtures of experts"]),
    "yarn": (says(rope__scaling__type="yarn"), ["rope.scaling.type", "yarn"]),
    "scaled twice": (scaled_twice, ["rope_freqs.weight", "twice"]),
    "not causal": (says(attention__causal=False, attention__clamp_kqv=8.0), ["attention.clamp_kqv", "8.0"]),
    "logits scaled": (says(logit_scale=0.5), ["logit_scale", "0.5", "not understood"]),
    "unknown tensor": (tensor("blk.0.attn_gate.weight", SQUARE), ["blk.0.attn_gate.weight", "not understood"]),
    "bias of Llama": (tensor("blk.0.attn_q.bias", SQUARE[0]), ["blk.0.attn_q.bias", "not understood"]),
    "expert tensor": (tensor("blk.0.ffn_gate_exps.weight", SQUARE), ["blk.0.ffn_gate_exps.weight"]),
    "missing tensor": (tensor("blk.1.ffn_up.weight", None), ["has no tensor blk.1.ffn_up.weight"]),
    "missing embedding": (tensor("token_embd.weight", None), ["token_embd.weight"]),
    "wrong shape": (tensor("blk.1.ffn_up.weight", SQUARE), ["blk.1.ffn_up.weight", "[64, 64]", "[96, 64]"]),
    "three axes": (tensor("blk.1.ffn_up.weight", SQUARE[None]), ["blk.1.ffn_up.weight", "[1, 64, 64]"]),
    "storage": (
        tensor("blk.0.attn_q.weight", np.zeros((64, 36), np.uint8), Type.IQ4_NL),
        ["blk.0.attn_q.weight", "IQ4_NL", "Q4_K"],
    ),
    "other factors": (tensor("rope_freqs.weight", np.arange(1.0, 9, dtype=np.float32)), ["rope_freqs.weight"]),
    "factors of nothing": (tensor("rope_freqs.weight", np.zeros(8, np.float32)), ["rope_freqs.weight"]),
    "more factors": (tensor("rope_freqs.weight", np.ones(9, np.float32)), ["rope_freqs.weight", "[9]", "[8]"]),
    "NaN": (spoiled("blk.0.ffn_up.weight", math.nan), ["blk.0.ffn_up.weight", "NaN"]),
    "infinity": (spoiled("output_norm.weight", math.inf), ["output_norm.weight", "NaN or infinity"]),
    "infinite scale": (infinite_scale, ["blk.0.ffn_up.weight", "NaN or infinity"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name, directory, tmp_path):
    change, words = FAULTS[name]
    path = gguf_files.write(tmp_path / "a.gguf", directory, change=change)
    message = refusal(lambda: read_all(path))
    assert message and all(word in message for word in [str(path), *words]), message


def test_settings_that_the_file_contradicts_are_refused(directory, tmp_path):
    path = gguf_files.write(tmp_path / "a.gguf", directory)
    with pytest.raises(UserError, match="--config.backbone.mlp_dim=100: .*a.gguf says 96"):
        formats.resolve(BackboneConfig(path=str(path), mlp_dim=100))
    with pytest.raises(UserError, match="--config.backbone.max_seq_len=513: .*a.gguf allows 512"):
        formats.resolve(BackboneConfig(path=str(path), max_seq_len=513))


def test_the_directory_of_a_file_is_no_checkpoint(directory, tmp_path):
    path = gguf_files.write(tmp_path / "a.gguf", directory)
    with pytest.raises(UserError, match=f"to read a.gguf, give its own path: {path}"):
        formats.resolve(BackboneConfig(path=str(tmp_path)))


def test_silent_keys_change_nothing(directory, tmp_path):
    values = {"expert_count": 0, "attention__causal": True, "rope__scaling__type": "none", "logit_scale": 0.0}
    path = gguf_files.write(tmp_path / "a.gguf", directory, change=says(**values))
    assert formats.resolve(BackboneConfig(path=str(path))).num_layers == 2


def test_a_window_of_qwen_is_refused(tmp_path):
    """There, it would be of some layers only."""
    directory = checkpoints.make_preset(tmp_path / "checkpoint", "qwen2", tokenizer=False)

    def change(metadata, _):
        metadata["qwen2.attention.sliding_window"] = 8

    path = gguf_files.write(tmp_path / "a.gguf", directory, change=change)
    assert "attention.sliding_window 8 is not understood" in refusal(lambda: read_all(path))


def test_equal_factors_are_linear_scaling(directory, tmp_path):
    path = gguf_files.write(
        tmp_path / "a.gguf", directory, change=tensor("rope_freqs.weight", np.full(8, 4, np.float32))
    )
    config = formats.resolve(BackboneConfig(path=str(path)))
    assert (config.rope_scaling, config.rope_factor) == ("linear", 4.0)
    change = tensor("rope_freqs.weight", np.ones(8, np.float32))
    config = formats.resolve(BackboneConfig(path=str(gguf_files.write(tmp_path / "b.gguf", directory, change=change))))
    assert config.rope_scaling == "none"


def parts(metadata, _):
    metadata |= {"split.count": 3, "split.no": 0}


# name -> (bytes of the file made from those of a whole one, words of the message)
DAMAGE = {
    "empty": (lambda content: b"", ["is not a GGUF file"]),
    "magic": (lambda content: b"GGML" + content[4:], ["is not a GGUF file"]),
    "four bytes": (lambda content: content[:4], ["truncated"]),
    "version": (lambda content: content[:4] + b"\1\0\0\0" + content[8:], ["version 1", "2 and 3"]),
    "big-endian": (lambda content: content[:4] + b"\0\0\0\3" + content[8:], ["big-endian"]),
    "many tensors": (lambda content: content[:8] + b"\xff" * 8 + content[16:], ["download it again"]),
    "many values": (lambda content: content[:16] + b"\xff" * 8 + content[24:], ["download it again"]),
    "half of the header": (lambda content: content[:5000], ["truncated", "5,000 bytes"]),
    "half of the weights": (lambda content: content[: len(content) * 2 // 3], ["truncated"]),
    "one byte less": (lambda content: content.rstrip(b"\0")[:-1], ["truncated"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, content, tmp_path):
    damage, words = DAMAGE[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(damage(content))
    message = refusal(lambda: read_all(path))
    assert message and all(word in message for word in [str(path), *words]), message


def test_every_refusal_of_a_command_is_one_line(content, directory, tmp_path):
    """With status 2, and no traceback, whichever part of a command finds it."""
    cases = []
    for name in ("architecture", "missing tensor", "storage", "NaN", "infinite scale", "experts"):
        change, words = FAULTS[name]
        path = gguf_files.write(tmp_path / f"{len(cases)}.gguf", directory, change=change)
        cases.append((path, words))
    for name in ("empty", "half of the header", "half of the weights"):
        path = tmp_path / f"{len(cases)}.gguf"
        path.write_bytes(DAMAGE[name][0](content))
        cases.append((path, DAMAGE[name][1]))
    cases.append((gguf_files.write(tmp_path / "part.gguf", directory, change=parts), ["llama-gguf-split --merge"]))
    cases.append((tmp_path / "missing.gguf", ["No such file"]))
    (tmp_path / "facts.jsonl").write_text('{"question": "Who?", "answer": "me"}\n')
    arguments = [f"--facts={tmp_path}/facts.jsonl", f"--workdir={tmp_path}/run"]
    refuse(
        "lamini_jax.tune",
        [([*arguments, f"--config.backbone.path={path}", "--config.memory.num_layers=1"], w) for path, w in cases],
    )


def test_without_the_library_plain_numbers_are_read_and_others_say_what_to_install(directory, content, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    plain = gguf_files.write(tmp_path / "plain.gguf", directory, Type.F16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        read_all(plain)
        message = refusal(lambda: read_all(path))
    assert "pip install gguf" in message and str(path) in message


@settings(**OPTIONS)
@given(data=st.data())
def test_any_bytes_in_the_header(data, content, tmp_path_factory):
    """Some bytes of the header are others: the file is another model, or refused."""
    header = content.index(b"blk.1.ffn_up.weight") + 200
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, header) | st.integers(0, 1200))
        piece = data.draw(
            st.binary(min_size=1, max_size=8) | st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\xff\xff\xff"])
        )
        changed[start : start + len(piece)] = piece
    read_or_refuse(bytes(changed), tmp_path_factory)


@settings(**OPTIONS)
@given(data=st.data())
def test_any_beginning_of_a_file(data, content, tmp_path_factory):
    end = data.draw(st.integers(0, len(content) - 64) | st.integers(0, 2000))
    assert read_or_refuse(content[:end], tmp_path_factory)


@settings(**OPTIONS)
@given(data=st.binary(max_size=300))
def test_any_bytes_after_the_magic(data, tmp_path_factory):
    read_or_refuse(b"GGUF" + data, tmp_path_factory)
    read_or_refuse(b"GGUF\3\0\0\0" + data, tmp_path_factory)


KEYS = [*_gguf_metadata._KEYS, *_gguf_metadata._CHECKED, *_gguf_metadata._HARMLESS, "rope.scaling.type", "other"]
KEYS = [*map("llama.{}".format, [*KEYS, "rope.scaling.factor", "attention.sliding_window", "expert_count"])]
KEYS += map("tokenizer.ggml.{}".format, "model pre tokens token_type merges scores eos_token_id add_bos_token".split())
KEYS += ["general.architecture", "general.alignment", "general.type", "split.count", "tokenizer.chat_template"]
NUMBERS = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2, 4, 16]) | st.floats(width=32)
TEXTS = st.text(max_size=12) | st.sampled_from(["llama", "gpt2", "qwen2", "linear", "{{ x }}"])
VALUES = st.booleans() | NUMBERS | TEXTS | st.lists(TEXTS, min_size=1, max_size=3)
VALUES |= st.lists(st.integers(0, 9), min_size=1, max_size=3) | st.lists(st.floats(width=32), min_size=1, max_size=3)


@settings(**OPTIONS)
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_any_values_in_the_metadata(changes, directory, tmp_path_factory):
    path = strange(tmp_path_factory)
    gguf_files.write(path, directory, change=lambda metadata, _: metadata.update(changes))
    refusal(lambda: read_as_far_as_weights(path))


def read_or_refuse(content, tmp_path_factory):
    path = strange(tmp_path_factory)
    path.write_bytes(content)
    return refusal(lambda: read_as_far_as_weights(path))


def strange(tmp_path_factory):
    """A path without a file."""
    path = tmp_path_factory.getbasetemp() / "strange.gguf"
    path.unlink(missing_ok=True)
    return path


def read_as_far_as_weights(path):
    config = gguf_format.resolve(BackboneConfig(path=str(path)))
    gguf_format._tensors(config)
    gguf_format.load_tokenizer(config).prompt("Who?")
