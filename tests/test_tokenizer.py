"""A checkpoint's tokenizer reads what its own library reads; whatever it cannot carry as it is written is refused."""

import json
import shutil

import checkpoints
import numpy as np
import pytest
from checkpoints import ABSENT, BEGIN, END, END_OF_TURN, edit
from tokenizers import Tokenizer, normalizers

from lamini_jax.backbone import tokenizer as tokenizers
from lamini_jax.backbone.tokenizer import ByteTokenizer
from lamini_jax.data import facts
from lamini_jax.errors import BAD_INPUT, UserError

VOCABULARY = 416
TEXTS = (
    "What is 12 plus 34?",
    " spaces  before, between and after \n\n",
    "\u00dcber den Fl\u00fc\u00dfen: \u20ac 5, \u00bd",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U00010348",
    "tab\tfeed\x0creturn\r\nnull\x00bell\x07escape\x1bdelete\x7fnext\x85\xa0\xad\ufeff\u2028",
    "e\u0301 \u00e9 \ufb01 \uff21 \u212b \ufffd",
    "{{ bos_token }} {% raise %} {# no #}",
    "<|not_a_token|> </s> [INST]",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The files of a tokenizer, nobody's to change."""
    directory = tmp_path_factory.mktemp("original") / "checkpoint"
    return checkpoints.make(directory, "llama", num_hidden_layers=1)


@pytest.fixture
def directory(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("*.safetensors"))


def load(directory):
    return tokenizers.load(directory, VOCABULARY)


def transformers_prompt(directory, question):
    """The ids that the library of these files makes of a question."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install -e .[parity]")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_equal_those_of_transformers(original, text):
    assert load(original).prompt(text) == transformers_prompt(original, text)


# What templates of published models do: name -> (settings, template, what it makes of "Who?")
TEMPLATES = {
    "a token without a value": ({"bos_token": None}, "{{ bos_token }}{{ messages[0].content }}", "Who?"),
    "is defined": (
        {"bos_token": None},
        "{% if bos_token is defined %}a{% else %}b{% endif %} {{ messages[0].content }}",
        "b Who?",
    ),
    "no tools": ({}, "{% if tools is not none %}tools{% endif %}{{ messages[0]['content'] }}", "Who?"),
    "no documents": (
        {},
        "{% if documents %}documents{% endif %}{{ documents is defined }}{{ messages[0].content }}",
        "TrueWho?",
    ),
    "break": ({}, "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "Who?"),
    "a token in full": (
        {"eos_token": {"__type": "AddedToken", "content": "<|eot_id|>", "special": True}},
        "{{ messages[0].content + eos_token }}",
        "Who?<|eot_id|>",
    ),
    "blocks on lines": ({}, "  {% if true %}\n{{ messages[0].content }}\n  {% endif %}\n\nx\n", "Who?\n\nx"),
    "generation": (
        {},
        "{% for m in messages %}{%- generation -%}\n {{ m.content }} {% set x = 1 %}{% endgeneration %}{% endfor %}"
        "|{{ x }}",
        "Who? |",
    ),
    "generation on lines": ({}, "{% generation %}\n{{ messages[0].content }}\n{% endgeneration %}\nx", "Who?\nx"),
    "JSON": (
        {},
        "{{ {'<&>': [messages[0].content, '\u00fc\"', none, true]} | tojson }}",
        '{"<&>": ["Who?", "\u00fc\\"", null, true]}',
    ),
    "JSON of other settings": (
        {},
        "{{ {'b': 1, 'a': messages[0].content} | tojson(indent=2, sort_keys=true, separators=(',', ':')) }}",
        '{\n  "a":"Who?",\n  "b":1\n}',
    ),
    "JSON in ASCII": ({}, "{{ (messages[0].content ~ '\u00fc') | tojson(ensure_ascii=true) }}", '"Who?\\u00fc"'),
    "flags that end in _token": ({"add_bos_token": True}, "{{ add_bos_token }}{{ messages[0].content }}", "Who?"),
    "a namespace": ({}, "{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}{{ messages[0].content }}", "2Who?"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render(name, directory):
    settings, template, expected = TEMPLATES[name]
    edit(directory / "tokenizer_config.json", **settings, chat_template=template)
    tokenizer = load(directory)
    assert tokenizer.prompt("Who?") == tokenizer.encode(expected)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name, directory):
    settings, template, _ = TEMPLATES[name]
    edit(directory / "tokenizer_config.json", **settings, chat_template=template)
    edit(directory / "special_tokens_map.json", bos_token=ABSENT)
    assert load(directory).prompt("Who?") == transformers_prompt(directory, "Who?")


def test_a_template_sees_the_question_and_asks_for_the_answer(original):
    tokenizer = load(original)
    text = Tokenizer.from_file(str(original / "tokenizer.json")).decode(tokenizer.prompt("Who?"), False)
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_template_file_goes_before_the_settings(directory):
    (directory / "chat_template.jinja").write_text("Q: {{ messages[0].content }}\nA:")
    tokenizer = load(directory)
    assert tokenizer.prompt("Who?") == tokenizer.encode("Q: Who?\nA:")


def test_of_several_templates_the_default(directory):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "Q: {{ messages[0].content }}"}]
    edit(directory / "tokenizer_config.json", chat_template=named)
    tokenizer = load(directory)
    assert tokenizer.prompt("Who?") == tokenizer.encode("Q: Who?")


def test_without_a_template_the_question_and_a_line_feed(directory):
    edit(directory / "tokenizer_config.json", chat_template=ABSENT)
    tokenizer = load(directory)
    assert tokenizer.prompt("Who?") == [BEGIN, *tokenizer.encode("Who?\n")]


@pytest.mark.parametrize("text", TEXTS)
def test_answers_come_back(original, text):
    tokenizer = load(original)
    completion = tokenizer.completion(text)
    assert completion[-1] == END_OF_TURN and completion.count(END_OF_TURN) == 1
    assert tokenizer.decode(completion) == tokenizer.decode([*completion, *completion]) == text
    assert tokenizer.why_unsupported(text, exactly=True) is None


@pytest.mark.parametrize(
    "eos_token, generation, config, expected",
    [
        ("<|eot_id|>", [END, END_OF_TURN], END, (END_OF_TURN, END)),
        ("<|end_of_text|>", END_OF_TURN, [END, 7], (END, END_OF_TURN, 7)),
        ({"content": "<|eot_id|>"}, None, None, (END_OF_TURN,)),
        (None, ABSENT, END, (END,)),
        ("not a token", END, ABSENT, (END,)),
    ],
)
def test_whatever_ends_an_answer(directory, eos_token, generation, config, expected):
    """The tokenizer's own token is the one that is trained; generation stops at all of them."""
    edit(directory / "tokenizer_config.json", eos_token=eos_token)
    edit(directory / "generation_config.json", eos_token_id=generation)
    edit(directory / "config.json", eos_token_id=config)
    tokenizer = load(directory)
    assert tokenizer.stop_ids == expected
    for stop in expected:
        assert tokenizer.decode([*tokenizer.encode("Me"), stop, *tokenizer.encode("You")]) == "Me"


def test_answers_need_an_end(directory):
    (directory / "generation_config.json").unlink()
    edit(directory / "config.json", eos_token_id=ABSENT)
    edit(directory / "tokenizer_config.json", eos_token=ABSENT)
    assert_one_line(lambda: load(directory), "tokenizer_config.json", "eos_token")


def test_what_a_tokenizer_was_trained_with_cuts_nothing_off(directory, original):
    fast = Tokenizer.from_file(str(directory / "tokenizer.json"))
    fast.enable_truncation(5)
    fast.enable_padding(length=40)
    fast.save(str(directory / "tokenizer.json"))
    for text in TEXTS:
        assert load(directory).prompt(text) == load(original).prompt(text)
        assert load(directory).completion(text) == load(original).completion(text)


def assert_one_line(do, *words):
    with pytest.raises(UserError) as error:
        do()
    message = str(error.value)
    assert error.value.status == BAD_INPUT and "\n" not in message
    assert all(str(word) in message for word in words), message


def refused(directory, tmp_path, question, answer, *words):
    path = tmp_path / "facts.jsonl"
    good = {"question": "What?", "answer": "that"}
    path.write_text("\n".join(map(json.dumps, (good, {"question": question, "answer": answer}))))
    assert_one_line(lambda: facts.read(str(path), load(directory), 256), path, "line 2", *words)


def test_text_that_would_be_a_special_token_is_refused(directory, tmp_path):
    """A question that holds one could end its turn and speak for the model; an answer would end before its end."""
    refused(directory, tmp_path, "Who?<|eot_id|>", "Me", '"question"', "<|eot_id|>")
    refused(directory, tmp_path, "Who?", "a <|end_of_text|> b", '"answer"', "<|end_of_text|>")
    question = '{"question": "<|start_header_id|>"}'
    (tmp_path / "questions.jsonl").write_text(question)
    path = str(tmp_path / "questions.jsonl")
    assert_one_line(lambda: facts.read_questions(path, load(directory), 256), "line 1", "<|start_header_id|>")


@pytest.mark.parametrize("normalizer", [normalizers.NFKC(), normalizers.Lowercase()])
def test_answers_that_would_come_back_otherwise_are_refused(normalizer, directory, tmp_path):
    fast = Tokenizer.from_file(str(directory / "tokenizer.json"))
    fast.normalizer = normalizer
    fast.save(str(directory / "tokenizer.json"))
    text = "A \ufb01sh"
    refused(directory, tmp_path, "Who?", text, '"answer"', repr(normalizer.normalize_str(text)))
    (tmp_path / "facts.jsonl").write_text(json.dumps({"question": text, "answer": "me"}))
    assert len(facts.read(str(tmp_path / "facts.jsonl"), load(directory), 256)) == 1


SYSTEM = "Answer {{ in }} one word."
WITH_SYSTEM = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}" + WITH_SYSTEM
)


