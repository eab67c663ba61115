"""The tokenizer in a GGUF file's metadata makes the tokens that the original makes, of every text."""

import dataclasses
import functools
import json

import checkpoints
import gguf_files
import pytest
from checkpoints import BEGIN, END, END_OF_TURN, TOKENIZER_SIZE
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lamini_jax.backbone import chat_template
from lamini_jax.backbone.checkpoints import _gguf_tokenizer
from lamini_jax.backbone.checkpoints import gguf as gguf_format
from lamini_jax.config import BackboneConfig
from lamini_jax.data import world
from lamini_jax.errors import UserError

TEXTS = (
    "What is 12 plus 34, or 1234567 minus 89?",
    " spaces  before, between and after \n\n  x \n",
    "It's we'LL I'M they\u2019re DON'T 'tis",
    "\u00dcber den Fl\u00fc\u00dfen: \u20ac 5, \u00bd \u0664\u0665 \u2167",
    "\u4f60\u597d\uff0c\u4e16\u754c \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U00010348",
    "tab\tfeed\x0creturn\r\nnull\x00bell\x07delete\x7fnext\x85\xa0\xad\ufeff\u2028",
    "e\u0301 \u00e9 \ufb01 \uff21 \u212b \ufffd",
    "def f(x):\n    return x[0]**2 - {'a': 1}['a']  # $5 + 3 <= 8\n\n\n\tpass",
    "<|not_a_token|> </s> [INST] <0x41> \u2581x",
    "<|eot_id|>a<|begin_of_text|> b <|end_of_text|>",
    "",
    " ",
    "Hello World HELLO wORLD camelCase snake_case /path/to\n/file",
)


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    """A checkpoint with a tokenizer, and its GGUF file."""
    directory = checkpoints.make(tmp_path_factory.mktemp("chatting") / "checkpoint", "llama", num_hidden_layers=2)
    return directory, gguf_files.write(directory.with_name("model.gguf"), directory)


def changed(chatting, path, **changes):
    """The file with other metadata of its tokenizer; None: without it."""

    def change(metadata, _):
        metadata |= {key if "." in key else f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        for key in [key for key, value in metadata.items() if value is None]:
            del metadata[key]

    return gguf_files.write(path, chatting[0], change=change)


def load(path, **fields):
    return gguf_format.load_tokenizer(gguf_format.resolve(BackboneConfig(path=str(path), **fields)))


def split(*steps):
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
# What the original tokenizers are: how they cut words, whether they take words whole, how they normalize.
ORIGINALS = {
    "gpt-2": (GPT2, False, None),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), False, None),
}


@pytest.mark.parametrize("text", TEXTS)
def test_llama3(text, chatting):
    directory, path = chatting
    original = Tokenizer.from_file(str(directory / "tokenizer.json"))
    found = load(path)
    assert found.encode(text) == original.encode(text, add_special_tokens=False).ids
    rendered = found._render(chat_template.asking(text))
    assert found.prompt(text) == original.encode(rendered, add_special_tokens=False).ids
    if "<|eot_id|>" not in text:  # which ends what is decoded
        assert found.decode(found.encode(text)) == original.decode(original.encode(text).ids)


@pytest.mark.parametrize("name", ORIGINALS)
def test_other_words(name, chatting, tmp_path):
    words, whole, normalizer = ORIGINALS[name]
    original = Tokenizer.from_file(str(chatting[0] / "tokenizer.json"))
    content = json.loads(original.to_str())
    content["model"]["ignore_merges"] = whole
    original = Tokenizer.from_str(json.dumps(content))
    original.pre_tokenizer = words
    if normalizer:
        original.normalizer = normalizer
    found = load(changed(chatting, tmp_path / "a.gguf", pre=name))
    for text in TEXTS:
        assert found.encode(text) == original.encode(text, add_special_tokens=False).ids, text


