"""A server among clients that drop, time out and send rubbish, killed in between: who behaves is answered all the same.

Some seconds with a few clients; LAMINI_JAX_CHAOS=60 is a minute with 64 of them, and more malformed requests.
"""

import collections
import contextlib
import json
import os
import random
import signal
import socket
import threading
import time

import pytest

pytest.importorskip("uvicorn", reason="pip install -e .[serve]")
pytest.importorskip("httpx", reason="pip install -e .[test]")

import httpx
import served

SECONDS = float(os.environ.get("LAMINI_JAX_CHAOS", "0"))
WHOLE = SECONDS > 0
SECONDS, CLIENTS, EXAMPLES = (SECONDS, 64, 100) if WHOLE else (4.0, 12, 8)
SETTLE = 300  # seconds in which all facts have to be tuned
KNOWN = {f"What is the gate code of the {name} house?": f"{4000 + 37 * i}" for i, name in enumerate(("Berg", "Holm"))}
OUTSIDE = "Name a river of the north."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = served.make_memory(tmp_path_factory.mktemp("chaos") / "memory")
    with served.serving(directory) as server:
        yield server


class Clients:
    """Threads that send what they like for as long as they are told to, and what came of it."""

    def __init__(self, server, expected):
        self.server, self.expected = server, expected
        self.over, self.down = threading.Event(), threading.Event()
        self.statuses, self.failures = collections.Counter(), []
        self.acknowledged, self.forgotten = {}, {}
        self._lock = threading.Lock()

    def run(self, behaviour, seed):
        rng = random.Random(seed)
        with httpx.Client(base_url=self.server.url, timeout=60) as client:
            while not self.over.is_set():
                try:
                    behaviour(self, client, rng)
                except (httpx.HTTPError, OSError) as error:
                    # A server that was killed answers nobody, and who waited for it tries again.
                    if behaviour in (good, adding) and not self.down.is_set():
                        self.failures.append(f"{behaviour.__name__}: {error!r}")
                    time.sleep(0.1)

    def note(self, response):
        with self._lock:
            self.statuses[response.status_code] += 1
            if response.status_code >= 500:
                self.failures.append(f"{response.request.method} {response.request.url}: {response.text[:200]}")
        return response


def good(clients, client, rng):
    """Asks, streamed or not, and must get the right answer."""
    question, answer = rng.choice(list(clients.expected.items()))
    body = chat(question, rng.choice(("memory", "base")) if question == OUTSIDE else "memory")
    response = clients.note(client.post("/v1/chat/completions", json=body))
    said = response.json()["choices"][0]["message"]["content"] if response.status_code == 200 else response.text
    if said != answer:
        clients.failures.append(f"{question}: {response.status_code} {said!r}")


def adding(clients, client, rng):
    """Adds facts, and forgets some of them."""
    question, answer = f"What is on shelf {rng.randrange(10**6)}?", f"{rng.randrange(10**4)}"
    response = clients.note(client.post("/v1/memories", json={"facts": [{"question": question, "answer": answer}]}))
    if response.status_code != 202:
        clients.failures.append(f"adding: {response.text}")
        return
    (fact,) = response.json()["results"]
    clients.acknowledged[fact["id"]] = question, answer
    if rng.random() < 0.2:
        del clients.acknowledged[fact["id"]]
        clients.forgotten[fact["id"]] = question
        clients.note(client.delete(f"/v1/memories/{fact['id']}"))
    time.sleep(rng.uniform(0, 0.5))


def dropping(clients, client, rng):
    """Goes away in the middle of a stream."""
    with client.stream("POST", "/v1/chat/completions", json={**chat(OUTSIDE), "stream": True}) as response:
        for _ in zip(range(rng.randrange(4)), response.iter_lines(), strict=False):
            pass


def impatient(clients, client, rng):
    """Has no time."""
    client.post("/v1/chat/completions", json=chat(OUTSIDE), timeout=rng.uniform(0.001, 0.05))


