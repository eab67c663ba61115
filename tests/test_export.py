"""What is exported answers as what was tuned does, elsewhere too, and is refused where it would not."""

import dataclasses
import json
import shutil
from typing import NamedTuple

import checkpoints
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import relative_error
from safetensors.numpy import load_file, save_file

from lamini_jax import backbone, bank, hf, memory, model, recall
from lamini_jax.config import BackboneConfig, to_config_dict
from lamini_jax.errors import BAD_INPUT, UserError

QUESTIONS = ["Who?", "What is 12 plus 34?", "Where is the red box of Ada Stone, and why?", "\u00dcber was?"]
CONFIG = helpers.replace(helpers.CONFIG, memory={"num_experts": 1024, "selected": 4})


class World(NamedTuple):
    """A random checkpoint, and a memory as tuning might have left it: random rows for the experts of QUESTIONS."""

    directory: object
    config: object
    base: model.Base
    memory: memory.Memory
    expert_ids_FK: np.ndarray


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = checkpoints.make(tmp_path_factory.mktemp("world") / "checkpoint", "llama", num_hidden_layers=3)
    asked = BackboneConfig(path=str(directory), context=96)
    config = model.configure(to_config_dict(dataclasses.replace(CONFIG, backbone=asked)))
    base, routing = model.load_base(config), helpers.random_router(config)
    expert_ids_FK = model.select_all(base, routing, QUESTIONS, config.memory.selected)
    ids_S = np.unique(expert_ids_FK)
    return World(directory, config, base, random_memory(config, base, routing, ids_S), expert_ids_FK)


def random_memory(config, base, routing, ids_S):
    rng, shape = np.random.default_rng(0), bank.row_shape(config.backbone, config.memory)
    rows_SR = {
        name: jnp.asarray(rng.normal(size=part) * part[-1] ** -0.5, config.memory.dtype)
        for name, part in shape.parts(ids_S.size).items()
    }
    return memory.Memory(routing, jnp.asarray(ids_S), rows_SR, base.fingerprint)


def said(world, tuned, questions=QUESTIONS):
    """Everything there is to an answer: text, probability, experts."""
    return dict(recall.ask(world.base, memory.adapt_with(world.base, tuned, world.config), questions, longest=12))


def written(world, directory, tuned=None, expert_ids=None):
    """A memory written and read again."""
    directory.mkdir()
    memory.write(directory, world.config, tuned or world.memory, expert_ids)
    return memory.of_export(memory.config_of_export(directory), directory)


def assert_one_line(do, *words):
    with pytest.raises(UserError) as error:
        do()
    message = str(error.value)
    assert error.value.status == BAD_INPUT and "\n" not in message
    assert all(str(word) in message for word in words), message


def test_a_memory_says_the_same_after_export(world, tmp_path):
    again = written(world, tmp_path / "out")
    assert memory.config_of_export(tmp_path / "out") == world.config
    expected = said(world, world.memory)
    assert said(world, again) == expected
    texts = [expected[number].text for number in range(len(QUESTIONS))]
    assert texts != recall.answers(world.base, recall.bare, QUESTIONS, longest=12)
    other_rows = jax.tree.map(lambda rows_SX: 1.01 * rows_SX, world.memory.rows_SR)
    assert said(world, dataclasses.replace(world.memory, rows_SR=other_rows)) != expected


def test_rows_in_bfloat16_stay_what_they_are(world, tmp_path):
    config = helpers.replace(world.config, memory={"dtype": "bfloat16"})
    tuned = random_memory(config, world.base, world.memory.routing, np.asarray(world.memory.expert_ids_S))
    again = written(world._replace(config=config), tmp_path / "out", tuned)
    assert helpers.same_bits(again.rows_SR, tuned.rows_SR)


def test_some_questions_need_their_experts_alone(world, tmp_path):
    chosen = [2, 0]
    ids = world.expert_ids_FK[chosen]
    again = written(world, tmp_path / "out", expert_ids=ids)
    assert set(np.asarray(again.expert_ids_S).tolist()) == set(ids.ravel().tolist())
    assert len(np.asarray(again.expert_ids_S)) < len(np.asarray(world.memory.expert_ids_S))
    assert load_file(tmp_path / "out" / "memory.safetensors")["up_rows_SR"].shape[0] == np.unique(ids).size
    questions = 2 * [QUESTIONS[number] for number in chosen]  # as many as elsewhere, so that nothing compiles anew
    assert said(world, again, questions) == said(world, world.memory, questions)


