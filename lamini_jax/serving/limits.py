"""What a server allows: its limits, its key, and how it says no."""

import dataclasses
import hmac
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lamini_jax.errors import UserError
from lamini_jax.serving.work import Full, Late

_Body = TypeVar("_Body", bound=BaseModel)
_GUARDED = ("/v1/", "/tokenize", "/tokenizer_info", "/detokenize", "/openapi.json")
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The limits of a server. `key` is what clients send as `Authorization: Bearer KEY`; None: anybody may ask."""

    key: str | None = None
    hosts: Sequence[str] = ("*",)  # that a request may name: others are of pages that reach for a local server
    body_bytes: int = 2**20
    choices: int = 16  # `n` of a request
    prompts: int = 256  # of a request
    facts: int = 1000  # of a request
    seconds: float = 300.0  # that a request may take, its time in the queue included


class ApiError(Exception):
    """What a client is told, as {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers: dict[str, str] = {}

    @property
    def content(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def described(error: Exception) -> ApiError:
    """What a client is told of any error. What is not expected is not told: it may hold anything."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Full):
        full = ApiError(429, str(error), code="rate_limit_exceeded")
        full.headers["Retry-After"] = "1"
        return full
    if isinstance(error, Late):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail)
    return ApiError(500, "something went wrong here; the server's log says what")


def _respond(request: Request, error: Exception) -> JSONResponse:
    told = described(error)
    return JSONResponse(told.content, told.status, {**(getattr(error, "headers", None) or {}), **told.headers})


HANDLERS = {kind: _respond for kind in (ApiError, UserError, HTTPException, Exception)}


async def body(request: Request, model: type[_Body], limit: int) -> _Body:
    """What a request sends, as JSON. Raises ApiError for what is too long, or does not fit the model.

    Only what says that it is JSON is read: a browser asks the server before a foreign page may send that.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body is {kind[:40] or 'of no type'}; send it as application/json")
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise ApiError(413, f"the body is longer than {limit} bytes; send less at a time")
            parts.append(part)
    except ClientDisconnect:
        raise ApiError(400, "the client has gone") from None
    try:
        return model.model_validate_json(b"".join(parts))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ApiError(400, f"{where or 'the body'}: {first['msg']}", param=where or None) from None


def middleware(settings: Settings) -> list[Middleware]:
    """What every request passes through: it names this host, and whoever sends it has the key."""
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts), www_redirect=False)
    return [hosts, Middleware(_Guard, key=settings.key)]


class _Guard:
    """Refuses requests without the key, but for the page's files and the questions whether the server lives."""

    def __init__(self, app: ASGIApp, key: str | None):
        self._app, self._expected = app, None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._expected is not None and scope["path"].startswith(_GUARDED):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(401, "send the server's key as Authorization: Bearer KEY", code="invalid_api_key")
                response = JSONResponse(error.content, error.status, {"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
