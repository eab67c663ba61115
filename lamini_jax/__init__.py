"""Lamini-1 in JAX: a frozen language model with a mixture of memory experts.

    import lamini_jax

    lamini_jax.tune("facts.jsonl", "runs/mine")
    memory = lamini_jax.load("runs/mine")
    print(memory.ask("Who wrote it?").text)

Names are imported when they are first used, so that `import lamini_jax` costs nothing.
"""

import importlib
from typing import Any

_HOME = {
    "Answer": "memories",
    "Config": "config",
    "Fact": "data.facts",
    "Memory": "memories",
    "UserError": "errors",
    "load": "api",
    "load_backbone": "api",
    "logits": "backbone.transformer",
    "open_memory": "api",
    "tune": "api",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
