"""What the commands share: flags whose every mistake is one line, and a directory that belongs to one configuration.

A command is a module that defines absl flags and hands its `main` over:

    _CONFIG = command.define_config()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)

    def main() -> None:
        config = model.configure(_CONFIG.value)

    if __name__ == "__main__":
        command.run(main)

`absl.app.run` is not used: it turns on INFO logging, exits with 1 after `--help`, and answers a wrong flag with several
lines or a traceback.
"""

import dataclasses
import difflib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from lamini_jax import config as config_lib
from lamini_jax.errors import UserError

# The flags defined here belong to the command that asks for them, so that its --help lists them.
flags.disclaim_key_flags()

_DEFAULT_CONFIG = str(Path(config_lib.__file__).resolve())
# Where the config flag looks for overrides. `run` fills it: sys.argv itself would be read while modules are imported,
# where a bad flag is a traceback.
_ARGV: list[str] = []


def define_config() -> flags.FlagHolder[ml_collections.ConfigDict]:
    """Defines `--config=FILE` and its `--config.GROUP.FIELD=VALUE`; `lamini_jax/config.py` is the default file."""
    holder = config_flags.DEFINE_config_file("config", None, "Config file.", sys_argv=_ARGV)
    flags.FLAGS["config"].default_as_str = f"'{_DEFAULT_CONFIG}'"  # which `run` adds
    return holder


def define_processes() -> None:
    """Defines the flags of a command that runs as several processes, one per host."""
    flags.DEFINE_bool("multihost", False, "One of several processes, all started with the same flags.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; TPU pods and SLURM need none.")
    flags.DEFINE_integer("num_processes", None, "How many there are, where --coordinator is needed.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", lower_bound=0)
    flags.DEFINE_integer("join_timeout", 300, "Seconds in which they must find each other.", lower_bound=1)


def start(mesh: config_lib.MeshConfig) -> None:
    """Joins the other processes, if there are any, and makes the mesh of all devices ambient."""
    from lamini_jax import sharding

    f, processes = flags.FLAGS, _processes()
    if f.multihost:
        processes.start(f.coordinator, f.num_processes, f.process_id, f.join_timeout)
    elif f.coordinator or f.num_processes or f.process_id is not None:
        raise UserError("--coordinator, --num_processes and --process_id go with --multihost")
    sharding.use(mesh)


def run(main: Callable[[], int | None]) -> None:
    """Parses `sys.argv`, calls `main()` and exits with its status.

    A bad flag, a leftover argument and a UserError become `error: MESSAGE` on stderr and status 2 (or the error's own);
    an interrupt becomes one line and status 130. `--help` prints the command's docstring and flags.
    """
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            status = _print_help()
        else:
            _parse_flags(sys.argv)
            status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except Exception as error:
        status = _processes().lost(error)
        if status is None:
            raise
    _processes().end(status or 0)


def _processes():
    """The module, here because commands that fail on their flags should fail fast: it brings jax."""
    from lamini_jax import processes

    return processes


def require(extra: str, *modules: str) -> None:
    """Raises UserError if one of the modules that an extra of setup.cfg installs is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: pip install -e .[{extra}]")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` to a file that is never seen half-written. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file, once for all processes, that is never seen half-written. Raises UserError if it cannot be."""
    if not _processes().first():
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def environment() -> dict[str, str]:
    """What figures depend on beside the code: machine, devices and versions."""
    import jax  # here, because commands that fail on their flags should fail fast

    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "devices": devices, **versions}