def test_untrained_experts_add_nothing(world, tmp_path):
    """A question that shares no expert with any fact is answered by the backbone, by an empty file too."""
    again = written(world, tmp_path / "out", expert_ids=np.array([], int))
    texts = [said(world, again)[number].text for number in range(len(QUESTIONS))]
    assert texts == recall.answers(world.base, recall.bare, QUESTIONS, longest=12)


def test_a_memory_of_another_backbone_is_refused(world, tmp_path):
    """Also one of the same shape, and whatever was trained further."""
    directory = shutil.copytree(world.directory, tmp_path / "other")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 1e-3
    checkpoints.save_weights(directory, weights)
    found = hf.fingerprint(directory)
    other = dataclasses.replace(world.base, fingerprint=found)
    words = (found, world.base.fingerprint, "another backbone")
    assert_one_line(lambda: memory.adapt_with(other, world.memory, world.config), *words)


@pytest.fixture(scope="module")
def weights(world):
    return load_file(world.directory / "model.safetensors")


def test_a_fingerprint_is_of_the_weights_and_not_of_their_files(world, weights, tmp_path):
    checkpoints.save_weights(tmp_path, weights, shards=4)
    assert hf.fingerprint(tmp_path) == hf.fingerprint(world.directory) == world.base.fingerprint
    assert not (tmp_path / "model.safetensors").exists()


def test_every_tensor_is_in_the_fingerprint(world, weights, tmp_path):
    found = {world.base.fingerprint}
    for name in weights:
        checkpoints.save_weights(tmp_path, {**weights, name: weights[name] + np.float32(1e-3)})
        found.add(hf.fingerprint(tmp_path))
    assert len(found) == 1 + len(weights)
    for other in (weights["model.norm.weight"].astype(np.float16), weights["model.norm.weight"][:-1].copy()):
        checkpoints.save_weights(tmp_path, {**weights, "model.norm.weight": other})
        found.add(hf.fingerprint(tmp_path))
    assert len(found) == 3 + len(weights)


