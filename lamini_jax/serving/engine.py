"""Continuous batching: a thread that owns the devices gives every active answer its next token, step by step."""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import MemoryConfig
from lamini_jax.serving import programs
from lamini_jax.serving.programs import Settings, Slots
from lamini_jax.serving.texts import Writer
from lamini_jax.serving.work import Cancelled, Done, Full, Late, Piece, Scored, Scoring, Token, Work

Deliver = Callable[[Piece | Scored | Done], None]  # called in the engine's thread


@dataclasses.dataclass(frozen=True)
class Figures:
    """What an engine is doing, and has done since it started."""

    slots: int
    active: int  # slots that are answering
    waiting: int  # requests in the queue
    prompt_tokens: int
    tokens: int  # generated
    steps: int
    stepped: int  # answers that these steps have continued: stepped / steps is how full batches were


class Ticket:
    """A request that was submitted."""

    def __init__(self, works: Sequence[Work | Scoring], deliver: Deliver):
        self.works, self.deliver, self.left = works, deliver, sum(getattr(work, "choices", 1) for work in works)
        self.arrived, self.started, self.first = time.monotonic(), None, None
        self.generated, self.error, self.told = 0, None, False
        self.deadline = min(work.deadline for work in works)

    def cancel(self) -> None:
        """Frees its slots before the next step."""
        self.error = self.error or Cancelled()

    def is_over(self) -> bool:
        """Whether nobody waits for it any more."""
        if self.error is None and time.monotonic() > self.deadline:
            self.error = Late("the request took too long; ask for fewer tokens, or try again later")
        return self.error is not None

    def tell(self, piece: Piece | Scored | Done) -> None:
        """Hands over what there is; whoever cannot take it has gone."""
        try:
            self.deliver(piece)
        except Exception:
            self.cancel()

    def done(self) -> Done:
        """What it took until now."""
        now = time.monotonic()
        waited, first = (now if moment is None else moment for moment in (self.started, self.first))
        seconds = {"queued_seconds": waited - self.arrived, "first_seconds": first - self.arrived}
        tokens = sum(len(work.tokens) for work in self.works)
        return Done(self.error, tokens, self.generated, **seconds, seconds=now - self.arrived)


@dataclasses.dataclass
class _Answer:
    """An answer that a slot is giving."""

    ticket: Ticket
    number: int  # of the work in its request
    choice: int
    writer: Writer
    token: int  # the last one, which is to be read at
    position: int
    budget: int  # tokens that it may still get
    count: int = 0  # tokens that it has

    @property
    def work(self) -> Work:
        return self.ticket.works[self.number]


