"""What is exported answers as what was tuned does, elsewhere too, and is refused where it would not."""

import dataclasses
import json
import shutil
from typing import NamedTuple

import checkpoints
import helpers
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import reference
from reference import relative_error
from safetensors.numpy import load_file, save_file

from lamini_jax import exports
from lamini_jax.api import Source
from lamini_jax.backbone import answering, frozen_model, transformer
from lamini_jax.backbone import checkpoints as formats
from lamini_jax.backbone.checkpoints import huggingface, shipped
from lamini_jax.config import BackboneConfig, Config, to_config_dict
from lamini_jax.configure import configure
from lamini_jax.errors import BAD_INPUT, FACTS_DO_NOT_HOLD, OTHER_RUN, UserError
from lamini_jax.memories import ExpertMemory
from lamini_jax.memory import experts, routers, storage

QUESTIONS = ["Who?", "What is 12 plus 34?", "Where is the red box of Ada Stone, and why?", "\u00dcber was?"]
CONFIG = helpers.replace(helpers.CONFIG, memory={"num_experts": 1024, "top_k": 4}, tuning={"epochs": 60})


class World(NamedTuple):
    """A random checkpoint, and a memory as tuning might have left it: random rows for the experts of QUESTIONS."""

    directory: object
    config: object
    model: frozen_model.FrozenModel
    memory: storage.StoredMemory
    expert_ids_FK: np.ndarray


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = checkpoints.make(tmp_path_factory.mktemp("world") / "checkpoint", "llama", num_hidden_layers=3)
    asked = BackboneConfig(path=str(directory), max_seq_len=96)
    config = configure(to_config_dict(dataclasses.replace(CONFIG, backbone=asked)))
    model, router = frozen_model.load(config), helpers.random_router(config)
    expert_ids_FK = routers.select_facts(model, router, QUESTIONS, config.memory.top_k).expert_ids_FK
    ids_S = np.unique(expert_ids_FK)
    return World(directory, config, model, random_memory(config, model, router, ids_S), expert_ids_FK)


def random_memory(config, model, router, ids_S):
    rng, shape = np.random.default_rng(0), experts.expert_shape(config.backbone, config.memory)
    experts_SR = {
        name: jnp.asarray(rng.normal(size=part) * part[-1] ** -0.5, config.memory.dtype)
        for name, part in shape.parts(ids_S.size).items()
    }
    return storage.StoredMemory(router, jnp.asarray(ids_S), experts_SR, model.fingerprint)


def said(world, tuned, questions=QUESTIONS):
    """Everything there is to an answer: text, probability, experts."""
    adapter_fn = storage.adapter_fn(world.model, tuned, world.config)
    answers = dict(answering.ask(world.model, adapter_fn, questions, max_new_tokens=12))
    for number, answer in answers.items():
        answers[number] = answer._replace(selection=answer.selection.expert_ids_BK.tolist())
    return answers


def written(world, directory, tuned=None, expert_ids=None):
    """A memory written and read again."""
    directory.mkdir()
    storage.save_export(directory, world.config, tuned or world.memory, expert_ids)
    return storage.load_export(storage.export_config(directory), directory)


def assert_one_line(do, *words, status=BAD_INPUT):
    with pytest.raises(UserError) as error:
        do()
    message = str(error.value)
    assert error.value.status == status and "\n" not in message
    assert all(str(word) in message for word in words), message


def test_a_memory_says_the_same_after_export(world, tmp_path):
    again = written(world, tmp_path / "out")
    assert storage.export_config(tmp_path / "out") == world.config
    expected = said(world, world.memory)
    assert said(world, again) == expected
    texts = [expected[number].text for number in range(len(QUESTIONS))]
    assert texts != answering.answers(world.model, answering.BARE, QUESTIONS, max_new_tokens=12)
    other = jax.tree.map(lambda table_SX: 1.01 * table_SX, world.memory.experts_SR)
    assert said(world, dataclasses.replace(world.memory, experts_SR=other)) != expected


def test_rows_in_bfloat16_stay_what_they_are(world, tmp_path):
    config = helpers.replace(world.config, memory={"dtype": "bfloat16"})
    tuned = random_memory(config, world.model, world.memory.router, np.asarray(world.memory.expert_ids_S))
    again = written(world._replace(config=config), tmp_path / "out", tuned)
    assert helpers.same_bits(again.experts_SR, tuned.experts_SR)


