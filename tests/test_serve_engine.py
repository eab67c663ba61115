"""Continuous batching: answers are those of the memory alone, whatever else is in the batch, and slots become free."""

import queue
import threading
import time

import helpers
import jax
import numpy as np
import pytest
import serving_memory
from serving_server import OUTSIDE, STORED, TOKENIZER, asked, ended, prepared, tuned, work_for

from lamini_jax.backbone import transformer
from lamini_jax.serving import programs
from lamini_jax.serving.texts import Writer
from lamini_jax.serving.work import Cancelled, Done, Full, Late, Piece, Scored, Scoring

QUESTIONS = [*STORED, *OUTSIDE, "what is the code of box 002"]
TOKENS = 24


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        serving_memory.use_word_judge(patch)
        yield tuned(tmp_path_factory.mktemp("memory") / "memory")


@pytest.fixture(scope="module")
def state(memory):
    state = prepared(memory)
    yield state
    ended(state)


@pytest.fixture(scope="module")
def expected(memory):
    """What the memory and the bare backbone answer by themselves."""
    whole, bare = memory.ask(QUESTIONS, TOKENS), memory.bare().ask(QUESTIONS, TOKENS)
    return {"memory": [answer.text for answer in whole], "base": [answer.text for answer in bare]}


def works(state, model):
    return [work_for(state, question, TOKENS, model) for question in QUESTIONS]


@pytest.mark.parametrize("model", ["memory", "base"])
def test_answers_alone_are_those_of_the_memory(state, expected, model):
    assert [asked(state, work)[0][0, 0] for work in works(state, model)] == expected[model]


def test_answers_in_a_full_batch_are_the_same(state, expected):
    given, _, _ = asked(state, *works(state, "memory"), *works(state, "base"))
    assert [given[number, 0] for number in range(2 * len(QUESTIONS))] == expected["memory"] + expected["base"]
    figures = state.engine.figures
    assert (figures.active, figures.waiting) == (0, 0)