def rubbish(clients, client, rng):
    """Sends what is no request, or none of this API."""
    if rng.random() < 0.3:
        host, port = clients.server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as raw:
            raw.sendall(rng.randbytes(rng.randrange(1, 400)))
        return
    bodies = ["{", "[]", "null", json.dumps({"model": "memory"}), json.dumps(chat(7)), "x" * 3_000_000]
    path = rng.choice(("/v1/chat/completions", "/v1/completions", "/v1/memories", "/v1/memories/search", "/tokenize"))
    headers = {"Content-Type": rng.choice(("application/json", "text/plain"))}
    response = clients.note(client.post(path, content=rng.choice(bodies), headers=headers))
    if response.status_code < 400:
        clients.failures.append(f"rubbish was taken: {response.request.url}")


def chat(question, model="memory"):
    return {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24}


def ask(client, question):
    return client.post("/v1/chat/completions", json=chat(question)).json()["choices"][0]["message"]["content"]


def settled(client):
    end = time.monotonic() + SETTLE
    while client.get("/v1/memories", params={"limit": 1}).json()["pending"]:
        assert time.monotonic() < end
        time.sleep(0.2)


def test_who_behaves_is_answered_whatever_others_do(server):
    with httpx.Client(base_url=server.url, timeout=SETTLE) as client:
        facts = [{"question": question, "answer": answer} for question, answer in KNOWN.items()]
        assert client.post("/v1/memories", json={"facts": facts, "wait": True}).status_code == 200
        clients = Clients(server, {**KNOWN, OUTSIDE: ask(client, OUTSIDE)})
        kinds = [good, good, good, adding, dropping, impatient, rubbish, good]
        behaviours = [kinds[number % len(kinds)] for number in range(CLIENTS)]
        threads = [
            threading.Thread(target=clients.run, args=each) for each in zip(behaviours, range(CLIENTS), strict=True)
        ]
        for thread in threads:
            thread.start()
        time.sleep(SECONDS / 2)
        clients.down.set()
        server.end(signal.SIGKILL)
        server.start()
        clients.down.clear()
        time.sleep(SECONDS / 2)
        clients.over.set()
        for thread in threads:
            thread.join()
        settled(client)
        print(f"{CLIENTS} clients, statuses {dict(clients.statuses)}, {len(clients.acknowledged)} facts acknowledged")
        assert clients.failures == [] and clients.acknowledged
        for fact, (question, answer) in clients.acknowledged.items():
            assert client.get(f"/v1/memories/{fact}").json()["state"] == "certified"
            assert ask(client, question) == answer
        assert 'status="500"' not in client.get("/metrics").text
        gone = [fact for fact in clients.forgotten if client.get(f"/v1/memories/{fact}").status_code == 404]
        content = b"".join(path.read_bytes() for path in server.directory.rglob("*") if path.is_file())
        assert not any(clients.forgotten[fact].encode() in content for fact in gone)
        assert "lamini_slots_active 0.0" in client.get("/metrics").text


def test_malformed_requests_never_end_in_a_500(server):
    """From the description of the API that the server gives."""
    schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
    hypothesis = pytest.importorskip("hypothesis", reason="pip install -e .[test]")
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses = collections.Counter()
    options = {"max_examples": EXAMPLES, "deadline": None, "database": None, "derandomize": True}
    silent = list(hypothesis.HealthCheck)
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @hypothesis.settings(**options, suppress_health_check=silent)
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def send(case):
                if isinstance(case.body, dict) and case.body.get("wait") is True:
                    case.body["wait"] = False  # tuning what nobody would ask takes long, and is not tested here
                response = case.call(timeout=120)
                statuses[response.status_code] += 1
                assert response.status_code < 500, f"{case.as_curl_command()}: {response.text}"

            with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing is wrong with a GET of no parameters
                send()
    print(f"{sum(statuses.values())} requests, statuses {dict(statuses)}")
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    assert server.end(signal.SIGTERM) == 0
