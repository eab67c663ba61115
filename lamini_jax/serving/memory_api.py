"""The memory API: `/v1/memories`, in the shape that mem0's clients know. What is stored is stored word for word."""

import asyncio
import math
import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lamini_jax.runtime import sharding
from lamini_jax.serving import limits
from lamini_jax.serving import memory_schema as schema
from lamini_jax.serving.limits import ApiError
from lamini_jax.serving.openapi import Operation, Parameter
from lamini_jax.serving.state import State
from lamini_jax.serving.tuner import PENDING, Entry

_PATH = "/v1/memories"
_ID = Parameter("id", "path", {"type": "string"})
_LIST = (
    Parameter("search", "query", {"type": "string"}),
    Parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": schema.MOST_LISTED, "default": 100}),
    Parameter("offset", "query", {"type": "integer", "minimum": 0, "default": 0}),
)
OPERATIONS = (
    Operation(
        "post", _PATH, "Adds facts, or changes them", {200: schema.Additions, 202: schema.Additions}, schema.Addition
    ),
    Operation("get", _PATH, "Lists facts", {200: schema.Memories}, parameters=_LIST),
    Operation(
        "post", f"{_PATH}/search", "Shows which facts are near to a question", {200: schema.Nearest}, schema.Question
    ),
    Operation("get", f"{_PATH}/{{id}}", "Shows a fact", {200: schema.Memory}, parameters=(_ID,)),
    Operation(
        "put", f"{_PATH}/{{id}}", "Changes a fact", {200: schema.Memory, 202: schema.Memory}, schema.Alteration, (_ID,)
    ),
    Operation("delete", f"{_PATH}/{{id}}", "Forgets a fact", {204: None}, parameters=(_ID,)),
    Operation(
        "get", f"{_PATH}/{{id}}/history", "Shows what happened to a fact", {200: schema.History}, parameters=(_ID,)
    ),
)
_LOOK = 0.5  # seconds between two looks whether the server is ending
_Body = TypeVar("_Body", bound=BaseModel)


def routes(state: State) -> list[Route]:
    """The routes of the API."""
    api = _Api(state)
    one = f"{_PATH}/{{id}}"
    return [
        Route(_PATH, api.add, methods=["POST"]),
        Route(_PATH, api.page, methods=["GET"]),
        Route(f"{_PATH}/search", api.search, methods=["POST"]),
        Route(one, api.get, methods=["GET"]),
        Route(one, api.change, methods=["PUT"]),
        Route(one, api.forget, methods=["DELETE"]),
        Route(f"{one}/history", api.history, methods=["GET"]),
    ]


