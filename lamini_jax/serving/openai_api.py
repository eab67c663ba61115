"""The OpenAI API: models, chats, completions, and the tokenizer for clients that count tokens themselves."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lamini_jax.serving import answers, limits, openai_format
from lamini_jax.serving import openai_schema as schema
from lamini_jax.serving.answers import BASE, MEMORY, Told
from lamini_jax.serving.limits import ApiError
from lamini_jax.serving.openai_format import Chats, Choice, Completions
from lamini_jax.serving.openapi import Operation
from lamini_jax.serving.state import State
from lamini_jax.serving.work import Done, Piece, Scored, Scoring, Work

OPERATIONS = (
    Operation("get", "/v1/models", "Lists the models", {200: schema.Models}),
    Operation("post", "/v1/chat/completions", "Continues a conversation", {200: schema.Answer}, schema.ChatRequest),
    Operation("post", "/v1/completions", "Continues texts", {200: schema.Answer}, schema.CompletionRequest),
    Operation("post", "/tokenize", "Shows the tokens of a text", {200: schema.Tokens}, schema.TokenizeRequest),
    Operation("post", "/detokenize", "Shows the text of tokens", {200: schema.Text}, schema.DetokenizeRequest),
    Operation("get", "/tokenizer_info", "Describes the tokenizer", {200: schema.TokenizerInfo}),
)
_COMPLETION_TOKENS = 16  # unless a request says how many, as of old
_WATCH_SECONDS = 0.25  # how often a request looks whether its client is still there
_SAMPLED_ONCE = 2**32
_Event = Piece | Scored | Done


@dataclasses.dataclass(frozen=True)
class _Job:
    """A request as the engine has it, and how what comes back is told."""

    form: Completions | Chats
    model: str
    prompts: Sequence[Sequence[int]]
    works: Sequence[Work | Scoring]
    prompt_of: Sequence[int]  # of each work
    told: Sequence[Told]  # of each prompt, for the model `memory`
    choices: int
    kept: int | None = None  # tokens of each answer that are told, of those that only score their prompt
    echoes: Sequence[str] = ()  # what the answers to each prompt begin with, if they do

    @property
    def memory(self) -> dict[str, Any]:
        """The field of that name."""
        found = [told.content for told in self.told]
        return {"memory": found[0] if len(found) == 1 else found} if found else {}

    def begun(self) -> list[Choice]:
        """The answers before anything is known of them."""
        prompts = [number for number in range(len(self.prompts)) for _ in range(self.choices)]
        return [Choice(index, self.echoes[at] if self.echoes else "") for index, at in enumerate(prompts)]

    def is_only_scored(self, event: Scored) -> bool:
        """Whether the token that this has after the prompt is the answer."""
        return bool(self.kept) and self.prompt_of.count(self.prompt_of[event.work]) == 1

    @property
    def headers(self) -> dict[str, str]:
        """The same as headers of the response."""
        return self.told[0].headers if len(self.told) == 1 else {}


def routes(state: State) -> list[Route]:
    """The routes of the API."""
    api = _Api(state)
    return [
        Route("/v1/models", api.models, methods=["GET"]),
        Route("/v1/models/{model}", api.one_model, methods=["GET"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.complete, methods=["POST"]),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/tokenizer_info", api.tokenizer_info, methods=["GET"]),
    ]


class _Api:
    """What the routes do."""

    def __init__(self, state: State):
        self._state, self._started = state, int(time.time())
        self._model, self._tokenizer = state.memory.model, state.memory.model.tokenizer
        self._asking = answers.Asking(state)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(name) for name in (BASE, MEMORY)]})

    async def one_model(self, request: Request) -> Response:
        self._check_model(name := request.path_params["model"])
        return JSONResponse(self._described(name))

    async def chat(self, request: Request) -> Response:
        asked = await self._asked(request, schema.ChatRequest)
        for said in asked.messages:
            self._check_text(said.text, "messages")
        question = next((said.text for said in reversed(asked.messages) if said.role == "user"), "")
        tokens = self._tokenizer.chat(asked.plain_messages())
        self._check_length(len(tokens), 1, "messages")
        told = await self._told(asked.model, [question])
        limit = asked.max_completion_tokens or asked.max_tokens or self._model.max_seq_len
        works = [self._work(asked, tokens, found, limit) for found in told or [Told()]]
        form = Chats(self._tokenizer, asked.likeliest is not None)
        job = _Job(form, asked.model, [tokens], works, [0], told, asked.n or 1)
        return await self._answer(request, asked, job)

    async def complete(self, request: Request) -> Response:
        asked = await self._asked(request, schema.CompletionRequest)
        if len(asked.prompts) > (most := self._state.settings.prompts):
            raise ApiError(400, f"{len(asked.prompts)} prompts; send at most {most} at a time", param="prompt")
        limit = _COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
        if not limit and not asked.echo:
            raise ApiError(400, "max_tokens: must be at least 1, unless echo is true", param="max_tokens")
        read = [self._read(prompt) for prompt in asked.prompts]
        prompts = [tokens for tokens, _ in read]
        scoring = asked.echo and (asked.likeliest is not None or not limit)
        alone = scoring and limit <= 1 and (asked.n or 1) == 1 and not (asked.temperature and limit)
        for tokens in prompts:
            self._check_length(len(tokens), 0 if alone else 1, "prompt")
        told = await self._told(asked.model, [text for _, text in read])
        works, prompt_of = [], []
        for number, tokens in enumerate(prompts):
            found = told[number] if told else Told()
            if scoring:
                works.append(Scoring(tuple(tokens), max(1, asked.likeliest or 0), self._deadline()))
            if limit and not (alone and found.fact is None):
                works.append(self._work(asked, tokens, found, limit))
            prompt_of += [number] * (len(works) - len(prompt_of))
        form = Completions(self._tokenizer, asked.likeliest is not None)
        echoes = [text for _, text in read] if asked.echo else ()
        job = _Job(form, asked.model, prompts, works, prompt_of, told, asked.n or 1, limit if alone else None, echoes)
        return await self._answer(request, asked, job)

    async def tokenize(self, request: Request) -> Response:
        asked = await limits.body(request, schema.TokenizeRequest, self._state.settings.body_bytes)
        read = self._tokenizer.plain if asked.add_special_tokens else self._tokenizer.encode
        tokens = read(asked.prompt)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self._model.max_seq_len})

    async def detokenize(self, request: Request) -> Response:
        asked = await limits.body(request, schema.DetokenizeRequest, self._state.settings.body_bytes)
        self._check_ids(asked.tokens, "tokens")
        return JSONResponse({"prompt": self._tokenizer.shown(asked.tokens)})

    async def tokenizer_info(self, request: Request) -> Response:
        stop = self._tokenizer.stop_ids[0]
        values = {"eos_token": self._tokenizer.shown([stop]), "eos_token_id": stop}
        return JSONResponse({**values, "max_model_len": self._model.max_seq_len})

    async def _asked(self, request: Request, model):
        asked = await limits.body(request, model, self._state.settings.body_bytes)
        self._check_model(asked.model)
        most = min(self._state.settings.choices, self._state.engine.slots)
        if (asked.n or 1) > most:
            raise ApiError(400, f"n={asked.n}: at most {most} answers at a time", param="n")
        return asked

    def _work(self, asked, tokens: Sequence[int], told: Told, limit: int) -> Work:
        given = tuple(tokens) if told.fact is None else told.tokens
        seed = secrets.randbelow(_SAMPLED_ONCE) if asked.seed is None else asked.seed
        how = {"temperature": asked.temperature or 0.0, "top_p": asked.top_p or 1.0, "seed": seed}
        how |= {"choices": asked.n or 1, "stop": asked.stops, "likeliest": asked.likeliest}
        return Work(given, limit, told.adapters, **how, deadline=self._deadline())

    def _deadline(self) -> float:
        return time.monotonic() + self._state.settings.seconds

    async def _told(self, model: str, questions: Sequence[str]) -> list[Told]:
        """What the memory finds for each question, if that is the model that is asked."""
        loop = asyncio.get_running_loop()
        return [await self._asking(loop, question) for question in questions] if model == MEMORY else []

    def _read(self, prompt: str | list[int]) -> tuple[list[int], str]:
        """The tokens of a prompt, and its text."""
        if isinstance(prompt, str):
            self._check_text(prompt, "prompt")
            return self._tokenizer.plain(prompt), prompt
        self._check_ids(prompt, "prompt")
        return prompt, self._tokenizer.shown(prompt)

    async def _answer(self, request: Request, asked, job: _Job) -> Response:
        events = self._events(job.works)
        if asked.stream:
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            first = await anext(events)  # what is refused at once has its own status
            chunks = self._chunks(job, first, events, with_usage)
            return StreamingResponse(chunks, media_type="text/event-stream", headers=job.headers)
        collecting = asyncio.ensure_future(self._collect(job, events))
        try:
            while not collecting.done():
                await asyncio.wait([collecting], timeout=_WATCH_SECONDS)
                if not collecting.done() and await request.is_disconnected():
                    return Response(status_code=499)  # nobody reads it
            return JSONResponse(collecting.result(), headers=job.headers)
        finally:
            collecting.cancel()
            with contextlib.suppress(BaseException):
                await collecting

    async def _events(self, works: Sequence[Work | Scoring]) -> AsyncIterator[_Event]:
        """What the engine hands over, up to Done. Raises the error that ended the request."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        ticket = self._state.engine.submit(works, lambda event: loop.call_soon_threadsafe(queue.put_nowait, event))
        try:
            while True:
                event = await queue.get()
                if isinstance(event, Done) and event.error is not None:
                    raise event.error
                yield event
                if isinstance(event, Done):
                    return
        finally:
            ticket.cancel()

    async def _collect(self, job: _Job, events: AsyncIterator[_Event]) -> dict[str, Any]:
        """The whole answer."""
        choices, generated = job.begun(), 0
        async with contextlib.aclosing(events):
            async for event in events:
                for part in _parts(job, event, self._tokenizer):
                    choice = choices[part.index]
                    choice.text += part.text
                    choice.tokens += part.tokens
                    choice.finish = part.finish or choice.finish
                generated += _generated(job, event)
        envelope = openai_format.envelope(job.form, job.model, stream=False)
        told = {"choices": [job.form.whole(choice) for choice in choices]}
        return {**envelope, **told, "usage": openai_format.usage(job.prompts, generated), **job.memory}

    async def _chunks(self, job: _Job, first: _Event, events, with_usage: bool) -> AsyncIterator[str]:
        """The lines of a stream."""
        envelope, generated = openai_format.envelope(job.form, job.model, stream=True), 0
        letters: dict[int, int] = {}

        def line(choices: list[dict[str, Any]], **more) -> str:
            return f"data: {json.dumps({**envelope, 'choices': choices, **more}, allow_nan=False)}\n\n"

        more = job.memory
        for begun in job.begun():
            if (part := job.form.first(begun)) is not None:
                yield line([part], **more)
                more = {}
        try:
            async for event in _after(first, events):
                generated += _generated(job, event)
                for part in _parts(job, event, self._tokenizer):
                    part.letters = letters.get(part.index, 0)
                    if part.text or part.tokens or part.finish:
                        yield line([job.form.chunk(part)], **more)
                        more = {}
                    letters[part.index] = part.letters
        except Exception as error:
            told = limits.described(error)
            if told.status == 500:
                logging.getLogger(__name__).exception("a stream has failed")
            yield f"data: {json.dumps(told.content)}\n\n"
            return
        finally:
            await events.aclose()
        if with_usage:
            yield line([], usage=openai_format.usage(job.prompts, generated))
        yield "data: [DONE]\n\n"

    def _described(self, name: str) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": self._started, "owned_by": "lamini_jax"}
        return {**about, "max_model_len": self._model.max_seq_len}

    def _check_model(self, name: str) -> None:
        if name not in (BASE, MEMORY):
            message = f"there is no model {name[:100]!r}; ask {BASE} or {MEMORY}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def _check_text(self, text: str, where: str) -> None:
        if reason := self._tokenizer.why_unsupported(text, exactly=False):
            raise ApiError(400, f"{where}: a text {reason}", param=where)

    def _check_ids(self, ids: Sequence[int], where: str) -> None:
        if (largest := max(ids, default=0)) >= (vocabulary := self._model.decoder.config.vocab_size):
            raise ApiError(400, f"{where}: {largest} is no token; there are {vocabulary}", param=where)

    def _check_length(self, count: int, needed: int, where: str) -> None:
        """Raises ApiError for a prompt beside which so many more tokens do not fit."""
        if count > (room := self._model.max_seq_len - needed):
            message = f"{where}: {count} tokens, and at most {room} fit; shorten the prompt"
            raise ApiError(400, message, code="context_length_exceeded", param=where)


def _parts(job: _Job, event: _Event, tokenizer) -> list[Choice]:
    """What an event adds to which answers."""
    if isinstance(event, Done):
        return []
    prompt = job.prompt_of[event.work]
    if isinstance(event, Piece):
        return [Choice(prompt * job.choices + event.choice, event.text, list(event.tokens), event.finish)]
    *told, last = event.tokens
    text, finish = "", None
    if job.is_only_scored(event):
        told, text = [*told, last], tokenizer.decode([last.id])
        finish = "stop" if last.id in tokenizer.stop_ids else "length"
    elif job.prompt_of.count(prompt) == 1:
        finish = "length"
    first = prompt * job.choices
    return [Choice(first + choice, text, list(told), finish) for choice in range(job.choices)]


def _generated(job: _Job, event: _Event) -> int:
    """How many tokens an event adds to the answers."""
    if isinstance(event, Piece):
        return len(event.tokens)
    return int(isinstance(event, Scored) and job.is_only_scored(event))


async def _after(first: _Event, events: AsyncIterator[_Event]) -> AsyncIterator[_Event]:
    yield first
    async for event in events:
        yield event
