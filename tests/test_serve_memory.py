"""The memory API: what it acknowledges survives, what holds is answered, and of what is forgotten nothing is left."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("starlette", reason="pip install -e .[serve]")
pytest.importorskip("pydantic", reason="pip install -e .[serve]")
pytest.importorskip("httpx", reason="pip install -e .[test]")

import helpers
import serving_memory
from starlette.applications import Starlette
from starlette.testclient import TestClient

from lamini_jax.errors import UserError
from lamini_jax.fact_memory import FactMemory
from lamini_jax.runtime import workdir
from lamini_jax.serving import limits, memory_api, openapi, tuner
from lamini_jax.serving.limits import Settings
from lamini_jax.serving.state import State
from lamini_jax.serving.tuner import Tuner

PATH = "/v1/memories"
FACTS = [
    {"question": "Where does Ida keep the spare key?", "answer": "TIN7"},
    {"question": "Which berth has the ferry to Marstrand?", "answer": "NINE"},
    {"question": "Who mends the mill wheel?", "answer": "FALK"},
]
NEW = {"question": "What colour is the boathouse door?", "answer": "OCHR"}


@pytest.fixture(scope="module", autouse=True)
def judged():
    with pytest.MonkeyPatch.context() as patch:
        serving_memory.use_word_judge(patch)
        yield


@pytest.fixture(scope="module")
def model():
    return serving_memory.make_model()


class Server:
    """The memory API over a memory of its own."""

    def __init__(self, model, directory, settings=None):
        self.memory, self.settings = serving_memory.opened(model, directory), settings or Settings(facts=20)
        self.start()

    def start(self):
        """Begins, or begins again after `tuner.stop()`."""
        self.tuner = serving_memory.tuner_of(self.memory)
        self.state = State(self.memory, None, self.settings, self.tuner)
        app = Starlette(routes=memory_api.routes(self.state), exception_handlers=limits.HANDLERS)
        self.client = TestClient(app, raise_server_exceptions=False)

    def add(self, *facts, wait=True):
        return self.client.post(PATH, json={"facts": facts, "wait": wait})

    def files(self) -> bytes:
        """Everything in the files of the memory."""
        paths = [path for path in self.memory.directory.rglob("*") if path.is_file()]
        assert {"journal.sqlite", "memory.sqlite"} <= {path.name for path in paths}
        return b"".join(path.read_bytes() for path in paths)


@pytest.fixture(scope="module")
def started(model, tmp_path_factory):
    server = Server(model, tmp_path_factory.mktemp("served") / "memory")
    yield server
    server.tuner.stop()


@pytest.fixture
def server(started):
    """It, with FACTS and nothing else."""
    assert started.add(*FACTS).status_code == 200
    yield started
    for fact in started.client.get(PATH).json()["results"]:
        if fact["question"] not in [known["question"] for known in FACTS]:
            assert started.client.delete(f"{PATH}/{fact['id']}").status_code == 204


@pytest.fixture
def own(model, tmp_path):
    """One that may be stopped."""
    server = Server(model, tmp_path / "memory")
    yield server
    server.tuner.stop()


def ids(answer):
    return [fact["id"] for fact in answer.json()["results"]]


@contextlib.contextmanager
def held(server):
    """The memory as if another process were at work in it: nothing can be tuned."""
    with workdir.alone(server.memory.directory):
        yield


def test_what_is_added_holds_and_is_answered(server):
    answer = server.add(NEW)
    (fact,) = answer.json()["results"]
    assert (
        answer.status_code == 200 and fact["event"] == "ADD" and fact["state"] == "certified" and fact["experts"] == 2
    )
    assert server.memory.ask(NEW["question"]).text == NEW["answer"]
    assert server.client.get(f"{PATH}/{fact['id']}").json() == {k: v for k, v in fact.items() if k != "event"}
    events = server.client.get(f"{PATH}/{fact['id']}/history").json()["results"]
    assert [event["event"] for event in events] == ["added", "certified"]
    again = server.add(NEW)
    assert again.status_code == 200 and again.json()["results"][0]["event"] == "NONE"


def test_a_list_has_pages_and_is_searched(server):
    page = server.client.get(PATH, params={"limit": 2, "offset": 1}).json()
    assert [fact["question"] for fact in page["results"]] == [fact["question"] for fact in FACTS[1:]]
    assert (page["total"], page["limit"], page["offset"], page["pending"]) == (3, 2, 1, 0)
    for text, places in (("FERRY", [1]), ("falk", [2]), ("nothing of the kind", [])):
        found = server.client.get(PATH, params={"search": text}).json()
        assert [fact["question"] for fact in found["results"]] == [FACTS[place]["question"] for place in places]


def test_pending_facts_are_told_and_then_hold(server):
    with held(server):
        answer = server.add(NEW, wait=False)
        (fact,) = answer.json()["results"]
        assert answer.status_code == 202 and fact["state"] == "pending"
        assert server.client.get(PATH).json()["pending"] == 1
        assert NEW["answer"].encode() in server.files()  # of the journal
        assert server.memory.find([NEW["question"]])[0].fact is None
    assert server.add(NEW).json()["results"][0]["state"] == "certified"


def test_a_change_is_answered_and_of_the_old_answer_nothing_is_left(server):
    (fact,) = ids(server.add(NEW))
    also = ["The boathouse door has which colour?"]
    changed = server.client.put(f"{PATH}/{fact}", json={"answer": "GREY", "also": also, "wait": True})
    assert changed.status_code == 200 and changed.json()["answer"] == "GREY" and changed.json()["also"] == also
    assert [answer.text for answer in server.memory.ask([NEW["question"], *also])] == ["GREY"] * 2
    assert NEW["answer"].encode() not in server.files()
    assert server.client.put(f"{PATH}/{fact}", json={"also": [], "wait": True}).json()["answer"] == "GREY"
    events = server.client.get(f"{PATH}/{fact}/history").json()["results"]
    assert [event["event"] for event in events] == ["added", "certified"] + ["changed", "certified"] * 2
    assert server.client.put(f"{PATH}/{fact}", json={"wait": True}).status_code == 400


@pytest.mark.parametrize("pending", [False, True])
def test_of_what_is_forgotten_nothing_is_left(server, pending):
    before = server.memory.state()
    with held(server) if pending else contextlib.nullcontext():
        answer = server.add(NEW, wait=not pending)
        forget = threading.Thread(target=server.client.delete, args=(f"{PATH}/{ids(answer)[0]}",))
        forget.start()
        while pending and server.client.get(f"{PATH}/{ids(answer)[0]}").status_code != 404:  # before anything is done
            assert forget.is_alive()
    forget.join()
    for path in ("", "/history"):
        assert server.client.get(f"{PATH}/{ids(answer)[0]}{path}").status_code == 404
    content = server.files()
    for text in (NEW["question"], NEW["answer"], ids(answer)[0]):
        assert text.encode() not in content
    assert helpers.same_bits(
        [x.tobytes() for x in server.memory.state().values()], [x.tobytes() for x in before.values()]
    )
    assert server.memory.find([NEW["question"]])[0].fact is None


def test_the_nearest_facts_are_shown_with_their_scores(server):
    found = server.client.post(f"{PATH}/search", json={"query": "Who mends the old mill wheel?"}).json()
    best = found["results"][0]
    assert (found["threshold"], best["fires"], found["fact"]) == (0.7, True, best["id"])
    assert best["answer"] == FACTS[2]["answer"] and best["score"] == pytest.approx(5 / 6)
    assert [fact["fires"] for fact in found["results"]] == [True, False, False]
    same = server.client.post(f"{PATH}/search", json={"query": FACTS[0]["question"].lower()}).json()["results"][0]
    assert same["score"] is None and same["fires"]


def test_facts_that_are_hard_to_tell_apart_are_named(server):
    near = {"question": "Who mends the mill wheel now?", "answer": "NONE"}
    fact = server.add(near).json()["results"][0]
    other = server.client.get(PATH, params={"search": FACTS[2]["question"]}).json()["results"][0]
    assert fact["conflicts"] == [other["id"]] and other["conflicts"] == [fact["id"]]
    server.client.delete(f"{PATH}/{fact['id']}")
    assert server.client.get(f"{PATH}/{other['id']}").json()["conflicts"] == []


SAME = {"question": "who mends  the mill wheel", "answer": "NONE"}
BAD = {
    "not JSON": ("{", "JSON"),
    "not UTF-8": (b'{"facts": [{"question": "\xff", "answer": "x"}]}', "facts.0.question|JSON|body"),
    "no facts": ({"facts": []}, "facts: "),
    "an unknown field": ({"facts": [NEW], "path": "/etc/passwd"}, "path: "),
    "a number": ({"facts": [{"question": 3, "answer": "x"}]}, "facts.0.question: "),
    "a text that is no bool": ({"facts": [NEW], "wait": "yes"}, "wait: "),
    "an empty answer": ({"facts": [{**NEW, "answer": " "}]}, "answer"),
    "too long": ({"facts": [{**NEW, "answer": "x" * 500}]}, "fact 1: .*tokens"),
    "no words": ({"facts": [{**NEW, "question": "?"}]}, "no words"),
    "half a character": (b'{"facts": [{"question": "\\ud800?", "answer": "x"}]}', ""),
    "too many": ({"facts": [{**NEW, "question": f"{i}?"} for i in range(21)]}, "at most 20"),
    "two answers": ({"facts": [NEW, {**NEW, "answer": "REDD"}]}, "fact 2"),
    "two answers in other letters": ({"facts": [NEW, {"question": NEW["question"].upper(), "answer": "REDD"}]}, "same"),
    "another answer than a stored fact's": ({"facts": [SAME]}, "asks the same as"),
}


@pytest.mark.parametrize("body, said", BAD.values(), ids=BAD)
def test_bad_facts_are_refused_with_a_reason(server, body, said):
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    answer = server.client.post(PATH, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert re.search(said, error["message"]), error
    assert server.client.get(PATH).json()["total"] == len(FACTS)


def test_what_asks_the_same_as_a_pending_fact_is_refused(server):
    with held(server):
        server.add(NEW, wait=False)
        assert server.add({"question": NEW["question"].upper(), "answer": "REDD"}, wait=False).status_code == 400
        assert server.add({**NEW, "answer": "REDD"}, wait=False).status_code == 202  # the same question: a change
    assert server.add({**NEW, "answer": "REDD"}).json()["results"][0]["state"] == "certified"
    assert server.memory.ask(NEW["question"]).text == "REDD"


@pytest.mark.parametrize("method, path", [("get", ""), ("get", "/history"), ("put", ""), ("delete", "")])
def test_an_unknown_id_is_not_found(server, method, path):
    body = {"json": {"answer": "x"}} if method == "put" else {}
    for fact in ("0" * 16, "..", "%00", "x" * 300):
        assert getattr(server.client, method)(f"{PATH}/{fact}{path}", **body).status_code in (404, 405)
    for query in ("limit=0", "limit=1001", "limit=x", "offset=-1", "offset=99999999999999999999"):
        assert server.client.get(f"{PATH}?{query}").status_code == 400


def test_early_facts_hold_soon_and_a_batch_comes_whole(own):
    """A batch is published at once: nobody ever sees a part of one."""
    sizes = []
    own.tuner._publish = lambda table: (sizes.append(table.router.holding), setattr(own.memory, "table", table))
    facts = [{"question": f"What is in drawer {i}?", "answer": f"{i * 37}"} for i in range(10)]
    assert all(fact["state"] == "certified" for fact in own.add(*facts).json()["results"])
    assert sizes == [8, 9, 10]


def test_what_cannot_be_tuned_says_why_and_the_others_hold(own, monkeypatch):
    add = FactMemory.add

    def refuse(memory, facts):
        if any(fact["question"] == NEW["question"] for fact in facts):
            raise UserError("the disk is full")
        return add(memory, facts)

    monkeypatch.setattr(FactMemory, "add", refuse)
    facts = [NEW, *({"question": f"What is in box {i}?", "answer": f"{i * 41}"} for i in range(7))]
    states = [fact["state"] for fact in own.add(*facts).json()["results"]]
    assert states == ["failed"] + ["certified"] * 7
    failed = own.client.get(PATH, params={"search": NEW["question"]}).json()["results"][0]
    assert failed["reason"] == "the disk is full"
    monkeypatch.setattr(FactMemory, "add", lambda *_: 1 / 0)
    assert own.add(NEW).json()["results"][0]["reason"] == "unexpected ZeroDivisionError"
    monkeypatch.undo()
    assert own.add(NEW).json()["results"][0]["state"] == "certified" and own.tuner.alive


def test_what_another_process_has_stored_is_read_again(own, model):
    own.add(FACTS[0])
    serving_memory.opened(model, own.memory.directory).add([FACTS[1]])
    assert own.add(NEW).status_code == 200
    assert own.client.get(PATH).json()["total"] == 3
    listed = own.client.get(PATH, params={"search": "ferry"}).json()["results"][0]
    events = own.client.get(f"{PATH}/{listed['id']}/history").json()["results"]
    assert [event["event"] for event in events] == ["certified"]


def test_too_much_that_is_pending_is_refused_for_now(own, monkeypatch):
    monkeypatch.setattr(tuner, "_MOST_PENDING", 1)
    with held(own):
        assert own.add(NEW, wait=False).status_code == 202
        answer = own.add(FACTS[0], wait=False)
        assert answer.status_code == 429 and answer.headers["Retry-After"]
    assert own.add(NEW).status_code == 200


def test_a_server_that_ends_lets_nobody_wait(own):
    with held(own):
        own.state.stopping = True
        assert own.add(NEW).status_code == 202
        own.state.stopping = False
        assert own.client.get(PATH).json()["pending"] == 1


def test_one_server_at_a_time_and_the_next_one_goes_on(own):
    with pytest.raises(UserError, match="another server has this memory"):
        Tuner(own.memory, print)
    with held(own):
        assert own.add(*FACTS, wait=False).status_code == 202
        own.tuner.stop()
    assert own.memory.facts() == []
    own.start()
    assert own.add(NEW).status_code == 200
    assert [fact["state"] for fact in own.client.get(PATH).json()["results"]] == ["certified"] * 4


KILLS = int(os.environ.get("LAMINI_JAX_KILLS", "2"))
LONGEST = 10.0 if KILLS > 2 else 3.0  # seconds that a process lives


def test_what_was_acknowledged_survives_a_kill_at_any_moment(model, tmp_path):
    """20 kills: LAMINI_JAX_KILLS=20."""
    rng, acknowledged, directory = random.Random(0), [], tmp_path / "memory"
    for round_number in range(KILLS):
        process = _fed(directory)
        end = time.monotonic() + rng.uniform(0.05, LONGEST)
        facts = ({"question": f"What is on shelf {round_number}-{i}?", "answer": f"{i}x"} for i in range(10_000))
        killer = threading.Timer(end - time.monotonic(), lambda process=process: process.send_signal(signal.SIGKILL))
        killer.start()
        with contextlib.suppress(BrokenPipeError):
            for fact in facts:
                process.stdin.write(json.dumps(fact) + "\n")
                process.stdin.flush()
                if not (line := process.stdout.readline()).endswith("\n"):
                    break
                acknowledged.append((line.strip(), fact))
                time.sleep(rng.uniform(0, 0.2))
        process.wait()
        killer.join()
    server = Server(model, directory, Settings())
    try:
        assert acknowledged and server.tuner.settled([fact for fact, _ in acknowledged]).result(300) is None
        for fact, sent in acknowledged:
            entry = server.tuner.entry(fact)
            assert (entry.question, entry.answer, entry.state) == (sent["question"], sent["answer"], "certified")
        asked = [fact for _, fact in acknowledged]
        said = [answer.text for answer in server.memory.ask([fact["question"] for fact in asked])]
        assert said == [fact["answer"] for fact in asked]
        print(f"{len(acknowledged)} facts acknowledged, {KILLS} kills, all of them answered")
    finally:
        server.tuner.stop()


def _fed(directory):
    command = [sys.executable, serving_memory.__file__, str(directory)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "PYTHONPATH": f"{helpers.ROOT}:{helpers.ROOT / 'tests'}"}
    process = subprocess.Popen(command, env=environment, text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_description_of_the_api_is_whole():
    document = openapi.document(memory_api.OPERATIONS)
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"]
    assert document["paths"].keys() == {PATH, f"{PATH}/search", f"{PATH}/{{id}}", f"{PATH}/{{id}}/history"}
