"""What watches a server: whether it lives and is ready, its figures, and a log that has nothing of what was asked."""

import json
import logging

import pytest

pytest.importorskip("starlette", reason="pip install -e .[serve]")
pytest.importorskip("prometheus_client", reason="pip install -e .[serve]")
pytest.importorskip("httpx", reason="pip install -e .[test]")

from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from lamini_jax.serving import limits, pages
from lamini_jax.serving.engine import Figures
from lamini_jax.serving.limits import ApiError, Settings
from lamini_jax.serving.state import State
from lamini_jax.serving.tuner import Figures as Facts
from lamini_jax.serving.watching import Watch
from lamini_jax.serving.work import Done


class Engine:
    """One that says that it has done something."""

    figures = Figures(slots=16, active=2, waiting=3, prompt_tokens=40, tokens=20, steps=10, stepped=15)

    def watch(self, told):
        self.told = told


class Tuner:
    alive, figures = True, Facts(certified=5, failed=1, pending=2)


@pytest.fixture
def state():
    return State(None, Engine(), Settings(), Tuner(), ready=True, fired=7, refused=9)


@pytest.fixture
def client(state):
    async def refuse(request):
        raise ApiError(400, "no")

    async def say(request):
        return PlainTextResponse("yes")

    async def fail(request):
        raise ZeroDivisionError

    watch = Watch(state)
    routes = [
        Route("/facts/{id}", say),
        Route("/refused", refuse),
        Route("/failed", fail),
        *watch.routes(),
        pages.route(),
    ]
    app = Starlette(routes=routes, middleware=watch.middleware(), exception_handlers=limits.HANDLERS)
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def log(caplog):
    """The lines of the access log."""
    logger = logging.getLogger("lamini_jax.access")
    logger.addHandler(caplog.handler)
    yield lambda: [json.loads(record.getMessage()) for record in caplog.records if record.name == logger.name]
    logger.removeHandler(caplog.handler)


def samples(client):
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_it_lives_and_says_why_it_is_not_ready(client, state):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"ready": True, "reason": None}
    for name, value, reason in (("ready", False, "it is compiling"), ("stopping", True, "it is ending")):
        setattr(state, name, value)
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["reason"]) == (503, reason)
    state.ready, state.stopping, state.tuner.alive = True, False, False
    assert "nothing changes its memory" in client.get("/readyz").json()["reason"]
    assert client.get("/healthz").status_code == 200


def test_the_figures_are_those_of_its_parts(client, state):
    state.engine.told(Done(tokens=5, queued_seconds=0.02, first_seconds=0.2, seconds=2.0))
    state.engine.told(Done(error=ValueError(), queued_seconds=0.02))
    for path in ("/facts/1", "/facts/2", "/refused", "/failed", "/nowhere"):
        client.get(path)
    found = samples(client)
    expected = {
        ("lamini_tokens_total", "prompt"): 40,
        ("lamini_tokens_total", "generated"): 20,
        ("lamini_questions_total", "fired"): 7,
        ("lamini_questions_total", "refused"): 9,
        ("lamini_queue",): 3,
        ("lamini_slots_active",): 2,
        ("lamini_step_rows_total",): 15,
        ("lamini_facts", "pending"): 2,
        ("lamini_queued_seconds_count",): 2,
        ("lamini_answer_seconds_sum",): 2.0,
        ("lamini_requests_total", "GET", "/facts/{id}", "200"): 2,
        ("lamini_requests_total", "GET", "/refused", "400"): 1,
        ("lamini_requests_total", "GET", "/failed", "500"): 1,
        ("lamini_request_seconds_count", "/facts/{id}"): 2,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_the_log_has_nothing_of_what_was_asked(client, log):
    client.get("/facts/secret-id?search=a+secret")
    client.get("/metrics")
    client.request("BREW", "/refused")
    (line, _) = log()
    assert line.keys() == {"time", "client", "method", "route", "status", "bytes", "seconds"}
    assert (line["method"], line["route"], line["status"], line["bytes"]) == ("GET", "/facts/{id}", 200, 3)
    assert "secret" not in json.dumps(log())


def test_the_page_may_load_nothing_from_elsewhere(client):
    for name, kind in (("/", "text/html"), ("/page.js", "javascript"), ("/page.css", "text/css"), ("/icon.svg", "svg")):
        answer = client.get(name)
        assert answer.status_code == 200 and kind in answer.headers["content-type"]
        policy = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and set(policy.values()) == {"'none'", "'self'"}
        assert "//" not in answer.text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")
        assert " style=" not in answer.text and " onclick=" not in answer.text
    assert client.get("/../watching.py").status_code == client.get("/%2e%2e/watching.py").status_code == 404