def test_many_requests_that_come_and_go(state, expected):
    """More than there are slots, of different lengths, from several threads."""
    failed = []

    def client(start):
        for number in range(start, start + 6):
            at, tokens = number % len(QUESTIONS), 1 + 5 * number % TOKENS
            given, _, done = asked(state, work_for(state, QUESTIONS[at], tokens))
            if done.error or not expected["memory"][at].startswith(given[0, 0].rstrip("\ufffd")):
                failed.append((QUESTIONS[at], given, done))

    threads = [threading.Thread(target=client, args=(start,)) for start in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_draws_depend_on_the_seed_and_on_nothing_else(state):
    def drawn(seed, *others, choices=1):
        work = work_for(state, "Who?", 12, "base", temperature=1.0, seed=seed, choices=choices)
        given, _, _ = asked(state, work, *others)
        return [given[0, choice] for choice in range(choices)]

    alone = drawn(5)
    assert drawn(5, *works(state, "memory")) == drawn(5) == alone != drawn(6)
    several = drawn(5, choices=3)
    assert several[:1] == alone and len(set(several)) == 3


def test_a_small_top_p_leaves_the_likeliest_token(state, expected):
    work = work_for(state, "Who?", TOKENS, "base", temperature=1.0, top_p=1e-6, seed=3)
    assert asked(state, work)[0][0, 0] == expected["base"][QUESTIONS.index("Who?")]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_fewest_tokens_that_have_it(top_p):
    logits_V = np.random.default_rng(0).normal(size=200).astype(np.float32) * 2
    probability_V = np.exp(logits_V) / np.exp(logits_V).sum()
    ordered = np.sort(probability_V)[::-1]
    fewest = int(np.searchsorted(np.cumsum(ordered), top_p * (1 - 1e-6))) + 1 if top_p < 1 else 200
    kept_V = np.asarray(jax.jit(programs.nucleus)(logits_V, np.float32(top_p)))
    assert kept_V.sum() == fewest and probability_V[kept_V].min() >= ordered[fewest - 1] * (1 - 1e-6)


def test_nothing_compiles_after_the_warm_up(state, caplog):
    jax.config.update("jax_log_compiles", True)
    try:
        asked(state, *works(state, "memory"))
        asked(state, work_for(state, "x" * 70, 40, "base", temperature=0.7, top_p=0.8, likeliest=3, choices=5))
        asked(state, Scoring((5,) * 3), Scoring((5,) * 100, 20))
        asked(state, *[work_for(state, QUESTIONS[i % 8], 3 + i, likeliest=2) for i in range(11)])
    finally:
        jax.config.update("jax_log_compiles", False)
    assert helpers.compilations(caplog) == []


def test_who_has_gone_frees_the_slot(state):
    found = queue.SimpleQueue()
    before = state.engine.figures.tokens
    ticket = state.engine.submit([endless(state)] * 16, found.put)
    found.get(timeout=60)
    ticket.cancel()
    end = until_done(found)
    assert isinstance(end.error, Cancelled) and state.engine.figures.active == 0
    assert state.engine.figures.tokens - before < 16 * 100


def test_who_is_late_frees_the_slot(state):
    _, events, end = asked(state, endless(state, deadline=time.monotonic() - 1))
    assert isinstance(end.error, Late) and events == []
    assert state.engine.figures.active == 0


def test_a_full_queue_refuses(memory, tmp_path):
    memory.directory.joinpath("config.json").write_text("{}")
    memory.save(tmp_path / "copy")
    other = serving_memory.opened(memory.model, tmp_path / "copy")
    state = prepared(other, slots=1)
    try:
        found = queue.SimpleQueue()
        tickets = []
        with pytest.raises(Full, match="try again later"):
            for _ in range(40):
                tickets.append(state.engine.submit([endless(state)], found.put))
        assert len(tickets) in (16, 17)  # that may wait, and one that is answered already
        for ticket in tickets:
            ticket.cancel()
        for _ in tickets:
            until_done(found)
        assert asked(state, work_for(state, STORED[0]))[2].error is None
    finally:
        ended(state)


def test_an_error_of_the_devices_ends_what_runs_and_nothing_else(state, expected, monkeypatch):
    def fails(*_):
        monkeypatch.undo()
        raise RuntimeError("no memory")

    monkeypatch.setattr(programs, "step", fails)
    assert str(asked(state, work_for(state, "Who?"))[2].error) == "no memory"
    assert asked(state, work_for(state, STORED[1]))[0][0, 0] == expected["memory"][1]


def test_scores_are_those_of_the_whole_model(state):
    tokens = tuple(TOKENIZER.prompt("Name a river of the north"))
    _, (scored,), _ = asked(state, Scoring(tokens, 3))
    assert isinstance(scored, Scored) and [token.id for token in scored.tokens[:-1]] == list(tokens)
    model = state.memory.model
    logits_TV = transformer.logits(model.decoder.config, whole(model), np.array([tokens]))[0]
    logprob_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    assert scored.tokens[0].logprob is None and scored.tokens[-1].id == logprob_TV[-1].argmax()
    for place, token in enumerate(scored.tokens[1:]):
        assert token.logprob == pytest.approx(logprob_TV[place, token.id], abs=1e-4)
        ids, logprobs = zip(*token.likeliest, strict=True)
        assert logprobs == pytest.approx(np.sort(logprob_TV[place])[:-4:-1], abs=1e-4)
        if token.id in ids:
            assert token.logprob == dict(token.likeliest)[token.id]


def test_log_probabilities_of_an_answer_are_those_of_its_scores(state):
    _, pieces, _ = asked(state, work_for(state, "Who?", 6, "base", likeliest=2))
    answer = [token for piece in pieces for token in piece.tokens]
    prompt = TOKENIZER.prompt("Who?")
    _, (scored,), _ = asked(state, Scoring((*prompt, *(token.id for token in answer)), 2))
    again = scored.tokens[len(prompt) : -1]
    assert [token.id for token in again] == [token.id for token in answer]
    assert [token.logprob for token in again] == pytest.approx([token.logprob for token in answer], abs=1e-4)
    assert all(token.logprob == token.likeliest[0][1] for token in answer)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", (), "one two three"),
        ("one two three", ("two",), "one "),
        ("one two three", ("e t", "two"), "on"),
        ("one two thr", ("three",), "one two thr"),
        ("aab", ("ab",), "a"),
        ("größer 🙂 ist", ("ist",), "größer 🙂 "),
        ("x" * 100 + "end", ("xend",), "x" * 99),
    ],
)
def test_texts_grow_by_whole_letters_up_to_a_stop_text(text, stop, expected):
    writer, parts, stopped = Writer(TOKENIZER, stop), [], False
    for token in TOKENIZER.encode(text):
        new, stopped = writer.add(token)
        assert "\ufffd" not in new
        parts.append(new)
        if stopped:
            break
    assert "".join(parts) + ("" if stopped else writer.end()) == expected


def test_a_letter_that_stays_unfinished_is_shown_at_the_end():
    writer = Writer(TOKENIZER)
    assert writer.add(0xF0) == ("", False) and writer.add(0x9F) == ("", False)
    assert writer.end() == TOKENIZER.decode([0xF0, 0x9F])


def endless(state, **options):
    """What goes on until there is no room."""
    return work_for(state, "Who?", 1000, "base", temperature=2.0, **options)


def until_done(found):
    while not isinstance(event := found.get(timeout=60), Done):
        assert isinstance(event, Piece)
    return event


def whole(model):
    return transformer.join_layers(model.params)
