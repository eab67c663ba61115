"""A server of a small memory in this process, for tests of the engine and of its APIs."""

import contextlib
import queue
import socket
import threading

import helpers
import serving_memory
import uvicorn

from lamini_jax.serving import answers, app, server
from lamini_jax.serving.limits import Settings
from lamini_jax.serving.work import Done, Piece, Scored, Scoring, Work

FACTS = [{"question": fact.question, "answer": fact.answer} for fact in helpers.some_facts(4)]
STORED = [fact["question"] for fact in FACTS]
OUTSIDE = ["Where does the ferry to Marstrand stop?", "Who?", "Name a river of the north, and another one."]
TOKENIZER = helpers.TOKENIZER


def tuned(directory, count: int = len(FACTS)):
    """A memory of some facts."""
    memory = serving_memory.opened(serving_memory.make_model(), directory)
    if count:
        memory.add(FACTS[:count])
    return memory


def prepared(memory, slots: int = 16, **settings):
    """The parts of a server, ready to answer."""
    state = server.state_of(memory, Settings(**settings), slots)
    server.prepare(state)
    return state


def ended(state) -> None:
    """Ends them."""
    state.tuner.stop()
    state.engine.stop()


@contextlib.contextmanager
def served(state):
    """The address at which they are served."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app.make(state), log_level="error", access_log=False, lifespan="off")
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join()


def asked(state, *works: Work | Scoring) -> tuple[dict, list, Done]:
    """What the engine hands over for some works: texts by (work, choice), everything in order, and the end."""
    found: queue.SimpleQueue = queue.SimpleQueue()
    state.engine.submit(works, found.put)
    texts: dict[tuple[int, int], str] = {}
    events: list[Piece | Scored] = []
    while not isinstance(event := found.get(timeout=60), Done):
        events.append(event)
        if isinstance(event, Piece):
            key = event.work, event.choice
            texts[key] = texts.get(key, "") + event.text
    return texts, events, event


def work_for(state, question: str, tokens: int = 24, model: str = "memory", **options) -> Work:
    """What a question is to the engine."""
    told = answers.look_up(state, question) if model == "memory" else answers.Told()
    return Work(told.tokens or tuple(TOKENIZER.prompt(question)), tokens, told.adapters, **options)
