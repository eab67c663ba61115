"""The chat template of a checkpoint: a Jinja program by strangers, which runs in a sandbox."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamini_jax.errors import UserError

Render = Callable[[list[dict[str, str]]], str]  # messages, each with a role and its content -> text


def load(directory: Path, settings: dict[str, Any]) -> Render | None:
    """What renders messages as the checkpoint was trained to read them; None if it has no template.

    `settings` is its tokenizer_config.json. Raises UserError for a template that cannot be read, or later, when it
    fails.
    """
    source = _source(directory, settings)
    if source is None:
        return None
    try:
        import jinja2.sandbox
    except ImportError:
        raise UserError(f"{directory}: its chat template needs jinja2; pip install -e .[hf]") from None
    # What has no value is left out: in a template that is an empty text, and None is not.
    tokens = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token") and value is not None
    }

    def refuse(message):
        raise jinja2.TemplateError(message)

    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(**options)
    environment.globals |= {"raise_exception": refuse, "tools": None, "documents": None}

    def render(messages):
        # No date: a template that asks for today's would make other prompts tomorrow, and select other experts.
        try:
            template = environment.from_string(source)
            return template.render(messages=messages, add_generation_prompt=True, **tokens)
        except Exception as error:  # a stranger's program may fail in any way
            raise UserError(f"{directory}: its chat template fails ({' '.join(str(error).split())})") from None

    return render


def _source(directory: Path, settings: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    try:
        source = path.read_text() if path.exists() else settings.get("chat_template")
        if isinstance(source, list):  # several, with names
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory}: its chat template cannot be read ({error})") from None
    return source
