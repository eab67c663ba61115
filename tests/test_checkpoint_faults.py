"""Faults of checkpoints by their kinds: each is refused in one line that names the file and what is wrong in it."""

import math
import shutil

import checkpoints
import helpers
import kinds
import ml_dtypes
import numpy as np
import pytest
from checkpoints import ABSENT, edit
from refusals import refuse
from safetensors.numpy import load_file

from lamini_jax.backbone.checkpoints import _config_keys, _safetensors, huggingface, load_whole
from lamini_jax.config import BackboneConfig
from lamini_jax.errors import BAD_INPUT, UserError

BIG = 10**400  # of which no float can be made


def numbers(key, *values):
    """Instances of a key with values that it cannot have."""
    return {f"{key} {index}": ({key: value}, [key]) for index, value in enumerate(values)}


def keys(**values):
    return {key: ({key: value}, [key]) for key, value in values.items()}


def rope(**changes):
    return {"rope_scaling": {"rope_type": "llama3", **checkpoints._LLAMA3_SCALING, **changes}}


# kind -> instance -> (changes of config.json, words of the message)
CONFIGS = {
    "config.json: a wrong type": {
        **numbers("rms_norm_eps", None, "1e-5", True, [1e-5], {}),
        **numbers("max_position_embeddings", "512", 512.0, True, [512]),
        **numbers("hidden_size", "64", 64.0, None, True),
        **numbers("num_hidden_layers", "two", None, {}),
        **numbers("num_key_value_heads", "2", False),
        **numbers("rope_theta", "10000", [1.0], True),
        **numbers("tie_word_embeddings", "false", 0, 1),
        **numbers("rope_scaling", "linear", 2.0, [4.0]),
        **numbers("layer_types", "full_attention", [1, 2]),
        **numbers("model_type", None, 1, ["llama"]),
        **numbers("hidden_act", None, 1),
        **numbers("attention_bias", "no", 0),
        **numbers("sliding_window", "4096", 4096.0),
    },
    "config.json: out of range": {
        **numbers("vocab_size", 0, -1, BIG),
        **numbers("rms_norm_eps", -1e-5, math.nan, math.inf, BIG),
        **numbers("rope_theta", 0, -1.0, math.nan, BIG),
        **numbers("num_attention_heads", 0, 3),
        **numbers("num_key_value_heads", 3, 0),
        **numbers("head_dim", 0, 15),
    },
    "config.json: missing": {
        **keys(vocab_size=ABSENT, intermediate_size=ABSENT, num_attention_heads=ABSENT, model_type=ABSENT)
    },
    "config.json: scales": keys(
        attention_multiplier=0.5, logit_scale=0.1, scale_emb=12, query_pre_attn_scalar=256, scale_depth=1.4
    ),
    "config.json: caps": keys(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, clip_qkv=8.0),
    "config.json: positions": keys(
        partial_rotary_factor=0.5,
        rotary_pct=0.25,
        use_alibi=True,
        rope_interleaved=True,
        no_rope_layers=[1, 0],
        use_rope=False,
    ),
    "config.json: attention": keys(
        attention_bias=True, attention_chunk_size=8192, is_causal=False, qk_norm=True, kv_lora_rank=512, qkv_bias=True
    ),
    "config.json: quantized": keys(quantization_config={"quant_method": "gptq", "bits": 4}, load_in_4bit=True),
    "config.json: experts": keys(num_local_experts=8, num_experts_per_tok=2, moe_intermediate_size=96),
    "config.json: norms and activations": keys(
        hidden_act="gelu", mlp_bias=True, layer_norm_eps=1e-5, use_parallel_residual=True
    ),
    "config.json: more than a decoder": keys(
        vision_config={"depth": 2}, is_encoder_decoder=True, auto_map={"AutoModel": "model.Mine"}
    ),
    "config.json: not understood": {
        **keys(surprise=1, another=True, something=[1], thing={"a": 1}),
        "two lines": ({"two\nlines": 1}, ["two\\nlines"]),
        "half of a character": ({"\ud800": "\ud800"}, ["ud800"]),
    },
    "config.json: rotary scaling": {
        "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}}, ["rope_scaling", "yarn"]),
        "kind": (rope(rope_type=["llama3"]), ["rope_scaling.rope_type"]),
        "factor": (rope(factor="8"), ["rope_scaling.factor", '"8"']),
        "zero factor": (rope(factor=0), ["rope_scaling.factor"]),
        "no factor": (rope(factor=None), ["rope_scaling", "factor"]),
        "frequencies": (rope(low_freq_factor=4.0), ["rope_scaling.low_freq_factor", "4.0"]),
        "original": (rope(original_max_position_embeddings=32.5), ["rope_scaling.original_max_position_embeddings"]),
        "attention factor": (rope(attention_factor=0.8), ["rope_scaling.attention_factor", "0.8"]),
        "two of them": (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"factor": 4}},
            ["rope_scaling and rope_parameters", "factor"],
        ),
    },
}
DOWN, NORM, EMBEDDING = "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
SHARD = "model-0000{}-of-00003.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def spoil(name, value, storage=np.float32):
    """One number of a tensor, the last, is another; all are stored in this format."""

    def damage(directory):
        weights = {key: tensor.astype(storage) for key, tensor in load_file(directory / SINGLE).items()}
        weights[name].reshape(-1)[-1] = value
        checkpoints.save_weights(directory, weights)

    return damage


