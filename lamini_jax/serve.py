"""Serves a memory of facts, with its backbone, to clients of the OpenAI API, and a page to look at it.

    python -m lamini_jax.serve --workdir=DIR
    python -m lamini_jax.serve --memory=DIR --host=0.0.0.0 --port=8000

DIR is the work directory of `lamini_jax.tune`, or one that `lamini_jax.export` wrote. There are two models: `base`, the
backbone alone, and `memory`. The page is at http://127.0.0.1:8000/, the description of the API at /openapi.json. Facts
that are added, changed or forgotten over HTTP are changed in DIR.

Off this machine's own addresses (any --host but a loopback one) clients need the key in the environment variable
LAMINI_API_KEY, as Authorization: Bearer KEY. SIGTERM finishes what is being answered, then ends with status 0.
"""

import ipaddress
import os
import socket

from absl import flags

from lamini_jax import api
from lamini_jax.config import MeshConfig
from lamini_jax.errors import UserError
from lamini_jax.runtime import cli

_KEY = "LAMINI_API_KEY"
_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a finished `lamini_jax.tune`.")
_MEMORY = flags.DEFINE_string("memory", None, "Directory that `lamini_jax.export` wrote.")
_BACKBONE = flags.DEFINE_string("backbone", None, "Where the checkpoint of the backbone is, if it has moved.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0: any that is free.", 0, 65535)
_SLOTS = flags.DEFINE_integer("slots", 16, "Answers that are generated at a time; others wait.", 1, 1024)
_MESH_MODEL = flags.DEFINE_integer("mesh_model", 1, "Devices among which each layer is divided; -1: all.")


def main() -> None:
    cli.require("serve", "starlette", "uvicorn", "pydantic", "prometheus_client")
    if (_WORKDIR.value is None) == (_MEMORY.value is None):
        raise UserError("give either --workdir=DIR or --memory=DIR")
    key, loopback = os.environ.get(_KEY) or None, _is_loopback(_HOST.value)
    if key is None and not loopback:
        raise UserError(f"--host={_HOST.value}: others reach it there; set the environment variable {_KEY} to a key")
    source = api.run_source(_WORKDIR.value) if _MEMORY.value is None else api.export_source(_MEMORY.value)
    if source.config.router.kind != "facts":
        raise UserError(f"{source.directory}: is no memory of facts; tune one without --config.router.kind")
    source = source.with_backbone(_BACKBONE.value)
    with _listening(_HOST.value, _PORT.value) as listener:
        cli.use_devices(MeshConfig(data=1 if _MESH_MODEL.value == -1 else -1, model=_MESH_MODEL.value))
        from lamini_jax.serving import server  # here, so that a bad flag need not wait for it

        server.run(source, listener, server.limits_of(key, loopback), _SLOTS.value)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        flag = "--host" if isinstance(error, socket.gaierror) else "--port"
        named = f"{flag}={host if flag == '--host' else port}"
        reason = os.strerror(error.errno) if flag == "--port" else error.strerror
        raise UserError(f"{named}: cannot listen there ({reason}); choose another one") from None


if __name__ == "__main__":
    cli.run(main)
