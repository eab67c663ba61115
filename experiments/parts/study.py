"""What every study does: it owns a directory, keeps each result that it has measured, and ends in a table."""

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lamini_jax import command, processes
from lamini_jax.config import Config


def directory_of(workdir: str, config: Config, **identity: Any) -> Path:
    """The study's directory, bound to its config and to what else it depends on. Raises UserError if it is another's.

    The mesh may differ: any devices may go on with what others began.
    """
    values = dataclasses.asdict(config)
    del values["mesh"]
    return command.open_workdir(workdir, {"config": values, **identity})


def kept(path: Path, measure: Callable[[], dict]) -> dict:
    """What was measured, with its seconds: read if the file is there, so that a killed study goes on after it."""
    if not processes.agree(path.exists()):
        started = time.time()
        result = measure()
        command.write_json(path, result | {"seconds": round(time.time() - started, 1)})
    processes.meet(path.name)
    return json.loads(path.read_text())


def certificates(certified_F: np.ndarray, exact_F: np.ndarray) -> dict[str, int]:
    """How many facts are certified, and how many of those were not recalled: the paper's thesis, counted."""
    return {"certified": int(certified_F.sum()), "certified_but_wrong": int((certified_F & ~exact_F).sum())}


def added(measured: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The `certificates` of several measurements together."""
    counts = list(measured)
    return {name: sum(count[name] for count in counts) for name in ("certified", "certified_but_wrong")}


def finish(directory: Path, results: Mapping[str, Any], table: str, draw: Callable[[dict, Path], None]) -> None:
    """Writes results.json, which has the table and the command too, and figures.png; shows table and verdicts."""
    module = sys.modules["__main__"].__spec__  # none where python was started in another way than with -m
    shown = shlex.join([*(["python", "-m", module.name] if module else sys.argv[:1]), *sys.argv[1:]])
    results = {**results, "table": table, "command": shown, "environment": command.environment()}
    command.write_json(directory / "results.json", results)
    if processes.first():
        draw(results, directory / "figures.png")
    processes.say(table)
    for claim in results["claims"]:
        processes.say(f"{claim['verdict']}: {claim['paper']}\n    {claim['measured']}")
    processes.say(f"{results['seconds']:.0f} s; {directory / 'results.json'}, {directory / 'figures.png'}")
