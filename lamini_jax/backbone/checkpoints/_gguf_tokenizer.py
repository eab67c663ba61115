"""The tokenizer in the metadata of a GGUF file, as the tokenizers library reads it from a tokenizer.json.

llama.cpp keeps two kinds apart that are both byte pair encodings: `gpt2`, over bytes that are written as letters, with
the name of the expression that cuts a text into words; and `llama`, SentencePiece over characters, with scores.
"""

import functools
from pathlib import Path
from typing import Any

from absl import logging

from lamini_jax.backbone.checkpoints._gguf_file import File
from lamini_jax.backbone.json_file import one_line, shown
from lamini_jax.backbone.tokenizer import CheckpointTokenizer
from lamini_jax.errors import UserError

_UNKNOWN, _NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 1, 3, 4, 5, 6  # types of tokens
# Names of special tokens in tokenizer_config.json -> in the metadata.
_SPECIALS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_SPACE = "\u2581"  # how SentencePiece writes a space

# How words are cut, by the names of pre-tokenizers: expressions that are applied in turn.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN += r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace("{1,3}", ""),),
    "tekken": (_TEKKEN,),
}
# Those that take a word that is a token as it is, without merging, and begin a text with the bos token.
_WHOLE_WORDS = ("llama-bpe", "tekken")
_COMPOSED = ("qwen2",)  # those of which the original tokenizers compose characters with their accents (NFC)


def load(file: File, vocab_size: int, system: str) -> CheckpointTokenizer:
    """The tokenizer of a file. Raises UserError if it has none, or one that is not understood."""
    path, about = file.path, _about(file)
    texts = about["tokens"]
    if len(texts) > vocab_size:
        raise UserError(f"{path}: has {len(texts)} tokens, and the backbone's vocabulary is {vocab_size}")
    ids = {name: _special_id(path, about, name) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    if ids["eos"] is None:
        raise UserError(f"{path}: names no tokenizer.ggml.eos_token_id to end an answer with")
    template = file.metadata.get("tokenizer.chat_template")
    # What ends a turn: a template that does not write the eos token leaves that to the eot token.
    if ids["eot"] is not None and isinstance(template, str) and "eos_token" not in template:
        ids["eos"], ids["eot"] = ids["eot"], ids["eos"]
    settings: dict[str, Any] = {name: texts[ids[key]] for name, key in _SPECIALS.items() if ids[key] is not None}
    if template is not None:
        settings["chat_template"] = template
    stops = [ids[name] for name in ("eos", "eot", "eom")]
    return CheckpointTokenizer(path, _library_object(path, about, ids), settings, stops, system)


def _about(file: File) -> dict[str, Any]:
    """The metadata of the tokenizer, its keys without their beginning. Raises UserError for what is not one."""
    path, start = file.path, "tokenizer.ggml."
    about = {key.removeprefix(start): value for key, value in file.metadata.items() if key.startswith(start)}
    kind, texts = about.get("model"), about.get("tokens")
    if kind in (None, "none", "no_vocab") or texts is None:
        raise UserError(f"{path}: has no tokenizer in its metadata; convert the model again, with its tokenizer")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{path}: tokenizer.ggml.model {shown(kind)} is not supported; gpt2 and llama are")
    if about.get("precompiled_charsmap"):
        raise UserError(f"{path}: tokenizer.ggml.precompiled_charsmap is not supported")
    _check_list(path, about, "tokens", str)
    about.setdefault("token_type", [_NORMAL] * len(texts))
    _check_list(path, about, "token_type", int, len(texts))
    if kind == "gpt2":
        _check_list(path, about, "merges", str)
    else:
        _check_list(path, about, "scores", float, len(texts))
    if len(set(texts)) < len(texts):
        twice = next(text for number, text in enumerate(texts) if texts.index(text) < number)
        raise UserError(f"{path}: has the token {shown(twice)} twice")
    for key in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if type(about.get(key, False)) is not bool:
            raise UserError(f"{path}: tokenizer.ggml.{key} {shown(about[key])} is not true or false")
    return about


def _check_list(path: Path, about: dict[str, Any], key: str, kind: type, count: int | None = None) -> None:
    """Raises UserError for what is not a list of this kind, or does not have `count` entries."""
    values = about.get(key)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise UserError(f"{path}: has no list tokenizer.ggml.{key} of the tokenizer {about['model']}")
    if count not in (None, len(values)):
        raise UserError(f"{path}: has {len(values)} in tokenizer.ggml.{key} and {count} tokens")


def _special_id(path: Path, about: dict[str, Any], name: str) -> int | None:
    key, count = f"{name}_token_id", len(about["tokens"])
    value = about.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < count):
        raise UserError(f"{path}: tokenizer.ggml.{key} {shown(value)} is not one of {count} tokens")
    return value


