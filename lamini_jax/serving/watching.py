"""How a server is watched: `/healthz`, `/readyz`, `/metrics` for Prometheus, and a log with a JSON line per request."""

import json
import logging
import sys
import time
from collections.abc import Iterator

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lamini_jax.memory.store import now
from lamini_jax.serving.state import State
from lamini_jax.serving.work import Done

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_OFTEN = frozenset(("/healthz", "/readyz", "/metrics"))  # asked all the time, and only logged when they fail

_access = logging.getLogger("lamini_jax.access")


class Watch:
    """The eyes on one server: its routes need no key, and tell nothing of what is stored."""

    def __init__(self, state: State):
        self._state, self._registry = state, CollectorRegistry()
        self._registry.register(_Figures(state))
        labels = {"registry": self._registry, "buckets": _SECONDS}
        self.requests = Counter("lamini_requests", "Requests.", ("method", "route", "status"), registry=self._registry)
        self.seconds = Histogram("lamini_request_seconds", "Until a request's last byte.", ("route",), **labels)
        self._queued = Histogram("lamini_queued_seconds", "Until an answer had a slot.", **labels)
        self._first = Histogram("lamini_first_token_seconds", "Until an answer's first token.", **labels)
        self._answered = Histogram("lamini_answer_seconds", "Until an answer's last token.", **labels)
        state.engine.watch(self._ended)
        if not _access.handlers:
            _access.addHandler(logging.StreamHandler(sys.stdout))
            _access.setLevel(logging.INFO)
            _access.propagate = False

    def routes(self) -> list[Route]:
        """The routes of those who watch."""
        return [Route("/healthz", self._health), Route("/readyz", self._ready), Route("/metrics", self._metrics)]

    def middleware(self) -> list[Middleware]:
        """What counts and logs every request."""
        return [Middleware(_Access, watch=self)]

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        reason = _lacking(self._state)
        return JSONResponse({"ready": reason is None, "reason": reason}, 503 if reason else 200)

    async def _metrics(self, request: Request) -> Response:
        content = prometheus_client.generate_latest(self._registry)
        return Response(content, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})

    def _ended(self, done: Done) -> None:
        self._queued.observe(done.queued_seconds)
        if done.error is None:
            self._first.observe(done.first_seconds)
            self._answered.observe(done.seconds)


def _lacking(state: State) -> str | None:
    """Why a server takes no requests."""
    if state.stopping:
        return "it is ending"
    if not state.ready:
        return "it is compiling"
    if state.tuner is not None and not state.tuner.alive:
        return "nothing changes its memory any more; start it again"
    return None


class _Figures:
    """What is read from the parts of a server whenever somebody looks."""

    def __init__(self, state: State):
        self._state = state

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        state, engine = self._state, self._state.engine.figures
        tokens = CounterMetricFamily("lamini_tokens", "Tokens, of prompts and generated.", labels=("kind",))
        tokens.add_metric(("prompt",), engine.prompt_tokens)
        tokens.add_metric(("generated",), engine.tokens)
        asked = CounterMetricFamily("lamini_questions", "Questions to the model `memory`.", labels=("outcome",))
        asked.add_metric(("fired",), state.fired)
        asked.add_metric(("refused",), state.refused)
        yield from (tokens, asked)
        yield GaugeMetricFamily("lamini_slots", "Answers at a time.", engine.slots)
        yield GaugeMetricFamily("lamini_slots_active", "Slots that are answering.", engine.active)
        yield GaugeMetricFamily("lamini_queue", "Requests that wait for a slot.", engine.waiting)
        yield CounterMetricFamily("lamini_steps", "Steps of the batch.", engine.steps)
        yield CounterMetricFamily("lamini_step_rows", "Rows of these steps that were active.", engine.stepped)
        if state.tuner is not None:
            facts = GaugeMetricFamily("lamini_facts", "Facts of the memory.", labels=("state",))
            for name, count in vars(state.tuner.figures).items():
                facts.add_metric((name,), count)
            yield facts


class _Access:
    """Counts and logs requests. Of what was asked, and of what is stored, the log has nothing."""

    def __init__(self, app: ASGIApp, watch: Watch):
        self._app, self._watch = app, watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, said = time.monotonic(), {"status": 499, "bytes": 0}  # 499: the client went away before an answer

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                said["status"] = message["status"]
            said["bytes"] += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            said["status"] = 500
            raise
        finally:
            self._note(scope, time.monotonic() - started, said)

    def _note(self, scope: Scope, seconds: float, said: dict[str, int]) -> None:
        # Routes by their patterns: paths have no end, and a fact's id in one is nobody's business.
        route, method = getattr(scope.get("route"), "path", None), scope["method"]
        route = "other" if route is None else route or "/"
        method = method if method in ("GET", "HEAD", "POST", "PUT", "DELETE") else "other"
        self._watch.requests.labels(method, route, said["status"]).inc()
        self._watch.seconds.labels(route).observe(seconds)
        if route in _OFTEN and said["status"] < 400:
            return
        client = (scope.get("client") or ("",))[0]
        line = {"time": now(), "client": client, "method": method, "route": route, **said}
        _access.info("%s", json.dumps({**line, "seconds": round(seconds, 4)}))