def test_qwen2_is_as_in_transformers(chatting, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install -e .[parity]")
    model = json.loads((chatting[0] / "tokenizer.json").read_text())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    original = transformers.Qwen2Tokenizer(vocab=model["vocab"], merges=merges, unk_token=None)
    found = load(changed(chatting, tmp_path / "a.gguf", pre="qwen2"))
    for text in TEXTS:
        if "<|" not in text:
            assert found.encode(text) == original.encode(text, add_special_tokens=False), text


WORDS = {  # what pre-tokenizers make of a text
    "default": ("a1234 (b), it's", ["a", "123", "4", " ", "(", "b", "),", " it", "'", "s"]),
    "smollm": ("a1234 (b), it's", ["a", "1", "2", "3", "4", " (", "b", "),", " it", "'s"]),
    "llama-bpe": ("a1234 (b), IT'S", ["a", "123", "4", " (", "b", "),", " IT", "'S"]),
    "qwen2": ("a12 (b),\n\n x", ["a", "1", "2", " (", "b", "),\n\n", " x"]),
    "tekken": ("camelCase 12 a/\nb", ["camel", "Case", " ", "1", "2", " a", "/\n", "b"]),
}


@pytest.mark.parametrize("name", WORDS)
def test_words(name, chatting, tmp_path):
    text, expected = WORDS[name]
    library = load(changed(chatting, tmp_path / "a.gguf", pre=name))._tokenizer
    assert [text[start:stop] for _, (start, stop) in library.pre_tokenizer.pre_tokenize_str(text)] == expected


def test_no_name_of_words_is_the_default_with_a_warning(chatting, tmp_path, caplog):
    plain = load(changed(chatting, tmp_path / "a.gguf", pre="default"))
    found = load(changed(chatting, tmp_path / "b.gguf", pre=None))
    assert all(found.encode(text) == plain.encode(text) for text in TEXTS)
    (warning,) = [record.getMessage() for record in caplog.records if "pre-tokenizer" in record.getMessage()]
    assert str(tmp_path / "b.gguf") in warning


@functools.cache
def pieces():
    """Texts, types and scores of a small SentencePiece vocabulary: byte tokens, characters and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    texts = (qa.question for qa, _ in zip(world.training_stream(0), range(2000), strict=False))
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merged = ["".join(pair) for pair in model["merges"]]
    merged = list(dict.fromkeys(merged))
    characters = sorted(model["vocab"].keys() - set(merged))
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *characters, "<user>"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(merged) + len(characters)), 4]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(merged) + len(characters))] + [0.0]
    return texts, types, scores


def by_scores(text):
    """SentencePiece's tokens of a text without special tokens: of all neighbours, the best pair is merged first."""
    texts, _, scores = pieces()
    ids = {text: number for number, text in enumerate(texts)}
    parts = list("\u2581" + text.replace(" ", "\u2581")) if text else []
    while True:
        pairs = [left + right for left, right in zip(parts, parts[1:], strict=False)]
        best = max((pair for pair in pairs if pair in ids), key=lambda pair: scores[ids[pair]], default=None)
        if best is None:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [best]
    found = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


def sentencepiece(chatting, path, **changes):
    texts, types, scores = pieces()
    changes = {"tokens": texts, "token_type": types, "scores": scores, "merges": None, "pre": None, **changes}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "eot_token_id": None, "eom_token_id": None}
    rows = {"llama.vocab_size": None, "tokenizer.chat_template": None}

    def change(metadata, tensors):
        metadata |= {"tokenizer.ggml.model": "llama"}
        metadata |= {f"tokenizer.ggml.{key}": value for key, value in {**ids, **changes}.items() if "." not in key}
        metadata |= {**rows, **{key: value for key, value in changes.items() if "." in key}}
        for key in [key for key, value in metadata.items() if value is None]:
            del metadata[key]
        for name in ("token_embd.weight", "output.weight"):
            array, kind = tensors[name]
            tensors[name] = array.repeat(2, axis=0), kind

    return gguf_files.write(path, chatting[0], change=change)