def in_shards(damage, index=True):
    """Three shards in place of one file, an index or none, and then some damage."""

    def make(directory):
        weights = load_file(directory / SINGLE)
        (directory / SINGLE).unlink()
        checkpoints.save_weights(directory, weights, shards=3)
        if not index:
            (directory / INDEX).unlink()
        damage(directory)

    return make


def without(*names):
    return lambda directory: [(directory / name).unlink() for name in names]


def renamed(name, other):
    return lambda directory: (directory / name).rename(directory / other)


def two_sets(directory):
    checkpoints.save_weights(directory, load_file(directory / SHARD.format(1)), shards=2)
    (directory / INDEX).unlink()


def map_to(file):
    return lambda directory: edit(directory / INDEX, weight_map={EMBEDDING: file})


def text(name, content):
    return lambda directory: (directory / name).write_text(content)


def settings(**changes):
    return lambda directory: edit(directory / "tokenizer_config.json", **changes)


def generation(value):
    return lambda directory: edit(directory / "generation_config.json", eos_token_id=value)


TOKENS, GENERATION = "tokenizer_config.json", "generation_config.json"
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ messages[0].content }} {{ messages[1].content }}"
)
# kind -> instance -> (what happened to the directory, words of the message)
FILES = {
    "weights: NaN and infinity": {
        "NaN": (spoil(DOWN, math.nan), [SINGLE, DOWN, "NaN"]),
        "infinity": (spoil(NORM, math.inf), [SINGLE, NORM]),
        "in the embedding": (spoil(EMBEDDING, -math.inf), [SINGLE, EMBEDDING]),
        "in bfloat16": (spoil(DOWN, math.nan, ml_dtypes.bfloat16), [SINGLE, DOWN]),
        "in float16": (spoil(DOWN, math.inf, np.float16), [SINGLE, DOWN]),
        "in float64": (spoil(DOWN, math.nan, np.float64), [SINGLE, DOWN]),
        "beyond float32": (spoil(DOWN, 1e300, np.float64), [SINGLE, DOWN]),
        "in a shard": (
            lambda d: (spoil(NORM, math.nan)(d), in_shards(lambda d: None)(d)),
            [SHARD.format(3), NORM],
        ),
    },
    "weights: shards": {
        "first missing": (in_shards(without(SHARD.format(1))), [SHARD.format(1), INDEX]),
        "last missing, no index": (in_shards(without(SHARD.format(3)), index=False), [SHARD.format(3)]),
        "middle missing, no index": (in_shards(without(SHARD.format(2)), index=False), [SHARD.format(2)]),
        "two sets": (in_shards(two_sets, index=False), ["of-00002", "of-00003"]),
        "one empty": (in_shards(text(SHARD.format(2), ""), index=False), [SHARD.format(2)]),
    },
    "weights: index": {
        "not JSON": (in_shards(text(INDEX, "{")), [INDEX]),
        "empty": (in_shards(text(INDEX, '{"weight_map": {}}')), [INDEX, "weight_map"]),
        "a list": (in_shards(text(INDEX, '{"weight_map": []}')), [INDEX, "weight_map"]),
        "numbers": (in_shards(map_to(1)), [INDEX, "weight_map", "1"]),
        "elsewhere": (in_shards(map_to("../model.safetensors")), [INDEX, "../model.safetensors"]),
        "no file name": (in_shards(map_to("a\nb")), [INDEX, "a\\nb"]),
    },
    "weights: none": {
        "none": (without(SINGLE), [SINGLE]),
        "pickle": (renamed(SINGLE, "pytorch_model.bin"), ["pytorch_model.bin", "pickle"]),
        "adapter": (renamed(SINGLE, "adapter_model.safetensors"), ["adapter"]),
        "under other names": (renamed(SINGLE, "consolidated.safetensors"), [SINGLE, "consolidated.safetensors"]),
        "a directory": (lambda d: ((d / SINGLE).unlink(), (d / SINGLE).mkdir()), [SINGLE]),
    },
    "tokenizer": {
        "eos a number": (settings(eos_token=2), [TOKENS, "eos_token"]),
        "eos without text": (settings(eos_token={"content": 3}), [TOKENS, "eos_token"]),
        "pad a list": (settings(pad_token=["<pad>"]), [TOKENS, "pad_token"]),
        "stop a text": (generation("2"), [GENERATION, "eos_token_id"]),
        "stop true": (generation(True), [GENERATION, "eos_token_id"]),
        "stop negative": (generation([-1]), [GENERATION, "eos_token_id", "-1"]),
        "stops in a list": (generation([[2]]), [GENERATION, "eos_token_id"]),
        "stop beyond": (lambda d: (settings(eos_token=None)(d), generation(416)(d)), ["eos_token_id", "416"]),
    },
    "chat template": {
        "a number": (settings(chat_template=3), ["chat template"]),
        "an object": (settings(chat_template={"default": "x"}), ["chat template"]),
        "several, one a number": (settings(chat_template=[{"name": "default", "template": 3}]), ["chat template"]),
        "several, one without": (settings(chat_template=[{"name": "default"}]), ["chat template"]),
        "without the question": (settings(chat_template="{{ bos_token }}Hello"), ["leaves out the question"]),
        "first of messages": (settings(chat_template="{{ messages[0].role }}"), ["leaves out the question"]),
        "needs a system message": (settings(chat_template=NEEDS_SYSTEM), ["--config.backbone.system="]),
        "open block": (settings(chat_template="{% generation %}{{ messages[0].content }}"), ["chat template", "fails"]),
        "not JSON": (settings(chat_template="{{ [messages[0].content, x] | tojson }}"), ["chat template", "fails"]),
        "no time": (
            settings(chat_template="{{ strftime_now(5) }}{{ messages[0].content }}"),
            ["chat template", "fails"],
        ),
    },
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return checkpoints.make(tmp_path_factory.mktemp("original") / "checkpoint", "llama")


@pytest.fixture
def directory(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoint")


def read_whole(directory, **asked):
    """All that a command reads of a checkpoint, in its order."""
    config = huggingface.resolve(BackboneConfig(path=str(directory), max_seq_len=64, **asked))
    tokenizer = huggingface.load_tokenizer(config)
    return tokenizer, load_whole(str(directory), max_seq_len=64)


def assert_refused(do, *words):
    with pytest.raises(UserError) as error:
        do()
    message = str(error.value)
    assert error.value.status == BAD_INPUT and message.isprintable() and len(message) < 500
    missing = [word for word in map(str, words) if word not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("changes, words", kinds.cases(CONFIGS))
def test_a_config_is_refused(changes, words, directory):
    edit(directory / "config.json", **changes)
    assert_refused(lambda: read_whole(directory), directory / "config.json", *words)


@pytest.mark.parametrize("damage, words", kinds.cases(FILES))
def test_files_are_refused(damage, words, directory):
    damage(directory)
    assert_refused(lambda: read_whole(directory), directory, *words)


def test_the_command_says_it_in_one_line(original, tmp_path):
    """One instance of each kind, with the status of bad input."""
    facts = helpers.write_facts(tmp_path / "facts.jsonl", helpers.some_facts(1))
    commands = []
    for number, instances in enumerate([*CONFIGS.values(), *FILES.values()]):
        directory = shutil.copytree(original, tmp_path / str(number))
        change, words = next(iter(instances.values()))
        if callable(change):
            change(directory)
        else:
            edit(directory / "config.json", **change)
        flags = [
            f"--config.backbone.path={directory}",
            "--config.memory.num_layers=1",
            "--config.memory.num_experts=64",
        ]
        commands.append(([f"--facts={facts}", f"--workdir={tmp_path / 'run'}", *flags], [directory, *words]))
    refuse("lamini_jax.tune", commands)
    assert not (tmp_path / "run").exists()


# What says nothing, and what is a matter of tools, training or generation.
HARMLESS = {
    "unsloth_fixed": True,
    "unsloth_version": "2025.3",
    "_attn_implementation_autoset": True,
    "_flash_attn_2_enabled": True,
    "_name_or_path": "someone/model",
    "transformers.js_config": {"dtype": "q4"},
    "mergekit_version": "0.1",
    "partial_rotary_factor": 1.0,
    "logits_scaling": 1,
    "attention_multiplier": 1.0,
    "quantization_config": None,
    "quantization": {},
    "num_local_experts": 0,
    "is_causal": True,
    "qk_norm": False,
    "qkv_bias": False,
    "hidden_activation": "silu",
    "hidden_act": "swish",
    "auto_map": {},
    "is_encoder_decoder": False,
    "surprise": None,
    "another": False,
    "attention_dropout": 0.1,
    "resid_pdrop": 0.1,
    "gradient_checkpointing": True,
    "router_aux_loss_coef": 0.01,
    "neftune_noise_alpha": 5,
    "use_flash_attention_2": True,
    "attn_implementation": "sdpa",
    "pretraining_tp": 4,
    "temperature": 0.6,
    "repetition_penalty": 1.1,
    "max_length": 20,
    "output_router_logits": True,
    "image_token_id": 3,
    "id2label": {"0": "a"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0, "factor": 1.0},
    "rope_scaling": {"type": "default", "attention_factor": 1.0},
    "num_key_value_heads": 2,
    "head_dim": None,
    "max_position_embeddings": None,
}


def test_what_does_not_matter_passes(original, directory):
    expected = load_whole(str(original))
    for name, value in HARMLESS.items():
        edit(directory / "config.json", **{name: value})
        config = huggingface.resolve(BackboneConfig(path=str(directory)))
        assert config == BackboneConfig(**{**vars(expected[0]), "path": str(directory)}), name
    assert helpers.same_bits(load_whole(str(directory))[1], expected[1])


def test_every_row_of_the_table_is_used(tmp_path, original):
    """No pattern is hidden by one before it, and each refuses or passes as it says."""
    for pattern, rule in _config_keys.RULES.items():
        key = pattern.replace("*", "x")
        assert _config_keys.rule_of(key) is rule, pattern
        if rule.verdict != "read":
            check = {key: 0.123}
            if rule.verdict == "harmless":
                _config_keys.check(tmp_path, check)
            else:
                assert_refused(lambda check=check: _config_keys.check(tmp_path, check), key, "0.123", rule.why)
            for value in rule.neutral:
                _config_keys.check(tmp_path, {key: value})


def test_a_window_that_is_not_used_is_none(tmp_path):
    """Null, or over no layer, as in transformers' Qwen2Config."""
    for number, changes in enumerate(
        ({"sliding_window": None}, {"max_window_layers": 2}, {"max_window_layers": ABSENT})
    ):
        directory = checkpoints.make(
            tmp_path / str(number), "qwen2", tokenizer=False, **{"use_sliding_window": True, **changes}
        )
        assert huggingface.resolve(BackboneConfig(path=str(directory))).sliding_window == 0


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings_of_json(encoding, directory, original):
    path = directory / "config.json"
    path.write_text(path.read_text(), encoding=encoding)
    found = huggingface.resolve(BackboneConfig(path=str(directory)))
    assert vars(found) | {"path": ""} == vars(huggingface.resolve(BackboneConfig(path=str(original)))) | {"path": ""}


def shard_names(directory):
    return [path.name for path in _safetensors.find(directory)]


def test_which_files_are_read(directory):
    """In this order: the whole file, the index's shards, shards that are all there."""
    weights = load_file(directory / SINGLE)
    checkpoints.save_weights(directory, weights, shards=3)
    assert shard_names(directory) == [SINGLE]
    (directory / SHARD.format(2)).unlink()  # an index of what is no longer there
    assert shard_names(directory) == [SINGLE]
    checkpoints.save_weights(directory, weights, shards=3)
    (directory / SINGLE).unlink()
    shards = [SHARD.format(number) for number in (1, 2, 3)]
    assert shard_names(directory) == shards
    (directory / INDEX).unlink()
    assert shard_names(directory) == shards
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"")  # a part of another checkpoint
    (directory / "consolidated.safetensors").write_bytes(b"")
    assert shard_names(directory) == shards
    expected = load_whole(str(directory))[1]
    checkpoints.save_weights(directory, weights)
    assert helpers.same_bits(load_whole(str(directory))[1], expected)


def test_a_download_leaves_out_what_is_not_read():
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model.safetensors", SHARD.format(1), INDEX, "tokenizer.json", "chat_template.jinja"]
    others = ["consolidated.safetensors", "pytorch_model.bin", "original/consolidated.00.pth", "adapter.safetensors"]
    assert list(filter_repo_objects(wanted + others, allow_patterns=list(huggingface._FILES))) == wanted


def test_paths_become_absolute(original, tmp_path, monkeypatch):
    """As the shell has them; a saved config then means the same from everywhere."""
    monkeypatch.chdir(original.parent.parent)
    monkeypatch.setenv("HOME", str(original.parent))
    home = original.parent.name
    for path in (
        str(original),
        f"{original}/",
        f"{home}/checkpoint",
        f"./{home}/../{home}/checkpoint/",
        "~/checkpoint",
    ):
        assert huggingface.resolve(BackboneConfig(path=path)).path == str(original), path
    link = tmp_path / "a [link] \u00e9"
    link.symlink_to(original)
    assert huggingface.resolve(BackboneConfig(path=str(link))).path == str(link)


@pytest.mark.parametrize("path", ["no/such/place", "~nobody-of-this-name/x", "x\0y", "a" * 300, "gs://bucket/model"])
def test_paths_to_nothing(path):
    assert_refused(
        lambda: huggingface.resolve(BackboneConfig(path=path)), "--config.backbone.path=", "no such directory"
    )
