"""The chat template of a checkpoint: an untrusted Jinja program, which runs in a sandbox.

It renders as in the transformers library, except that the date is fixed: with today's date, the same question would
have another prompt tomorrow, and select other experts.
"""

import datetime
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from lamini_jax.backbone.json_file import one_line
from lamini_jax.errors import UserError

Messages = list[dict[str, str]]  # each with a role and its content
Render = Callable[[Messages], str]  # what is said -> what the model reads before it answers

_SYSTEM_FLAG = "--config.backbone.system"
_TODAY = datetime.datetime(2024, 7, 26)  # what the templates of Llama 3 use if they cannot ask for the date
_QUESTIONS = ("Who wrote the letter?", "When was it read?")  # to try a template with
_SYSTEMS = ("Answer in one word.", "Be brief.")


def load(directory: Path, settings: dict[str, Any], system: str = "") -> Render | None:
    """The function that renders messages, after the `system` message if they have none; None without a template.

    `settings` is the checkpoint's tokenizer_config.json. Raises UserError for a template that cannot be read, fails,
    needs a system message or leaves out the one given, or leaves out the question; the function raises it, too.
    """
    source = _source(directory, settings)
    if source is None and system:
        raise UserError(f"{_SYSTEM_FLAG}: {directory} has no chat template, and so no place for a system message")
    if source is None:
        return None
    program = _compile(directory, source, _tokens(settings))

    def render(messages: Messages, system: str = system) -> str:
        told = not system or messages[0]["role"] == "system"
        return program(messages if told else [{"role": "system", "content": system}, *messages])

    _check(directory, lambda question, system=system: render(asking(question), system), system)
    if "strftime_now" in source:
        _warn_of_date(directory)
    return render


def asking(question: str) -> Messages:
    """The messages of a question alone."""
    return [{"role": "user", "content": question}]


def _check(directory: Path, render: Callable[..., str], system: str) -> None:
    """Raises UserError for a template that fails, or whose text does not depend on the question or system message."""
    first, second = _QUESTIONS
    try:
        text = render(first)
    except UserError:
        if not system and _renders(render, first, _SYSTEMS[0]):
            message = f'{directory}: its chat template needs a system message; give one with {_SYSTEM_FLAG}="..."'
            raise UserError(message) from None
        raise
    if text == render(second):
        raise UserError(f"{directory}: its chat template leaves out the question: every prompt would be the same")
    if system and all(render(first, other) == text for other in _SYSTEMS):
        raise UserError(f"{_SYSTEM_FLAG}: the chat template of {directory} leaves out the system message")


def _renders(render: Callable[..., str], *arguments: str) -> bool:
    try:
        render(*arguments)
    except UserError:
        return False
    return True


def _source(directory: Path, settings: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    try:
        source = path.read_text("utf-8") if path.exists() else settings.get("chat_template")
        if isinstance(source, list):  # several, with names
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not isinstance(source, str | None):
            raise TypeError(f"{type(source).__name__}, not a text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory}: its chat template cannot be read ({one_line(error)})") from None
    return source


def _tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The special tokens by their names. One without a value is left out: a template renders it as an empty text."""
    named = {name: value for name, value in settings.items() if name.endswith("_token")}
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: value for name, value in tokens.items() if isinstance(value, str)}


def _compile(directory: Path, source: str, tokens: dict[str, str]) -> Callable[[Messages], str]:
    try:
        import jinja2.sandbox
    except ImportError:
        raise UserError(f"{directory}: its chat template needs jinja2; pip install -e .[hf]") from None

    def refuse(message):
        raise jinja2.TemplateError(message)

    def strftime_now(form):
        return _TODAY.strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_blocks()]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": strftime_now, "tools": None, "documents": None}
    failed = f"{directory}: its chat template fails"
    try:
        template = environment.from_string(source)
    except Exception as error:  # an untrusted program may fail in any way
        raise UserError(f"{failed} ({one_line(error)})") from None

    def run(messages: Messages) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=True, **tokens)
        except Exception as error:
            raise UserError(f"{failed} ({one_line(error)})") from None

    return run


def _generation_blocks() -> type:
    """{% generation %} ... {% endgeneration %} marks the assistant's text for training; it renders as its body."""
    import jinja2.ext

    class GenerationBlocks(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    return GenerationBlocks


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Plain JSON: Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _warn_of_date(directory: Path) -> None:
    today = f"{_TODAY:%d %B %Y}"
    logging.warning(
        "%s: its chat template asks for the date; it always gets %s, so that prompts do not change", directory, today
    )
