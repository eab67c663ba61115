"""Bad input by its kinds: what is tried, counted while it is collected. `pytest tests/test_kinds.py -s` prints it."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

TABLE: dict[str, list[str]] = {}  # kind -> the names of its instances


def instances(kind: str, names: Iterable[str]) -> None:
    """Counts instances that a test tries together."""
    TABLE.setdefault(kind, []).extend(names)


def cases(table: Mapping[str, Mapping[str, Any]]) -> list:
    """Parameters of a test from kind -> instance -> its arguments (a tuple) or argument, all of them counted."""
    found = []
    for kind, tried in table.items():
        instances(kind, tried)
        for name, case in tried.items():
            found.append(pytest.param(*(case if isinstance(case, tuple) else (case,)), id=f"{kind}: {name}"))
    return found


def markdown() -> str:
    """The table as it is printed."""
    rows = [f"| {kind} | {len(names)} | {', '.join(names)} |" for kind, names in sorted(TABLE.items())]
    total = f"{len(TABLE)} kinds, {sum(map(len, TABLE.values()))} instances"
    return "\n".join(["| kind | number | instances |", "| --- | --- | --- |", *rows, "", total])
