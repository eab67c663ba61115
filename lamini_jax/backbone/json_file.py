"""The JSON files of a checkpoint, which are untrusted."""

import json
from pathlib import Path
from typing import Any

from lamini_jax.errors import UserError

_SHOWN = 100  # characters of a value in a message


def read(path: Path) -> dict[str, Any]:
    """The object in a file, in any encoding of JSON. Raises UserError if the file is missing or holds something else.

    If a key occurs twice, the last one counts, as is usual.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object")
    return value


def shown(value: Any) -> str:
    """A value or a name for a message: in one line, and cut off if it is long."""
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def one_line(error: BaseException) -> str:
    """The message of another library's exception, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.isprintable() else repr(text)