def test_some_questions_need_their_experts_alone(world, tmp_path):
    chosen = [2, 0]
    ids = world.expert_ids_FK[chosen]
    again = written(world, tmp_path / "out", expert_ids=ids)
    assert set(np.asarray(again.expert_ids_S).tolist()) == set(ids.ravel().tolist())
    assert len(np.asarray(again.expert_ids_S)) < len(np.asarray(world.memory.expert_ids_S))
    assert load_file(tmp_path / "out" / "memory.safetensors")["up_SR"].shape[0] == np.unique(ids).size
    questions = 2 * [QUESTIONS[number] for number in chosen]  # as many as elsewhere, so that nothing compiles anew
    assert said(world, again, questions) == said(world, world.memory, questions)


def test_untrained_experts_add_nothing(world, tmp_path):
    """A question that shares no expert with any fact is answered by the backbone, by an empty file too."""
    again = written(world, tmp_path / "out", expert_ids=np.array([], int))
    texts = [said(world, again)[number].text for number in range(len(QUESTIONS))]
    assert texts == answering.answers(world.model, answering.BARE, QUESTIONS, max_new_tokens=12)


def test_a_memory_of_another_backbone_is_refused(world, tmp_path):
    """Also one of the same shape, and whatever was trained further."""
    directory = shutil.copytree(world.directory, tmp_path / "other")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 1e-3
    checkpoints.save_weights(directory, weights)
    found = huggingface.fingerprint(directory)
    other = dataclasses.replace(world.model, fingerprint=found)
    words = (found, world.model.fingerprint, "another backbone")
    assert_one_line(lambda: storage.adapter_fn(other, world.memory, world.config), *words)