class Engine:
    """Answers of one backbone: at most `slots` at a time, while at most `queue` requests wait.

    Adapters are those of a `memory`, with at most `rank` experts.
    """

    def __init__(self, model: FrozenModel, slots: int, queue: int, memory: MemoryConfig, rank: int):
        self.model, self.slots, self.rank, self._queue_limit = model, slots, rank, queue
        self._plain = model.replace(beginning=None)
        self._shared = model.tokenizer.frame.beginning if model.beginning is not None else ()
        self._empty = lambda: programs.empty(self._plain, slots, memory, rank)
        self._state: Slots = self._empty()
        self._no_adapter = jax.tree.map(lambda x_MSKX: jnp.zeros_like(x_MSKX[:, :1]), self._state.adapter)
        self._equipped = [False] * slots
        self._active: list[_Answer] = []  # of slots 0, 1, ...: what they have is moved so that there are no gaps
        self._waiting: collections.deque[tuple[Ticket, int]] = collections.deque()
        self._changed, self._stopping = threading.Condition(), False
        self._watchers: list[Callable[[Done], None]] = []
        self._counts = collections.Counter()
        self._mesh = jax.sharding.get_mesh()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, works: Sequence[Work | Scoring], deliver: Deliver) -> Ticket:
        """Queues a request. `deliver` gets pieces, one Scored for each Scoring, and then a Done.

        Raises Full if too many wait.
        """
        ticket = Ticket(tuple(works), deliver)
        with self._changed:
            if self._stopping:
                raise Full("the server is stopping; ask another one")
            if self._requests_waiting() >= self._queue_limit:
                raise Full("too many requests are waiting; try again later")
            self._waiting.extend((ticket, number) for number in range(len(works)))
            self._changed.notify()
        return ticket

    def watch(self, told: Callable[[Done], None]) -> None:
        """Has `told` called, in the engine's thread, at the end of each request."""
        self._watchers.append(told)

    @property
    def figures(self) -> Figures:
        counts = {name: self._counts[name] for name in ("prompt_tokens", "tokens", "steps", "stepped")}
        with self._changed:
            waiting = self._requests_waiting()
        return Figures(self.slots, len(self._active), waiting, **counts)

    def stop(self) -> None:
        """Finishes what runs and waits, then ends the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def compile(self) -> None:
        """Runs every program once in each of its shapes, before the thread is started."""
        state, zero = self._state, np.int32(0)
        for model in (self.model, self._plain) if self._shared else (self._plain,):
            for width in programs.widths(model):
                prompt_1T = np.full((1, width), self.model.tokenizer.pad_id, np.int32)
                state = programs.read(model, state, zero, prompt_1T, None)
        state = programs.copy(programs.equip(state, zero, self._no_adapter), zero, zero)
        for rows in programs.sizes(self.slots):
            for reach in programs.reaches(self.model.max_seq_len):
                zeros_N = np.zeros(rows, np.int32)
                state, stepped = programs.step(self._plain, state, zeros_N, zeros_N, reach)
            stepped = programs.sample(stepped, _settings([], rows))
            jax.block_until_ready(programs.likeliest(stepped.logits_NV))
        for width in programs.score_widths(self.model.max_seq_len):
            prompt_BT = np.zeros((programs.scored_rows(width), width), np.int32)
            jax.block_until_ready(programs.score(self._plain, prompt_BT))
        self._state = state

    def _requests_waiting(self) -> int:
        return len({id(ticket) for ticket, _ in self._waiting})

    def _run(self) -> None:
        with contextlib.nullcontext() if self._mesh.empty else jax.set_mesh(self._mesh):
            while self._has_work():
                try:
                    self._drop_what_is_over()
                    self._admit()
                    self._step()
                except Exception as error:  # of the devices: whoever is being answered hears of it, others go on
                    self._fail(error)

    def _has_work(self) -> bool:
        """Waits for work; False when there is none and the engine is stopped."""
        with self._changed:
            while not self._waiting and not self._active:
                if self._stopping:
                    return False
                self._changed.wait()
        return True

    def _drop_what_is_over(self) -> None:
        with self._changed:
            over = {ticket for ticket, _ in self._waiting if ticket.is_over()}
            self._waiting = collections.deque(item for item in self._waiting if item[0] not in over)
        over |= {answer.ticket for answer in self._active if answer.ticket.is_over()}
        for slot in reversed(range(len(self._active))):
            if self._active[slot].ticket in over:
                self._leave(slot)
        for ticket in over:
            self._tell_done(ticket)

    def _admit(self) -> None:
        """Begins what waits, in the order in which it came, as long as there is room."""
        scoring: list[tuple[Ticket, int]] = []
        while True:
            with self._changed:
                if not self._waiting:
                    break
                ticket, number = self._waiting[0]
                work = ticket.works[number]
                wanted = 0 if isinstance(work, Scoring) else work.choices
                if wanted > self.slots - len(self._active):
                    break
                if not wanted and scoring and not self._scored_together(scoring, ticket, work):
                    break
                self._waiting.popleft()
            ticket.started = ticket.started or time.monotonic()
            self._counts["prompt_tokens"] += len(work.tokens)
            if isinstance(work, Scoring):
                scoring.append((ticket, number))
            else:
                self._begin(ticket, number, work)
        if scoring:
            self._score(scoring)

    def _begin(self, ticket: Ticket, number: int, work: Work) -> None:
        """Reads a prompt into the next slots, one for each choice."""
        first, length = len(self._active), len(work.tokens)
        budget = min(work.max_tokens, self.model.max_seq_len - length)
        # The answer's first token is predicted by a step: it reads the prompt's last token, with the adapter.
        for choice in range(work.choices):
            writer = Writer(self.model.tokenizer, work.stop)
            last = work.tokens[-1], length - 1
            self._active.append(_Answer(ticket, number, choice, writer, *last, budget))
        shared = self._shared and work.tokens[: len(self._shared)] == self._shared and length > len(self._shared)
        adapters = work.adapters
        beside = adapters.suffix if adapters is not None else None
        model = self.model if shared and beside is None else self._plain
        width = programs.at_least(programs.widths(model), length)
        prompt_1T = np.full((1, width), self.model.tokenizer.pad_id, np.int32)
        prompt_1T[0, :length] = work.tokens
        self._state = programs.read(model, self._state, np.int32(first), prompt_1T, beside)
        if adapters is not None or self._equipped[first]:
            adapter = self._no_adapter if adapters is None else adapters.suffix or adapters.answer
            self._state = programs.equip(self._state, np.int32(first), adapter)
            self._equipped[first] = adapters is not None
        for slot in range(first + 1, len(self._active)):
            self._copy(first, slot)

    def _copy(self, source: int, target: int) -> None:
        self._state = programs.copy(self._state, np.int32(source), np.int32(target))
        self._equipped[target] = self._equipped[source]

    def _leave(self, slot: int) -> None:
        """Ends what a slot does; the last active one moves into it."""
        last = self._active.pop()
        if slot < len(self._active):
            self._active[slot] = last
            self._copy(len(self._active), slot)

    def _step(self) -> None:
        """Gives each active answer its next token."""
        if not self._active:
            return
        rows = programs.at_least(programs.sizes(self.slots), len(self._active))
        token_N, position_N = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for slot, answer in enumerate(self._active):
            token_N[slot], position_N[slot] = answer.token, answer.position
        reach = programs.at_least(programs.reaches(self.model.max_seq_len), int(position_N.max()) + 1)
        self._state, stepped = programs.step(self._plain, self._state, token_N, position_N, reach)
        if any(answer.work.temperature > 0 for answer in self._active):
            stepped = programs.sample(stepped, _settings(self._active, rows))
        told = ()
        if any(answer.work.likeliest for answer in self._active):
            told = jax.tree.map(np.asarray, programs.likeliest(stepped.logits_NV))
        token_N, logprob_N = np.asarray(stepped.token_N), np.asarray(stepped.logprob_N)
        self._counts += {"steps": 1, "stepped": len(self._active)}
        for slot in reversed(range(len(self._active))):
            likeliest = [x_NX[slot] for x_NX in told]
            if self._continue(self._active[slot], int(token_N[slot]), float(logprob_N[slot]), likeliest):
                self._leave(slot)

    def _continue(self, answer: _Answer, token: int, logprob: float, likeliest: list[np.ndarray]) -> bool:
        """Adds a token to an answer, and says whether it is complete."""
        ticket, work = answer.ticket, answer.work
        ticket.first = ticket.first or time.monotonic()
        answer.token, answer.position = token, answer.position + 1
        answer.count, answer.budget = answer.count + 1, answer.budget - 1
        ticket.generated += 1
        self._counts["tokens"] += 1
        tokens, text, finish = (), "", None
        if token in self.model.tokenizer.stop_ids:
            finish = "stop"
        else:
            tokens = (_token(token, logprob, likeliest, work.likeliest),)
            text, stopped = answer.writer.add(token)
            finish = "stop" if stopped else None if answer.budget else "length"
            if stopped:
                return self._tell(answer, Piece(answer.number, answer.choice, text, tokens, finish))
        if finish:
            text += answer.writer.end()
        return self._tell(answer, Piece(answer.number, answer.choice, text, tokens, finish))

    def _tell(self, answer: _Answer, piece: Piece) -> bool:
        answer.ticket.tell(piece)
        if piece.finish:
            self._part_done(answer.ticket)
        return bool(piece.finish)

    def _scored_together(self, scoring: list[tuple[Ticket, int]], ticket: Ticket, work: Scoring) -> bool:
        """Whether another prompt fits in the batch of these."""
        first = scoring[0][0].works[scoring[0][1]]
        lengths = programs.score_widths(self.model.max_seq_len)
        width, other = (programs.at_least(lengths, len(each.tokens)) for each in (first, work))
        return width == other and len(scoring) < programs.scored_rows(width)

    def _score(self, scoring: list[tuple[Ticket, int]]) -> None:
        """Scores some prompts of one padded length."""
        works = [ticket.works[number] for ticket, number in scoring]
        width = programs.at_least(programs.score_widths(self.model.max_seq_len), len(works[0].tokens))
        prompt_BT = np.full((programs.scored_rows(width), width), self.model.tokenizer.pad_id, np.int32)
        for row_T, work in zip(prompt_BT, works, strict=False):
            row_T[: len(work.tokens)] = work.tokens
        try:
            scored = jax.tree.map(np.asarray, programs.score(self._plain, prompt_BT))
        except Exception as error:
            for ticket, _ in scoring:
                ticket.error = error
                self._tell_done(ticket)
            return
        for row, ((ticket, number), work) in enumerate(zip(scoring, works, strict=True)):
            ticket.first = ticket.first or time.monotonic()
            ticket.generated += 1
            self._counts["tokens"] += 1
            tokens = _scored_tokens(work, *(x_BT[row] for x_BT in scored))
            ticket.tell(Scored(number, tokens))
            self._part_done(ticket)

    def _part_done(self, ticket: Ticket) -> None:
        ticket.left -= 1
        if not ticket.left:
            self._tell_done(ticket)

    def _tell_done(self, ticket: Ticket) -> None:
        if ticket.told:
            return
        ticket.told, done = True, ticket.done()
        ticket.tell(done)
        for told in self._watchers:
            told(done)

    def _fail(self, error: Exception) -> None:
        """Ends what is active with an error, and begins with empty slots."""
        over = {answer.ticket for answer in self._active}
        self._active.clear()
        with self._changed:
            self._waiting = collections.deque(item for item in self._waiting if item[0] not in over)
        self._state, self._equipped = self._empty(), [False] * self.slots
        for ticket in over:
            ticket.error = error
            self._tell_done(ticket)


def _settings(active: Sequence[_Answer], rows: int) -> Settings:
    """How the tokens of some answers are chosen, and any tokens of the rows after them."""

    def values() -> Iterator[tuple]:
        for answer in active:
            work = answer.work
            yield work.temperature, work.top_p, work.seed & 0xFFFFFFFF, answer.choice, answer.count
        yield from [(0.0, 1.0, 0, 0, 0)] * (rows - len(active))

    kinds = np.float32, np.float32, np.uint32, np.int32, np.int32
    return Settings(*(np.array(column, kind) for column, kind in zip(zip(*values(), strict=True), kinds, strict=True)))


def _token(token: int, logprob: float, likeliest: Sequence[np.ndarray], wanted: int | None) -> Token:
    if wanted is None:
        return Token(token)
    best = tuple(zip(*(x_X[:wanted].tolist() for x_X in likeliest), strict=True)) if wanted else ()
    return Token(token, dict(best).get(token, logprob), best)  # the same float in both places


def _scored_tokens(work: Scoring, logprob_T, token_TX, logprob_TX) -> tuple[Token, ...]:
    """The tokens of a prompt, each with what the place before it predicts, and the likeliest one after them."""
    followed = [*work.tokens[1:], int(token_TX[len(work.tokens) - 1, 0])]
    logprobs = [*logprob_T[: len(work.tokens) - 1].tolist(), float(logprob_TX[len(work.tokens) - 1, 0])]
    places = range(len(work.tokens))
    rest = (_token(followed[i], logprobs[i], (token_TX[i], logprob_TX[i]), work.likeliest) for i in places)
    return Token(work.tokens[0]), *rest