def open_workdir(workdir: str, identity: Mapping[str, Any]) -> Path:
    """Returns the directory of a run, made if need be and bound to what the run depends on.

    `identity` (the config as a dict, fingerprints of the data) is kept in its `config.json`. Raises UserError if the
    directory cannot be used or if it belongs to a run with another identity.
    """
    if not workdir:
        raise UserError("--workdir is empty: name a directory")
    directory = Path(workdir)
    saved_path = directory / "config.json"
    identity = json.loads(json.dumps(identity))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise UserError(f"--workdir={workdir}: not writable")
        if not saved_path.exists():
            write_json(saved_path, identity)
        _processes().meet("workdir")
        saved = json.loads(saved_path.read_text())
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--workdir={workdir}: a file, or below one, and not a directory") from None
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{saved_path}: not JSON ({error}); remove {workdir} or use another --workdir") from None
    if saved != identity:
        raise UserError(
            f"--workdir={workdir} holds a run that differs in {_differences(saved, identity)}; "
            "use another --workdir, or remove this one"
        )
    return directory


def _parse_flags(argv: list[str]) -> None:
    parser = flags.FLAGS
    parser.set_gnu_getopt(True)  # or flags after a stray argument are ignored, and one of them is reported missing
    try:
        argv = [argv[0], *parser.read_flags_from_files(argv[1:])]
        if "config" in parser:
            _check_overrides(argv)
            if not any(re.match(r"--?config(=|$)", argument) for argument in argv):
                # As an argument: a flag's default takes no overrides, and leaves its names to the file loaded next.
                argv.insert(1, f"--config={_DEFAULT_CONFIG}")
            _ARGV[:] = argv
        leftover = parser(argv)[1:]
    except flags.Error as error:
        raise UserError(_one_line(error)) from None
    except SyntaxError as error:
        raise UserError(f"--config={error.filename}: not Python: {error.msg} (line {error.lineno})") from None
    except AttributeError as error:
        if error.name != "get_config":
            raise
        raise UserError("--config: the file does not define get_config()") from None
    if leftover:
        raise UserError(f"unexpected argument {leftover[0]!r}: everything is given as --FLAG=VALUE")
    if "config" in parser and not isinstance(parser["config"].value, ml_collections.ConfigDict):
        filename = parser["config"].config_filename
        raise UserError(f"--config={filename}: not a file whose get_config() returns to_config_dict(CONFIG)")


def _check_overrides(argv: list[str]) -> None:
    """Refuses `--config=FILE` without such a file and `--config.FIELD` without such a field: tracebacks otherwise."""
    fields = dict(_flatten(dataclasses.asdict(config_lib.Config())))
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        path = value if equals else following
        if re.fullmatch("--?config", name) and not os.path.isfile(path):
            raise UserError(f"--config={path}: no such file")
        override = re.fullmatch(r"--?(?:no)?config\.(.*)", name)
        if override and override[1] not in fields:
            raise UserError(f"--config.{override[1]}: no such field; {_near_fields(override[1], list(fields))}")


def _near_fields(name: str, fields: list[str]) -> str:
    for group in (name, name.rpartition(".")[0]):
        members = [field.removeprefix(f"{group}.") for field in fields if field.startswith(f"{group}.")]
        if members:
            return f"config.{group} has {', '.join(members)}"
    close = difflib.get_close_matches(name, fields, n=1)
    return f"did you mean --config.{close[0]}?" if close else "--help lists them all"


def _one_line(error: flags.Error) -> str:
    required = re.match(r"flag (--\w+)=None: .* must have a value other than None", str(error))
    if required:
        return f"{required[1]} is required"
    # An exception inside a config file arrives here with its traceback: the last line says what it was.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"


def _print_help() -> None:
    print((sys.modules["__main__"].__doc__ or "").strip())
    print(flags.FLAGS.main_module_help())
    if "config" in flags.FLAGS:
        print("\nfields of the default config:")
        for name, value in _flatten(dataclasses.asdict(config_lib.tiny())):
            print(f"  --config.{name}={value}")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differences(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    old, new = dict(_flatten(saved)), dict(_flatten(asked))
    changes = []
    for key in dict.fromkeys([*old, *new]):
        before, after = (json.dumps(values[key]) if key in values else "(absent)" for values in (old, new))
        if before != after:
            changes.append(f"{key}: {before} -> {after}")
    return ", ".join(changes)
