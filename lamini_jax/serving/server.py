"""A server from its start to its end: everything is compiled before it is ready, and what runs is finished."""

import signal
import socket
import threading

import uvicorn

from lamini_jax.api import Source
from lamini_jax.errors import UserError
from lamini_jax.fact_memory import FactMemory
from lamini_jax.memory import allocation
from lamini_jax.runtime import processes, sharding
from lamini_jax.serving import answers, app
from lamini_jax.serving.engine import Engine
from lamini_jax.serving.limits import Settings
from lamini_jax.serving.state import State
from lamini_jax.serving.tuner import Tuner

_WAITING_PER_SLOT = 16
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


class _Server(uvicorn.Server):
    """One that tells when it is asked to end."""

    def __init__(self, config: uvicorn.Config, state: State):
        super().__init__(config)
        self._state = state

    def handle_exit(self, sig, frame) -> None:
        self._state.stopping = True
        super().handle_exit(sig, frame)


def limits_of(key: str | None, loopback: bool) -> Settings:
    """The limits of a server. Without a key, it answers only who names this machine as its own."""
    return Settings(key, hosts=_LOCAL if key is None and loopback else ("*",))


def state_of(memory: FactMemory, settings: Settings, slots: int) -> State:
    """The parts of a server, nothing of which has been started or compiled."""
    config = memory.config.memory
    most = [config.top_k * allocation.MORE ** (allocation.ROUNDS - 1)]
    most += (len(fact.experts) for fact in memory.table.contents.facts)
    engine = Engine(memory.model, slots, _WAITING_PER_SLOT * slots, config, max(most))
    state = State(memory, engine, settings)
    state.tuner = Tuner(memory, lambda table: answers.publish(state, table))
    return state


def prepare(state: State) -> None:
    """Compiles everything and starts what answers and what tunes."""
    state.engine.compile()
    answers.warm(state, state.memory.table)
    state.engine.start()
    state.tuner.start()
    state.ready = True


def run(source: Source, listener: socket.socket, settings: Settings, slots: int) -> None:
    """Serves until SIGTERM or Ctrl-C, at a socket that listens. Raises UserError if the memory cannot be loaded."""
    try:
        memory = source.load()
    except UserError as error:
        raise UserError(str(error)) from None  # whatever it is, the flags name the wrong thing
    state, failed = state_of(memory, settings, slots), []
    config = uvicorn.Config(app.make(state), log_level="warning", access_log=False, lifespan="off", server_header=False)
    server = _Server(config, state)

    def begin():
        try:
            prepare(state)
            host, port = listener.getsockname()[:2]
            processes.print_once(f"ready at http://{f'[{host}]' if ':' in host else host}:{port}/")
        except Exception as error:
            failed.append(error)
            server.should_exit = True

    # uvicorn raises what has ended it again, when it has finished: then there is nothing left to end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    beginning = threading.Thread(target=sharding.carried(begin), daemon=True)
    beginning.start()
    server.run(sockets=[listener])
    beginning.join()
    state.tuner.stop()
    state.engine.stop()
    if failed:
        raise failed[0]