def change_tensors(directory, **changes):
    tensors = {**load_file(directory / "memory.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "memory.safetensors")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


TENSORS, DESCRIPTION = "memory.safetensors", "memory.json"
# kind -> instance -> (what happened to an exported memory, the words of the message)
DAMAGES = {
    "exports: memory.json": {
        "no directory": (lambda d: d.rename(d.with_name("elsewhere")), ["--memory=", "lamini_jax.export"]),
        "no description": (lambda d: (d / DESCRIPTION).unlink(), ["--memory=", "lamini_jax.export"]),
        "description truncated": (lambda d: truncate(d / DESCRIPTION), [DESCRIPTION]),
        "description empty": (lambda d: (d / DESCRIPTION).write_text("{}"), [DESCRIPTION]),
        "description an array": (lambda d: (d / DESCRIPTION).write_text("[1]"), [DESCRIPTION]),
        "description not text": (lambda d: (d / DESCRIPTION).write_bytes(b"\xff"), [DESCRIPTION]),
        "no config": (lambda d: checkpoints.edit(d / DESCRIPTION, config=checkpoints.ABSENT), [DESCRIPTION, "config"]),
        "config a number": (lambda d: checkpoints.edit(d / DESCRIPTION, config=3), [DESCRIPTION]),
        "config of words": (lambda d: checkpoints.edit(d / DESCRIPTION, config={"seed": "x"}), [DESCRIPTION]),
        "no fingerprint": (lambda d: checkpoints.edit(d / DESCRIPTION, backbone=checkpoints.ABSENT), ["backbone"]),
        "no router": (lambda d: checkpoints.edit(d / DESCRIPTION, router=checkpoints.ABSENT), [DESCRIPTION, "router"]),
        "router a number": (lambda d: checkpoints.edit(d / DESCRIPTION, router=3), [DESCRIPTION, "router"]),
        "no kind of router": (lambda d: checkpoints.edit(d / DESCRIPTION, router={"keys": {}}), [DESCRIPTION, "kind"]),
        "no keys": (lambda d: checkpoints.edit(d / DESCRIPTION, router={"kind": "experts"}), [DESCRIPTION, "keys"]),
        "keys a number": (lambda d: checkpoints.edit(d / DESCRIPTION, router={"kind": "experts", "keys": 1}), ["keys"]),
        "other keys": (
            lambda d: checkpoints.edit(d / DESCRIPTION, router={"kind": "experts", "keys": {"keys_sha256": "1"}}),
            ["keys"],
        ),
    },
    "exports: memory.safetensors": {
        "no tensors": (lambda d: (d / TENSORS).unlink(), [TENSORS]),
        "tensors truncated": (lambda d: truncate(d / TENSORS), [TENSORS]),
        "tensors empty": (lambda d: (d / TENSORS).write_bytes(b""), [TENSORS]),
        "no ids": (lambda d: change_tensors(d, expert_ids_S=None), [TENSORS, "expert_ids_S"]),
        "no experts": (lambda d: change_tensors(d, up_SR=None), [TENSORS, "up_SR"]),
        "no projection": (lambda d: change_tensors(d, transform_DC=None), [TENSORS, "transform_DC"]),
        "experts of another shape": (
            lambda d: change_tensors(d, down_SR=np.zeros((3, 2, 96), np.float32)),
            [TENSORS, "down_SR", "(3, 2, 96)"],
        ),
        "projection of another shape": (
            lambda d: change_tensors(d, mean_D=np.zeros(63, np.float32)),
            [TENSORS, "mean_D", "(63,)", "(64,)"],
        ),
    },
}


@pytest.fixture(scope="module")
def exported(world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "out"
    written(world, directory)
    return directory


@pytest.mark.parametrize("damage, words", kinds.cases(DAMAGES))
def test_a_damaged_memory_is_one_line(damage, words, exported, tmp_path):
    directory = shutil.copytree(exported, tmp_path / "out")
    damage(directory)
    assert_one_line(lambda: storage.load_export(storage.export_config(directory), directory), *words)


def test_a_memory_with_another_kind_of_router_is_refused(exported, tmp_path):
    directory = shutil.copytree(exported, tmp_path / "out")
    checkpoints.edit(directory / DESCRIPTION, router={"kind": "facts", "keys": {}})
    config = storage.export_config(directory)
    words = "kind facts", "--config.router.kind=experts"
    assert_one_line(lambda: storage.load_export(config, directory), *words, status=OTHER_RUN)


# Where the modules of a Hugging Face model that an adapter may be on stand in a layer.
HALVES = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn")
HALVES |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp")


@pytest.fixture(scope="module", params=HALVES)
def adapter(request, world, tmp_path_factory):
    """The experts of one question as an adapter: a world of that target, the question's Adapters, the directory."""
    config = helpers.replace(world.config, memory={"target": request.param, "positions": "all"})
    tuned = random_memory(config, world.model, world.memory.router, np.asarray(world.memory.expert_ids_S))
    prompt_BT = np.array([world.model.tokenizer.prompt(QUESTIONS[0])], np.int32)
    adapter_fn = storage.adapter_fn(world.model, tuned, config)
    adapters = adapter_fn(np.pad(prompt_BT, [(0, 0), (0, 64 - prompt_BT.size)]), np.array([prompt_BT.size], np.int32))
    directory = tmp_path_factory.mktemp("adapter")
    exports.save_peft(directory, config, adapters, config.backbone.path)
    return world._replace(config=config, memory=tuned), adapters, directory, prompt_BT


def adapted_logits(world, adapters, tokens_BT):
    @jax.jit
    def forward(params, suffix):
        hidden_BTD, _ = transformer.prefix(world.model.decoder, params, tokens_BT)
        hidden_BTD, _ = transformer.suffix(world.model.decoder, params, hidden_BTD, adapter=suffix)
        return transformer.unembed(world.model.decoder, params, hidden_BTD)

    return np.asarray(forward(world.model.params, adapters.suffix))


def merge(world, directory, merged):
    """The checkpoint with an adapter in its weights: W + alpha / r * B A, in the layers that its config names."""
    described = json.loads((directory / "adapter_config.json").read_text())
    parts = load_file(directory / "adapter_model.safetensors")
    shutil.copytree(world.directory, merged)
    weights = load_file(merged / "model.safetensors")
    names = [f"model.layers.{layer}" for layer in described["layers_to_transform"]]
    assert names == ["model.layers.1", "model.layers.2"] and len(parts) == 4
    (target,) = described["target_modules"]
    for name in [f"{name}.{HALVES[target]}.{target}" for name in names]:
        down_KI, up_OK = (parts[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert down_KI.shape[0] == up_OK.shape[1] == described["r"]
        weights[f"{name}.weight"] += described["lora_alpha"] / described["r"] * up_OK @ down_KI
    checkpoints.save_weights(merged, weights)
    return merged


def test_an_adapter_merged_into_the_weights_is_the_memory(adapter, tmp_path):
    world, adapters, directory, prompt_BT = adapter
    expected_BTV = reference.logits(merge(world, directory, tmp_path / "merged"), prompt_BT)
    assert relative_error(adapted_logits(world, adapters, prompt_BT), expected_BTV) <= 1e-4
    assert relative_error(reference.logits(world.directory, prompt_BT), expected_BTV) > 0.05


def test_peft_makes_of_an_adapter_what_the_memory_is(adapter):
    world, adapters, directory, prompt_BT = adapter
    why = "compares with peft: pip install -e .[parity]"
    transformers, peft, torch = (pytest.importorskip(n, reason=why) for n in ("transformers", "peft", "torch"))
    whole = transformers.AutoModelForCausalLM.from_pretrained(world.directory, dtype=torch.float32)
    adapted_model = peft.PeftModel.from_pretrained(whole, directory).eval()
    tokens = torch.tensor(prompt_BT, dtype=torch.long)
    with torch.no_grad():
        expected_BTV = adapted_model(tokens).logits.numpy()
    assert relative_error(adapted_logits(world, adapters, prompt_BT), expected_BTV) <= 1e-4
    if world.config.memory.target not in ("o_proj", "down_proj"):
        return  # decoding with each target is compiled anew, so one in each half of a layer is enough
    with torch.no_grad():
        stops = list(world.model.tokenizer.stop_ids)
        arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": stops, "pad_token_id": stops[0]}
        answer = adapted_model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **arguments)
    text = world.model.tokenizer.decode(answer[0, prompt_BT.size :].numpy())
    assert said(world, world.memory, 4 * QUESTIONS[:1])[0].text == text


class Knows(ExpertMemory):
    """A memory that acts on answers alone, of which only the answer to a question matters."""

    def ask(self, *_):
        return answering.Answer("K4X2P9", 1.0, [])


def export_adapter(memory, question, output):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "load", lambda self: memory)
        return exports.peft(Source(output, memory.config, is_export=True), question, str(output))


def test_an_adapter_of_a_memory_on_answers_answers_on_all_tokens(world, tmp_path):
    """The plain model with it in its weights, for every token, finds each token of the answer likelier than not."""
    said = export_adapter(Knows(world.config, world.model, world.memory), QUESTIONS[0], tmp_path / "out")
    assert "and was certified so after" in said
    prompt, completion = world.model.tokenizer.prompt(QUESTIONS[0]), world.model.tokenizer.completion("K4X2P9")
    tokens_BT = np.array([prompt + completion])
    (logits_TV,) = reference.logits(merge(world, tmp_path / "out", tmp_path / "merged"), tokens_BT)
    logits_AV = logits_TV[len(prompt) - 1 : -1]
    right_A = logits_AV[np.arange(len(completion)), completion]
    assert (np.log(np.exp(logits_AV).sum(axis=-1)) - right_A < np.log(2)).all()


def test_an_adapter_that_does_not_answer_is_not_written(world, tmp_path):
    config = helpers.replace(world.config, tuning={"epochs": 1})
    memory = Knows(config, world.model, world.memory)
    words = repr(QUESTIONS[0]), "after 1 epochs"
    assert_one_line(lambda: export_adapter(memory, QUESTIONS[0], tmp_path / "out"), *words, status=FACTS_DO_NOT_HOLD)
    assert list(tmp_path.iterdir()) == []


PRESETS = ["llama31", "llama32_tied", "llama_linear", "mistral_window", "qwen2", "qwen3_tied"]


@pytest.fixture(scope="module", params=PRESETS)
def saved_again(request, tmp_path_factory):
    """A checkpoint, and what becomes of it when it is loaded and saved."""
    directory = tmp_path_factory.mktemp(request.param)
    original = checkpoints.make_preset(directory / "original", request.param, tokenizer=False)
    config, params = formats.load_whole(str(original), max_seq_len=512)
    huggingface.save_backbone(directory / "again", config, params)
    return original, config, params, directory / "again"


def test_a_backbone_saved_and_loaded_is_the_same(saved_again):
    _, config, params, again = saved_again
    found_config, found_params = formats.load_whole(str(again), max_seq_len=512)
    assert dataclasses.replace(found_config, path=config.path) == config
    assert helpers.same_bits(found_params, params)


def test_a_backbone_saved_says_the_same_to_others(saved_again):
    original, _, _, again = saved_again
    tokens_BT = np.random.default_rng(0).integers(checkpoints.TOKENIZER_SIZE, size=(1, 24))
    assert relative_error(reference.logits(again, tokens_BT), reference.logits(original, tokens_BT)) <= 1e-6


def test_transformers_opens_a_backbone_saved(saved_again):
    original, _, _, again = saved_again
    tokens_BT = np.random.default_rng(0).integers(checkpoints.TOKENIZER_SIZE, size=(1, 24))
    found, expected = (reference.transformers_logits(directory, tokens_BT) for directory in (again, original))
    assert relative_error(found, expected) <= 1e-6


EXPORTED = {
    "a bfloat16 checkpoint": {"torch_dtype": "bfloat16"},
    "in shards": {"shards": 3},
    "tied": {"tie_word_embeddings": True, "torch_dtype": "float16"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_backbone_is_the_checkpoint(name, dtype, tmp_path):
    """Not the run: its context, its format of numbers and its special tokens are the checkpoint's, byte for byte."""
    arguments = {"pad_token_id": checkpoints.END, "unsloth_fixed": True, **EXPORTED[name]}
    original = checkpoints.make(tmp_path / "original", "llama", **arguments)
    (original / "LICENSE").write_text("free")
    (original / "consolidated.safetensors").write_bytes(b"")
    if name == "in shards":
        (original / "model.safetensors.index.json").unlink()
    asked = BackboneConfig(path=str(original), max_seq_len=64, dtype=dtype)
    config = dataclasses.replace(CONFIG, backbone=formats.resolve(asked))
    exports.backbone(config, str(tmp_path / "out"))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written - {"model.safetensors.index.json"} == {path.name for path in original.iterdir()} - {
        "consolidated.safetensors"
    }
    for file in written - {"model.safetensors.index.json"}:
        assert (tmp_path / "out" / file).read_bytes() == (original / file).read_bytes(), file
    assert huggingface.fingerprint(str(tmp_path / "out")) == huggingface.fingerprint(str(original))
    if name == "in shards":
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        checkpoints.save_weights(tmp_path, load_weights(original), shards=3)
        assert index == json.loads((tmp_path / "model.safetensors.index.json").read_text())


def test_a_checkpoint_that_has_changed_is_not_exported(tmp_path):
    original = checkpoints.make(tmp_path / "original", "llama")
    config = dataclasses.replace(CONFIG, backbone=formats.resolve(BackboneConfig(path=str(original))))
    checkpoints.edit(original / "config.json", rms_norm_eps=1e-3)
    assert_one_line(lambda: exports.backbone(config, str(tmp_path / "out")), original, "norm_eps")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def load_weights(directory):
    return {name: tensor for path in sorted(directory.glob("model-*")) for name, tensor in load_file(path).items()}


def test_the_backbone_that_ships_keeps_its_fingerprint_and_tokens(tmp_path):
    """So that what was tuned beside it is asked beside its export."""
    for dtype in ("float32", "bfloat16"):
        directory = tmp_path / dtype
        exports.backbone(Config(backbone=BackboneConfig(dtype=dtype)), str(directory))
        assert huggingface.fingerprint(str(directory)) == shipped.fingerprint("")
        described = json.loads((directory / "config.json").read_text())
        expected = {"max_position_embeddings": 256, "torch_dtype": "float32"}
        expected |= {"bos_token_id": 0xFD, "eos_token_id": 0xFF, "pad_token_id": 0xFC}
        assert expected.items() <= described.items()
        resolved = formats.resolve(BackboneConfig(path=str(directory), dtype=dtype))
        assert dataclasses.replace(resolved, path="") == BackboneConfig(dtype=dtype)


def test_an_adapter_beside_the_backbone_that_ships_brings_it(tmp_path):
    """For no other library can find it; and it says what vLLM must be told."""
    config = helpers.replace(Config(memory=CONFIG.memory), memory={"positions": "all"})
    model, router = frozen_model.load(config), helpers.random_router(config)
    ids_S = np.unique(routers.select_facts(model, router, QUESTIONS[:1], config.memory.top_k).expert_ids_FK)
    stored = random_memory(config, model, router, ids_S)
    said = export_adapter(ExpertMemory(config, model, stored), QUESTIONS[0], tmp_path / "out")
    base = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "out" / "base")
    assert huggingface.fingerprint(base) == model.fingerprint
    readme = (tmp_path / "out" / "README.md").read_text()
    assert base in readme and "--max-lora-rank 8" in readme and "--max-lora-rank 8" in said
    assert [exports._vllm_rank(rank) for rank in (1, 8, 9, 32, 33, 600)] == [8, 8, 16, 32, 64, 600]