class _Api:
    """What the routes do. Whatever reads or writes a file runs in a thread."""

    def __init__(self, state: State):
        self._state = state
        self._nearest = sharding.carried(lambda question: _nearest(state, question))

    async def add(self, request: Request) -> Response:
        asked = await self._body(request, schema.Addition)
        if len(asked.facts) > (most := self._state.settings.facts):
            raise ApiError(400, f"{len(asked.facts)} facts; send at most {most} at a time", param="facts")
        doing = await _stored_now(self._state.tuner.put, [fact.model_dump() for fact in asked.facts])
        if asked.wait:
            await self._settled(doing)
        # What was forgotten while this request waited is not there any more.
        found = [(event, entry) for fact, event in doing.items() if (entry := self._state.tuner.entry(fact))]
        results = [{**_shown(entry), "event": event} for event, entry in found]
        return JSONResponse({"results": results}, 202 if any(entry.state == PENDING for _, entry in found) else 200)

    async def page(self, request: Request) -> Response:
        search = request.query_params.get("search", "")
        limit, offset = _number(request, "limit", 100, 1, schema.MOST_LISTED), _number(request, "offset", 0, 0, None)
        found = await run_in_threadpool(self._state.tuner.entries, search)
        counts = {"total": len(found), "limit": limit, "offset": offset, "pending": self._state.tuner.figures.pending}
        return JSONResponse({"results": [_shown(entry) for entry in found[offset : offset + limit]], **counts})

    async def search(self, request: Request) -> Response:
        asked = await self._body(request, schema.Question)
        return JSONResponse(await run_in_threadpool(self._nearest, asked.query))

    async def get(self, request: Request) -> Response:
        return JSONResponse(_shown(self._entry(request)))

    async def change(self, request: Request) -> Response:
        asked = await self._body(request, schema.Alteration)
        if asked.answer is None and asked.also is None:
            raise ApiError(400, 'there is nothing to change; give another "answer", or other wordings ("also")')
        known = self._entry(request)
        answer = known.answer if asked.answer is None else asked.answer
        also = list(known.also) if asked.also is None else asked.also
        await _stored_now(self._state.tuner.put, [{"question": known.question, "answer": answer, "also": also}])
        if asked.wait:
            await self._settled([known.id])
        entry = self._entry(request)
        return JSONResponse(_shown(entry), 202 if entry.state == PENDING else 200)

    async def forget(self, request: Request) -> Response:
        fact = request.path_params["id"]
        try:
            await _stored_now(self._state.tuner.forget, fact)
        except KeyError:
            raise _unknown(fact) from None
        if not await self._settled([fact]):
            return Response(status_code=202)
        if (entry := self._state.tuner.entry(fact)) and entry.reason:
            raise ApiError(503, f"it could not be forgotten: {entry.reason}")
        return Response(status_code=204)

    async def history(self, request: Request) -> Response:
        fact = request.path_params["id"]
        events = await run_in_threadpool(self._state.tuner.history, fact)
        if events is None:
            raise _unknown(fact)
        told = [{"event": event.event, "created_at": event.date, "reason": event.reason} for event in events]
        return JSONResponse({"id": fact, "results": told})

    async def _body(self, request: Request, model: type[_Body]) -> _Body:
        return await limits.body(request, model, self._state.settings.body_bytes)

    async def _settled(self, facts: Collection[str]) -> bool:
        """Waits until nothing is left to do for facts, for as long as a request may take and the server lives."""
        future = asyncio.wrap_future(self._state.tuner.settled(list(facts)))
        end = time.monotonic() + self._state.settings.seconds
        while not future.done() and time.monotonic() < end and not self._state.stopping:
            await asyncio.wait([future], timeout=_LOOK)
        return future.done()

    def _entry(self, request: Request) -> Entry:
        fact = request.path_params["id"]
        entry = self._state.tuner.entry(fact)
        if entry is None:
            raise _unknown(fact)
        return entry


async def _stored_now(write: Callable[[Any], Any], what: Any) -> Any:
    """What is begun is completed, even if the client goes away: it may have been written already."""
    return await asyncio.shield(run_in_threadpool(write, what))


def _nearest(state: State, question: str) -> dict[str, Any]:
    memory = state.memory
    memory.check_question(question, "query")
    threshold, candidates = memory.threshold, memory.table.nearest(question)
    best: dict[str, Any] = {}
    for candidate in candidates:  # the best wording of each fact comes first
        fires = candidate.score >= threshold and not best
        fact, score = candidate.fact, candidate.score if math.isfinite(candidate.score) else None
        shown = {"id": fact.id, "question": fact.question, "wording": candidate.wording, "answer": fact.answer}
        best.setdefault(fact.id, {**shown, "score": score, "fires": fires})
    firing = next((fact for fact, shown in best.items() if shown["fires"]), None)
    return {"query": question, "threshold": threshold, "fact": firing, "results": list(best.values())}


def _shown(entry: Entry) -> dict[str, Any]:
    values = {name: getattr(entry, name) for name in ("id", "question", "answer", "state", "reason")}
    values |= {"also": list(entry.also), "conflicts": list(entry.conflicts), "experts": len(entry.experts)}
    return {**values, "updated_at": entry.date}


def _number(request: Request, name: str, default: int, least: int, most: int | None) -> int:
    text = request.query_params.get(name, str(default))
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if value < least or (most is not None and value > most):
        span = f"from {least} to {most}" if most else f"at least {least}"
        raise ApiError(400, f"{name}={text[:40]}: must be a whole number, {span}", param=name)
    return value


def _unknown(fact: str) -> ApiError:
    return ApiError(404, f"there is no fact with the id {fact[:40]}", code="not_found", param="id")