def test_sentencepiece(chatting, tmp_path):
    found = load(sentencepiece(chatting, tmp_path / "a.gguf"))
    assert found.stop_ids == (2,) and found.pad_id == 2
    for text in TEXTS:
        ids = found.encode(text)
        assert ids == by_scores(text.replace("</s>", "")) or "</s>" in text, text
        if "\u2581" not in text and "</s>" not in text:
            assert found.decode(ids) == text
    assert found.prompt("Who?") == [1, *by_scores("Who?\n")]
    user = len(pieces()[0]) - 1
    assert found.encode("a<user>b</s>") == [*by_scores("a"), user, *by_scores("b"), 2]


def test_sentencepiece_is_as_in_its_own_format(chatting, tmp_path):
    """The tokenizer.json of Llama 2, of these pieces, with the merges that transformers makes of their scores."""
    convert = pytest.importorskip(
        "transformers.convert_slow_tokenizer", reason="compares with transformers: pip install -e .[parity]"
    )
    texts, _, scores = pieces()
    found = load(sentencepiece(chatting, tmp_path / "a.gguf"))
    ids = {text: number for number, text in enumerate(texts)}
    merges = convert.generate_merges(ids, dict(zip(texts, scores, strict=True)))
    original = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    original.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    original.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    original.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    original.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for text in TEXTS:
        assert found._ids(text) == original.encode(text).ids
        if "</s>" not in text:  # which ends what is decoded
            assert found.decode(found._ids(text)) == original.decode(original.encode(text).ids)


def test_sentencepiece_without_a_space_before_a_text(chatting, tmp_path):
    found = load(sentencepiece(chatting, tmp_path / "a.gguf", add_space_prefix=False))
    assert found.encode(" of it") == by_scores("of it")
    assert found.decode(found.encode(" of it")) == " of it"


def test_what_is_put_around_a_text(chatting, tmp_path):
    bare = {"tokenizer.chat_template": None}
    plain = load(changed(chatting, tmp_path / "a.gguf", **bare))
    assert plain.prompt("Who?") == [BEGIN, *plain.encode("Who?\n")]  # as llama.cpp does for Llama 3
    found = load(changed(chatting, tmp_path / "b.gguf", add_bos_token=False, **bare))
    assert found.prompt("Who?") == plain.encode("Who?\n")
    found = load(changed(chatting, tmp_path / "c.gguf", add_eos_token=True, pre="gpt-2", **bare))
    assert found.prompt("Who?") == [*found.encode("Who?\n"), END_OF_TURN]


def test_stops_and_padding(chatting, tmp_path):
    found = load(chatting[1])
    assert found.stop_ids == (END_OF_TURN, END) and found.pad_id == END_OF_TURN
    assert found.vocab_size == TOKENIZER_SIZE
    # A template that does not end turns with the eos token leaves that to the eot token.
    changes = {"eos_token_id": END, "eom_token_id": None, "padding_token_id": BEGIN}
    found = load(changed(chatting, tmp_path / "a.gguf", **changes))
    assert found.stop_ids == (END_OF_TURN, END) and found.pad_id == BEGIN
    changes["tokenizer.chat_template"] = "{{ messages[0].content }}{{ eos_token }}"
    found = load(changed(chatting, tmp_path / "b.gguf", **changes))
    assert found.stop_ids == (END, END_OF_TURN)
    assert found.prompt("Who?") == [*found.encode("Who?"), END]