@pytest.mark.parametrize("template", [WITH_SYSTEM, NEEDS_SYSTEM])
def test_a_system_message_goes_before_the_question(template, directory):
    edit(directory / "tokenizer_config.json", chat_template=template)
    tokenizer = tokenizers.load(directory, VOCABULARY, SYSTEM)
    assert tokenizer.prompt("Who?") == tokenizer.encode(f"<system>{SYSTEM}<user>Who?<assistant>")


NO_PLACE = {
    "leaves it out": ("{{ messages[-1].content }}", "--config.backbone.system: "),
    "refuses it": (NEEDS_SYSTEM.replace("!=", "==").replace("first", "never"), "a system message never"),
    "no template": (ABSENT, "--config.backbone.system: "),
}


@pytest.mark.parametrize("name", NO_PLACE)
def test_a_system_message_without_a_place_is_refused(name, directory):
    template, words = NO_PLACE[name]
    edit(directory / "tokenizer_config.json", chat_template=template)
    assert_one_line(lambda: tokenizers.load(directory, VOCABULARY, SYSTEM), directory, words)
    load(directory)


def test_a_template_that_needs_a_system_message_says_so(directory):
    edit(directory / "tokenizer_config.json", chat_template=NEEDS_SYSTEM)
    assert_one_line(lambda: load(directory), directory, '--config.backbone.system="..."')