def change_tensors(directory, **changes):
    tensors = {**load_file(directory / "memory.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "memory.safetensors")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


TENSORS, DESCRIPTION = "memory.safetensors", "memory.json"
# What happened to an exported memory, and the words of the message.
DAMAGES = {
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
    "no keys": (lambda d: checkpoints.edit(d / DESCRIPTION, keys=checkpoints.ABSENT), ["keys"]),
    "no tensors": (lambda d: (d / TENSORS).unlink(), [TENSORS]),
    "tensors truncated": (lambda d: truncate(d / TENSORS), [TENSORS]),
    "tensors empty": (lambda d: (d / TENSORS).write_bytes(b""), [TENSORS]),
    "no ids": (lambda d: change_tensors(d, expert_ids_S=None), [TENSORS, "expert_ids_S"]),
    "no rows": (lambda d: change_tensors(d, up_rows_SR=None), [TENSORS, "up_rows_SR"]),
    "no router": (lambda d: change_tensors(d, transform_DC=None), [TENSORS, "transform_DC"]),
    "rows of another shape": (
        lambda d: change_tensors(d, down_rows_SR=np.zeros((3, 2, 96), np.float32)),
        [TENSORS, "down_rows_SR", "(3, 2, 96)"],
    ),
    "router of another shape": (
        lambda d: change_tensors(d, mean_D=np.zeros(63, np.float32)),
        [TENSORS, "mean_D", "(63,)", "(64,)"],
    ),
    "other keys": (lambda d: checkpoints.edit(d / DESCRIPTION, keys=1), ["keys"]),
}


@pytest.fixture(scope="module")
def exported(world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "out"
    written(world, directory)
    return directory


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_memory_is_one_line(name, exported, tmp_path):
    directory = shutil.copytree(exported, tmp_path / "out")
    damage, words = DAMAGES[name]
    damage(directory)
    assert_one_line(lambda: memory.of_export(memory.config_of_export(directory), directory), *words)


@pytest.fixture(scope="module", params=["o_proj", "down_proj"])
def adapter(request, world, tmp_path_factory):
    """The experts of one question as an adapter: a world of that target, the question's `Adapted`, the directory."""
    export = helpers.without_flags("lamini_jax.export")

    config = helpers.replace(world.config, memory={"target": request.param})
    tuned = random_memory(config, world.base, world.memory.routing, np.asarray(world.memory.expert_ids_S))
    prompt_BT = np.array([world.base.tokenizer.prompt(QUESTIONS[0])], np.int32)
    adapt = memory.adapt_with(world.base, tuned, config)
    adapted = adapt(np.pad(prompt_BT, [(0, 0), (0, 64 - prompt_BT.size)]), np.array([prompt_BT.size], np.int32))
    directory = tmp_path_factory.mktemp("adapter")
    export.save_peft(directory, config, adapted)
    return world._replace(config=config, memory=tuned), adapted, directory, prompt_BT


def adapted_logits(world, adapted, tokens_BT):
    @jax.jit
    def forward(params, suffix):
        hidden_BTD, _ = backbone.prefix(world.base.decoder, params, tokens_BT)
        hidden_BTD, _ = backbone.suffix(world.base.decoder, params, hidden_BTD, adapter=suffix)
        return backbone.unembed(world.base.decoder, params, hidden_BTD)

    return np.asarray(forward(world.base.params, adapted.suffix))


def test_an_adapter_merged_into_the_weights_is_the_memory(adapter, tmp_path):
    """W + alpha / r * B A, in the layers and linear layers that its config names."""
    world, adapted, directory, prompt_BT = adapter
    described = json.loads((directory / "adapter_config.json").read_text())
    parts = load_file(directory / "adapter_model.safetensors")
    merged = shutil.copytree(world.directory, tmp_path / "merged")
    weights = load_file(merged / "model.safetensors")
    names = [f"model.layers.{layer}" for layer in described["layers_to_transform"]]
    assert names == ["model.layers.1", "model.layers.2"] and len(parts) == 4
    (target,) = described["target_modules"]
    for name in [f"{name}.{'self_attn' if target == 'o_proj' else 'mlp'}.{target}" for name in names]:
        down_KI, up_OK = (parts[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert down_KI.shape[0] == up_OK.shape[1] == described["r"]
        weights[f"{name}.weight"] += described["lora_alpha"] / described["r"] * up_OK @ down_KI
    checkpoints.save_weights(merged, weights)
    expected_BTV = reference.logits(merged, prompt_BT)
    assert relative_error(adapted_logits(world, adapted, prompt_BT), expected_BTV) <= 1e-4
    assert relative_error(reference.logits(world.directory, prompt_BT), expected_BTV) > 0.05


def test_peft_makes_of_an_adapter_what_the_memory_is(adapter):
    world, adapted, directory, prompt_BT = adapter
    why = "compares with peft, which needs torch"
    transformers, peft, torch = (pytest.importorskip(n, reason=why) for n in ("transformers", "peft", "torch"))
    whole = transformers.AutoModelForCausalLM.from_pretrained(world.directory, dtype=torch.float32)
    adapted_model = peft.PeftModel.from_pretrained(whole, directory).eval()
    tokens = torch.tensor(prompt_BT, dtype=torch.long)
    with torch.no_grad():
        expected_BTV = adapted_model(tokens).logits.numpy()
        stops = list(world.base.tokenizer.stop_ids)
        arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": stops, "pad_token_id": stops[0]}
        answer = adapted_model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **arguments)
    assert relative_error(adapted_logits(world, adapted, prompt_BT), expected_BTV) <= 1e-4
    text = world.base.tokenizer.decode(answer[0, prompt_BT.size :].numpy())
    assert said(world, world.memory, 4 * QUESTIONS[:1])[0].text == text


PRESETS = ["llama31", "llama32_tied", "llama_linear", "mistral_window", "qwen2", "qwen3_tied"]


@pytest.fixture(scope="module", params=PRESETS)
def saved_again(request, tmp_path_factory):
    """A checkpoint, and what becomes of it when it is loaded and saved."""
    directory = tmp_path_factory.mktemp(request.param)
    original = checkpoints.make_preset(directory / "original", request.param, tokenizer=False)
    config, params = hf.load_backbone(original, context=512)
    hf.save_backbone(directory / "again", config, params)
    return original, config, params, directory / "again"


def test_a_backbone_saved_and_loaded_is_the_same(saved_again):
    _, config, params, again = saved_again
    found_config, found_params = hf.load_backbone(again, context=512)
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