def test_system_messages(chatting, tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    path = changed(chatting, tmp_path / "a.gguf", **{"tokenizer.chat_template": template})
    found = load(path, system="Be brief.")
    assert found.prompt("Who?") == found.encode("<system>Be brief.<user>Who?")
    bare = changed(chatting, tmp_path / "b.gguf", **{"tokenizer.chat_template": None})
    with pytest.raises(UserError, match="--config.backbone.system: .*b.gguf has no chat template"):
        load(bare, system="Be brief.")


def test_special_tokens_in_questions_are_found(chatting):
    found = load(chatting[1])
    assert "<|eot_id|>" in found.why_unsupported("a <|eot_id|>", exactly=False)
    assert found.why_unsupported("Who?", exactly=True) is None


def test_unused_tokens_are_no_tokens(chatting, tmp_path):
    about = gguf_files.byte_level(chatting[0])
    texts = [*about["tokenizer.ggml.tokens"], "[PAD0]", "[PAD1]"]
    types = [*about["tokenizer.ggml.token_type"], 5, 5]
    found = load(changed(chatting, tmp_path / "a.gguf", tokens=texts, token_type=types))
    assert found.vocab_size == TOKENIZER_SIZE
    assert found.encode("[PAD0]") == load(chatting[1]).encode("[PAD0]")


def test_saved_files_are_read_by_transformers(chatting, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install -e .[parity]")
    config = gguf_format.resolve(BackboneConfig(path=str(chatting[1])))
    gguf_format.export(config, tmp_path)
    other, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load(chatting[1])
    for text in TEXTS:
        turns = [{"role": "user", "content": text}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        assert other.apply_chat_template(turns, **options) == ours.prompt(text)
    model = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert model.eos_token_id == [END_OF_TURN, END] and model.bos_token_id == BEGIN


TEMPLATE = "tokenizer.chat_template"
# name -> (metadata, words of the message)
REFUSED = {
    "none": ({"model": None}, "has no tokenizer"),
    "none of its own": ({"model": "no_vocab"}, "has no tokenizer"),
    "no tokens": ({"tokens": None}, "has no tokenizer"),
    "another kind": ({"model": "bert"}, "tokenizer.ggml.model bert is not supported; gpt2 and llama are"),
    "other words": ({"pre": "bloom"}, "tokenizer.ggml.pre bloom is not supported; one of default, gpt-2"),
    "no merges": ({"merges": None}, "has no list tokenizer.ggml.merges of the tokenizer gpt2"),
    "no scores": ({"model": "llama"}, "has no list tokenizer.ggml.scores of the tokenizer llama"),
    "merges of nothing": ({"merges": ["a"]}, "tokenizer cannot be made"),
    "merges of unknown": ({"merges": ["never tokens"]}, "tokenizer cannot be made"),
    "numbers for texts": ({"tokens": [1, 2]}, "has no list tokenizer.ggml.tokens"),
    "few types": ({"token_type": [1]}, "has 1 in tokenizer.ggml.token_type and 400 tokens"),
    "no end": ({"eos_token_id": None}, "names no tokenizer.ggml.eos_token_id"),
    "end beyond": ({"eos_token_id": 400}, "tokenizer.ggml.eos_token_id 400 is not one of 400 tokens"),
    "end of text": ({"eos_token_id": "</s>"}, "tokenizer.ggml.eos_token_id </s> is not one"),
    "a beginning of no use": ({"bos_token_id": 25}, "tokenizer cannot be made"),
    "no flag": ({"add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token yes is not true or false"),
    "map": ({"precompiled_charsmap": [1]}, "tokenizer.ggml.precompiled_charsmap"),
    "template": ({TEMPLATE: "{% if %}"}, "chat template fails"),
    "template of nothing": ({TEMPLATE: "Hello"}, "chat template leaves out the question"),
    "template of numbers": ({TEMPLATE: 3}, "chat template cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, chatting, tmp_path):
    changes, words = REFUSED[name]
    path = changed(chatting, tmp_path / "a.gguf", **changes)
    with pytest.raises(UserError) as error:
        load(path)
    assert str(path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_more_tokens_than_rows_are_refused(chatting):
    config = gguf_format.resolve(BackboneConfig(path=str(chatting[1])))
    with pytest.raises(UserError, match="has 400 tokens, and the backbone's vocabulary is 399"):
        gguf_format.load_tokenizer(dataclasses.replace(config, vocab_size=399))


def test_the_same_token_twice_is_refused(chatting, tmp_path):
    texts = gguf_files.byte_level(chatting[0])["tokenizer.ggml.tokens"]
    path = changed(chatting, tmp_path / "a.gguf", tokens=[*texts[:-1], texts[0]])
    with pytest.raises(UserError, match="has the token .* twice"):
        load(path)


def test_without_the_library_it_says_what_to_install(chatting, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    file = gguf_format._open(str(chatting[1]))
    with pytest.raises(UserError, match=r"pip install -e \.\[gguf\]"):
        _gguf_tokenizer.load(file, 416, "")
