"""What the commands share: flags whose every mistake is one line, and how a command starts and ends.

A command is a module that defines absl flags and hands its `main` over:

    _CONFIG = cli.define_config()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)

    def main() -> None:
        config = configure(_CONFIG.value)

    if __name__ == "__main__":
        cli.run(main)

`absl.app.run` is not used: it turns on INFO logging, exits with 1 after `--help`, and answers a wrong flag with several
lines or a traceback.
"""

import dataclasses
import difflib
import importlib.util
import os
import re
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
    from lamini_jax.runtime import processes, sharding

    f = flags.FLAGS
    if f.multihost:
        processes.start(f.coordinator, f.num_processes, f.process_id, f.join_timeout)
    elif f.coordinator or f.num_processes or f.process_id is not None:
        raise UserError("--coordinator, --num_processes and --process_id go with --multihost")
    sharding.set_mesh(mesh)


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
        from lamini_jax.runtime import processes  # here and below, so that a bad flag need not wait for jax

        status = processes.lost_process_status(error)
        if status is None:
            raise
    from lamini_jax.runtime import processes

    processes.exit_process(status or 0)


def require(extra: str, *modules: str) -> None:
    """Raises UserError if one of the modules that an extra of setup.cfg installs is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: pip install -e .[{extra}]")


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
    fields = dict(flatten(dataclasses.asdict(config_lib.Config())))
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
        rules = config_lib.ranges()
        for name, value in flatten(dataclasses.asdict(config_lib.tiny())):
            print(f"  --config.{name}={value}{f'  ({rules[name]})' if name in rules else ''}")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by their dotted names."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