def _library_object(path: Path, about: dict[str, Any], ids: dict[str, int | None]):
    """The tokenizers library's object. Raises UserError if there cannot be one."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise UserError(f"{path}: needs the tokenizers library; pip install -e .[gguf]") from None
    try:
        return _made(path, about, ids)
    except UserError:
        raise
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"{path}: its tokenizer cannot be made ({one_line(error)})") from None


def _made(path: Path, about: dict[str, Any], ids: dict[str, int | None]):
    from tokenizers import AddedToken, processors

    texts, types = about["tokens"], about["token_type"]
    vocabulary = {text: number for number, text in enumerate(texts) if types[number] != _UNUSED}
    if about["model"] == "gpt2":
        tokenizer, begins = _byte_level(path, about, vocabulary)
    else:
        tokenizer, begins = _sentencepiece(about, vocabulary, ids["unknown"]), True
    added = ((text, kind) for text, kind in zip(texts, types, strict=True) if text)
    special = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}
    tokens = [AddedToken(text, special=special[kind], normalized=False) for text, kind in added if kind in special]
    tokenizer.add_tokens(tokens)
    around = {"bos": about.get("add_bos_token", begins), "eos": about.get("add_eos_token", False)}
    around = {name: texts[ids[name]] for name, wanted in around.items() if wanted and ids[name] is not None}
    if around:
        single = [around.get("bos"), "$A", around.get("eos")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in single if part],
            special_tokens=[(text, texts.index(text)) for text in around.values()],
        )
    return tokenizer


def _byte_level(path: Path, about: dict[str, Any], vocabulary: dict[str, int]):
    """A tokenizer over bytes, and whether it begins texts with the bos token unless the metadata says otherwise."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = about.get("pre", "default")
    if name not in _WORDS:
        known = ", ".join(_WORDS)
        raise UserError(f"{path}: tokenizer.ggml.pre {shown(name)} is not supported; one of {known} is")
    if "pre" not in about:
        _warn_of_default(path)
    merges = [tuple(merge.split(" ")) for merge in about["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in _WHOLE_WORDS))
    words = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in _WORDS[name]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    if name in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, name in _WHOLE_WORDS


def _sentencepiece(about: dict[str, Any], vocabulary: dict[str, int], unknown: int | None):
    """A tokenizer over characters: of two neighbours, those are merged first that make the token of the best score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scored = []
    for text, kind, score in zip(about["tokens"], about["token_type"], about["scores"], strict=True):
        if kind == _NORMAL:
            cuts = ((text[:cut], text[cut:]) for cut in range(len(text) - 1, 0, -1))
            scored += [(-score, cut) for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
    merges = [cut for _, cut in sorted(scored, key=lambda pair: pair[0])]
    unknown_text = None if unknown is None else about["tokens"][unknown]
    falls_back = _BYTE in about["token_type"]
    model = models.BPE(vocabulary, merges, unk_token=unknown_text, fuse_unk=True, byte_fallback=falls_back)
    tokenizer, prefix = Tokenizer(model), about.get("add_space_prefix", True)
    to_marks = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*to_marks, normalizers.Replace(" ", _SPACE)])
    from_marks = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*from_marks, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


@functools.cache
def _warn_of_default(path: Path) -> None:
    message = (
        "%s: does not name its pre-tokenizer (tokenizer.ggml.pre); texts are cut into words as llama.cpp then does"
    )
    logging.warning(message, path)
