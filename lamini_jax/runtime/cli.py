"""What the commands share: flags, errors reported in one line each, and how a command starts and exits.

A command is a module that defines absl flags and passes its `main` to `run`:

    _CONFIG = cli.define_config()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)

    def main() -> None:
        config = configure(_CONFIG.value)

    if __name__ == "__main__":
        cli.run(main)

`absl.app.run` is not used: it turns on INFO logging, exits with 1 after `--help`, and reports a wrong flag in several
lines or with a traceback.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import math
import os
import re
import runpy
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from lamini_jax import config as config_lib
from lamini_jax.errors import BAD_INPUT, DEVICES, DOES_NOT_FIT, UserError
from lamini_jax.runtime import paths, user_cache

_CACHE = flags.DEFINE_string(
    "cache_dir", user_cache.default(), "What later commands need again: compiled programs, calibration; empty: nowhere."
)
flags.DEFINE_bool("traceback", False, "Shows the traceback of an unexpected error instead of writing it to a file.")
# The flags defined here belong to the command that asks for them, so that its --help lists them.
flags.disclaim_key_flags()

# Where the config flag looks for overrides. `run` fills it: sys.argv itself would be read while modules are imported,
# when a bad flag would still end in a traceback.
_ARGV: list[str] = []


def define_config(default: str = config_lib.__file__) -> flags.FlagHolder[ml_collections.ConfigDict]:
    """Defines `--config=FILE` and its `--config.GROUP.FIELD=VALUE`; `default` is the file if none is given."""
    holder = config_flags.DEFINE_config_file("config", None, "Config file.", sys_argv=_ARGV)
    flags.FLAGS["config"].default_as_str = f"'{Path(default).resolve()}'"  # which `run` adds
    return holder


def define_processes() -> None:
    """Defines the flags of a command that runs as several processes, one per host."""
    flags.DEFINE_bool("multihost", False, "This is one of several processes, all started with the same flags.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; TPU pods and SLURM need none.")
    flags.DEFINE_integer("num_processes", None, "How many there are, where --coordinator is needed.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", lower_bound=0)
    flags.DEFINE_integer("join_timeout", 300, "Seconds in which they must find each other.", lower_bound=1)


def start(mesh: config_lib.MeshConfig) -> None:
    """Joins the other processes, if there are any, and makes the mesh of all devices ambient."""
    from lamini_jax.runtime import processes

    f = flags.FLAGS
    if f.multihost:
        processes.start(f.coordinator, f.num_processes, f.process_id, f.join_timeout)
    elif f.coordinator or f.num_processes or f.process_id is not None:
        raise UserError("--coordinator, --num_processes and --process_id go with --multihost")
    use_devices(mesh)


def use_devices(mesh: config_lib.MeshConfig) -> None:
    """Makes the mesh of all devices ambient. Raises UserError (DEVICES) if there are none, or others."""
    import jax

    from lamini_jax.runtime import processes, sharding

    processes.keep_freed_memory()
    processes.compile_quickly_for_gpus()
    jax.config.update("jax_enable_x64", False)  # JAX_ENABLE_X64 would change every number
    user_cache.use(_CACHE.value)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # what jax says where JAX_PLATFORMS names a device that is not here
        asked, reason = os.environ.get("JAX_PLATFORMS", ""), " ".join(str(error).split())[:200]
        raise UserError(f"JAX_PLATFORMS={asked}: no such device can be used here {reason}".rstrip(), DEVICES) from None
    sharding.set_mesh(mesh)


def run(main: Callable[[], int | None], remote: Sequence[str] = ()) -> None:
    """Parses `sys.argv`, calls `main()` and exits with its status. `remote` names the flags that may name a bucket.

    Every error is one line on stderr and a status of `errors.py`: 2 for a bad flag, a leftover argument and a UserError
    without another status. An unexpected error has status 1 and leaves its traceback in a file (`_explain`). `--help`
    prints the command's docstring and flags.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter shows its number
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            status = _print_help()
        else:
            _parse_flags(sys.argv, remote)
            status = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException as error:
        status = _report(error)
    from lamini_jax.runtime import processes  # here, so that a bad flag need not wait for jax

    processes.exit_process(status or 0)


