"""JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from lamini_jax.errors import UserError


def read(path: Path) -> dict[str, Any]:
    """The object in a file. Raises UserError if the file is missing, or holds something else."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object")
    return value