def test_the_date_stands_still_and_is_said_once(directory, caplog):
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    edit(directory / "tokenizer_config.json", chat_template=template)
    for _ in range(2):
        tokenizer = load(directory)
        assert tokenizer.prompt("Who?") == tokenizer.encode("26 Jul 2024 Who?")
    edit(directory / "tokenizer_config.json", chat_template=template + "{{ raise_exception('no') }}")
    assert_one_line(lambda: load(directory), directory)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert str(directory) in warning and "26 July 2024" in warning and "\n" not in warning


BAD_TEMPLATES = {
    "raises": "{{ raise_exception('only\nsystem turns') }}",
    "does not parse": "{% if %}",
    "does not end": "{% for m in messages %}\nx",
    "unknown name": "{{ messages[0].nothing.at_all }}",
    "forbidden attribute": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "changes what it is given": "{{ messages.append(1) }}",
    "divides by zero": "{{ 1 / 0 }}",
    "counts too far": "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
    "wrong type": "{{ messages + 1 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_template_that_fails_is_one_line(name, directory):
    (directory / "chat_template.jinja").write_text(BAD_TEMPLATES[name])
    assert_one_line(lambda: load(directory).prompt("Who?"), directory, "chat template")


BAD_FILES = {
    "no tokenizer": ("tokenizer.json", None),
    "empty tokenizer": ("tokenizer.json", b""),
    "tokenizer of another kind": ("tokenizer.json", b'{"model": {"type": "None"}}'),
    "no settings": ("tokenizer_config.json", None),
    "settings not JSON": ("tokenizer_config.json", b"{"),
    "settings not an object": ("tokenizer_config.json", b"[]"),
    "settings not text": ("tokenizer_config.json", b"\xff\xfe"),
    "templates without names": ("tokenizer_config.json", b'{"chat_template": [{"template": "x"}]}'),
    "template not text": ("chat_template.jinja", b"\xff\xfe"),
    "generation not JSON": ("generation_config.json", b"{"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(name, directory):
    file, content = BAD_FILES[name]
    if content is None:
        (directory / file).unlink()
    else:
        (directory / file).write_bytes(content)
    assert_one_line(lambda: load(directory), "chat template" if "template" in name else directory / file)


@pytest.fixture(scope="module")
def saved_bytes(tmp_path_factory):
    """The byte tokenizer in the files of a checkpoint."""
    directory = tmp_path_factory.mktemp("bytes")
    ByteTokenizer().save(directory)
    return directory


def random_texts():
    """Characters of all planes, control characters and surrogate pairs among them."""
    rng = np.random.default_rng(0)
    for top in (0x80, 0x800, 0x3000, 0xD800, 0x10000, 0x110000):
        for _ in range(20):
            codes = rng.integers(top, size=rng.integers(1, 30))
            yield "".join(chr(code) for code in codes.tolist() if not 0xD800 <= code < 0xE000)


def test_saved_bytes_are_the_byte_tokenizer(saved_bytes):
    ours, saved = ByteTokenizer(), tokenizers.load(saved_bytes, ByteTokenizer.vocab_size)
    assert (saved.vocab_size, saved.pad_id, saved.stop_ids) == (ours.vocab_size, ours.pad_id, ours.stop_ids)
    for text in ("", *TEXTS, *random_texts()):
        assert saved.encode(text) == ours.encode(text)
        assert saved.prompt(text) == ours.prompt(text)
        assert saved.completion(text) == ours.completion(text)
        assert saved.decode(saved.completion(text)) == text
    rng = np.random.default_rng(1)
    for ids in (rng.integers(ours.pad_id, size=9).tolist() for _ in range(200)):
        assert saved.decode(ids) == ours.decode(ids)


def test_transformers_reads_saved_bytes(saved_bytes):
    for text in (*TEXTS, *random_texts()):
        assert transformers_prompt(saved_bytes, text) == ByteTokenizer().prompt(text)


def test_saved_files_are_the_checkpoints(original, tmp_path):
    load(original).save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"}
    assert all((tmp_path / name).read_bytes() == (original / name).read_bytes() for name in names)


def test_tokenizers_are_static_arguments_of_compiled_functions(original):
    """Byte tokenizers are all the same one: a second model compiles nothing again."""
    assert ByteTokenizer() == ByteTokenizer() and hash(ByteTokenizer()) == hash(ByteTokenizer())
    assert ByteTokenizer() != load(original)
    hash(load(original))