def _report(error: BaseException) -> int:
    """Prints what went wrong in one line and returns the exit status."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, BrokenPipeError):  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if isinstance(error, KeyboardInterrupt):
        message, status = "interrupted", 128 + signal.SIGINT
    elif isinstance(error, UserError):
        message, status = f"error: {error}", error.status
    elif said := paths.failure(error):
        message, status = f"error: the storage failed ({said}); what is saved there is whole: run again", BAD_INPUT
    else:
        from lamini_jax.runtime import processes

        status = processes.lost_process_status(error)
        if status is not None:
            return status
        message, status = _explain(error)
    print(message, file=sys.stderr)
    return status


def _explain(error: BaseException) -> tuple[str, int]:
    """The message for an unexpected error, and its status; the traceback is in a file or, with --traceback, in it."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        asked = re.search(r"allocat\w* ([\d.]+ ?[KMGT]?i?B|\d+ bytes)", text)
        missing = f" ({asked[1]} could not be allocated)" if asked else ""
        return f"error: out of memory{missing}; take fewer experts or smaller batches", DOES_NOT_FIT
    if isinstance(error, OSError) and sys.stdout is not None and error.filename is None:
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return f"error: the standard output cannot be written ({error.strerror})", BAD_INPUT
    details = traceback.format_exc()
    if flags.FLAGS.is_parsed() and flags.FLAGS.traceback:
        return details.rstrip(), 1
    directory = getattr(flags.FLAGS, "workdir", None) if flags.FLAGS.is_parsed() else None
    directory = directory if directory and os.path.isdir(directory) else tempfile.gettempdir()
    path = os.path.join(directory, f"traceback-{time.strftime('%Y%m%d-%H%M%S')}.txt")
    with contextlib.suppress(OSError), open(path, "w") as file:
        file.write(f"{shlex.join(sys.argv)}\n{details}")
    what = f"{type(error).__name__}: {text}"[:300]
    return f"error: unexpected {what}; please report it with {path} (--traceback shows it here)", 1


def require(extra: str, *modules: str) -> None:
    """Raises UserError if one of the modules that an extra of setup.cfg installs is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: pip install -e .[{extra}]")


def _parse_flags(argv: list[str], remote: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        _parse_arguments(argv, directory)
    parser = flags.FLAGS
    for flag in map(parser.__getitem__, parser):
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            raise UserError(f"--{flag.name}={flag.value}: must be a finite number")
        if isinstance(flag.value, str) and re.match(r"\w+://", flag.value):
            _check_remote(flag.name, flag.value, remote)
    if "config" in parser and not isinstance(parser["config"].value, ml_collections.ConfigDict):
        filename = parser["config"].config_filename
        raise UserError(f"--config={filename}: not a file whose get_config() returns to_config_dict(CONFIG)")


def _check_remote(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises UserError if the flag takes only files of this machine, or the bucket cannot be used."""
    if name not in allowed:
        raise UserError(f"--{name}={value}: only files of this machine are read here; mount the bucket and name it")
    try:
        paths.as_path(value)
    except UserError as error:
        raise UserError(f"--{name}={error}") from None


def _parse_arguments(argv: list[str], directory: str) -> None:
    """Gives all flags their values. A config file of a bucket is imported from a copy in the directory."""
    parser = flags.FLAGS
    parser.set_gnu_getopt(True)  # otherwise flags after a stray argument are ignored, and reported as missing
    try:
        argv = [argv[0], *parser.read_flags_from_files(argv[1:])]
        if "config" in parser:
            argv = _with_local_config(argv, directory)
            _check_overrides(argv)
            if not any(re.match(r"--?config(=|$)", argument) for argument in argv):
                # As an argument: overrides do not apply to a flag's default, whose names stay for the next file loaded.
                argv.insert(1, f"--config={_default_config()}")
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


def _with_local_config(argv: list[str], directory: str) -> list[str]:
    """The arguments with a config file of a bucket replaced by a copy of it in the directory."""
    local = list(argv)
    for index, argument in enumerate(argv):
        config = re.fullmatch(r"(--?config=)?(gs://.*)", argument)
        if config and (config[1] or argv[index - 1] in ("--config", "-config")):
            _check_remote("config", config[2], ["config"])
            path = paths.as_path(config[2])
            if not path.is_file():
                raise UserError(f"--config={path}: no such file")
            copy = Path(directory) / path.name
            copy.write_bytes(path.read_bytes())
            local[index] = f"{config[1] or ''}{copy}"
    return local


def _default_config() -> str:
    return flags.FLAGS["config"].default_as_str.strip("'")


def _check_overrides(argv: list[str]) -> None:
    """Refuses a file in `--config=FILE` or a field in `--config.FIELD` that does not exist: absl's are tracebacks."""
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
    # The message for an exception inside a config file has its traceback, whose last line says what happened.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"


def _print_help() -> None:
    print((sys.modules["__main__"].__doc__ or "").strip())
    print(flags.FLAGS.main_module_help())
    if "config" in flags.FLAGS:
        print("\nfields of the default config:")
        rules = config_lib.ranges()
        for name, value in flatten(runpy.run_path(_default_config())["get_config"]().to_dict()):
            print(f"  --config.{name}={value}{f'  ({rules[name]})' if name in rules else ''}")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by their dotted names."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
