"""What all studies share: the command line, a directory, keeping each measured result, and a table at the end.

A study has a `main(arguments)`, a `table(results)` and, if it judges the paper, `claims(results)`. Importing it defines
no flags, so that the report can make tables and claims of all studies in one process.
"""

import dataclasses
import json
import shlex
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from experiments.shared.claims import Claim
from lamini_jax import Config, Fact, UserError
from lamini_jax import config as config_lib
from lamini_jax.backbone import frozen_model
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.configure import configure
from lamini_jax.data import datasets
from lamini_jax.data import facts as facts_lib
from lamini_jax.runtime import cli, processes, workdir

# The flags defined here are those of the study that is started, so that its --help lists them.
flags.disclaim_key_flags()

_DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "tiny.py"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A study's command line."""

    config: Config
    workdir: str
    flags: types.SimpleNamespace  # the values of the study's own flags
    overrides: list[str]  # the flags that give another study the same config


def start(
    main: Callable[[Arguments], None], define_flags: Callable[[], None] = lambda: None, on_devices: bool = True
) -> None:
    """Defines the flags, parses the command line, makes the mesh ambient, calls `main` and exits with its status.

    `on_devices=False` is for a study that computes nothing in this process: without mesh, flags for several processes
    and use of accelerators.
    """
    config = cli.define_config(str(_DEFAULT_CONFIG))
    directory = flags.DEFINE_string("workdir", None, "Directory of the results.", required=True)
    if on_devices:
        cli.define_processes()
    common = set(flags.FLAGS)
    define_flags()
    own = set(flags.FLAGS) - common

    def run_main():
        if not on_devices:
            jax.config.update("jax_platforms", "cpu")
        values = types.SimpleNamespace(**{name: flags.FLAGS[name].value for name in own})
        arguments = Arguments(configure(config.value), directory.value, values, config_overrides(config.value))
        if on_devices:
            cli.start(arguments.config.execution.mesh)
        return main(arguments)

    cli.run(run_main)


def config_overrides(values: ml_collections.ConfigDict) -> list[str]:
    """The fields of a config that differ from the default, as flags."""
    default = dict(cli.flatten(dataclasses.asdict(config_lib.tiny())))
    given = cli.flatten(values.to_dict())
    return [f"--config.{name}={value}" for name, value in given if value != default.get(name)]


def positive_integers(name: str, values: Iterable[str]) -> list[int]:
    """The values of the list flag `name`. Raises UserError if one is not a positive whole number."""
    texts = list(values)
    for text in texts:
        if not text.strip().isdecimal() or int(text) < 1:
            raise UserError(f"--{name}={','.join(texts)}: {text!r} is not a positive whole number")
    return list(map(int, texts))


def load(config: Config, answers: str) -> tuple[FrozenModel, list[Fact]]:
    """The backbone and the facts that a config names, with true or random answers."""
    model = frozen_model.load(config)
    return model, datasets.load(config.data, answers, config.seed, model.tokenizer, model.max_seq_len)


def open_study(
    directory: str, config: Config, model: FrozenModel | None = None, facts: Sequence[Fact] = (), **more: Any
) -> Path:
    """The study's directory, which belongs to its config and all else it depends on. Raises UserError for another's.

    How the config is executed may differ: a study may be continued on other devices.
    """
    prints = {"backbone": model and model.fingerprint, "facts": facts_lib.fingerprint(facts)}
    return workdir.open_workdir(directory, {"config": config_lib.identity(config), **prints, **more})


def cached(path: Path, measure: Callable[..., dict], *arguments: Any) -> dict:
    """The result of `measure`, with its seconds: read if its file exists, so that a killed study continues after it."""
    if not processes.broadcast(path.exists()):
        started = time.time()
        result = measure(*arguments)
        workdir.write_json(path, result | {"seconds": round(time.time() - started, 1)})
    processes.barrier(path.name)
    return json.loads(path.read_text())


def certificates(certified_F: np.ndarray, exact_F: np.ndarray) -> dict[str, int]:
    """How many facts are certified, and how many of those were not recalled: the test of the paper's thesis."""
    return {"certified": int(certified_F.sum()), "certified_but_wrong": int((certified_F & ~exact_F).sum())}


def sum_certificates(counts: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The `certificates` of several measurements together."""
    counts = list(counts)
    return {name: sum(count[name] for count in counts) for name in ("certified", "certified_but_wrong")}


def totals(measured: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The seconds of several `cached` measurements together, and their certificates, if they have any."""
    results = list(measured)
    counts = [result["certificates"] for result in results if "certificates" in result]
    certificates = {"certificates": sum_certificates(counts)} if counts else {}
    return {"seconds": round(sum(result["seconds"] for result in results), 1), **certificates}


def finish(
    directory: Path,
    results: Mapping[str, Any],
    table: Callable[[dict], str],
    claims: Callable[[dict], list[Claim]] = lambda results: [],
    draw: Callable[[dict, Path], None] | None = None,
) -> None:
    """Writes results.json (what was measured, the command, the environment) and figures.png; prints table and claims.

    Table, claims and figure are functions of results.json alone, from which the report makes its page.
    """
    module = sys.modules["__main__"].__spec__  # None unless python was started with -m
    command = shlex.join([*(["python", "-m", module.name] if module else sys.argv[:1]), *sys.argv[1:]])
    results = {**results, "command": command, "environment": workdir.environment()}
    workdir.write_json(directory / "results.json", results)
    results = json.loads(json.dumps(results))
    written = [directory / "results.json"]
    if draw:
        written.append(directory / "figures.png")
        if processes.is_primary():
            draw(results, written[-1])
    processes.print_once("\n".join([table(results), *map(str, claims(results))]))
    processes.print_once(f"{results['seconds']:.0f} s; {', '.join(map(str, written))}")
