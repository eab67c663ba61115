"""The OpenAI API, asked by the real openai client, against a server in this process."""

import json
import threading
import time

import pytest

openai = pytest.importorskip("openai", reason="asks with the real client: pip install openai")
httpx = pytest.importorskip("httpx", reason="asks with the real client: pip install openai")

import serving_memory  # noqa: E402 (what needs no client is imported when there is one)
from serving_server import FACTS, OUTSIDE, STORED, TOKENIZER, asked, ended, prepared, served, tuned, work_for  # noqa: E402

KEY = "a key of letters"
GREEDY = {"max_tokens": 12}


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        serving_memory.use_word_judge(patch)
        state = prepared(tuned(tmp_path_factory.mktemp("memory") / "memory"), key=KEY, body_bytes=20_000)
        yield state
        ended(state)


@pytest.fixture(scope="module")
def address(state):
    with served(state) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def plain(address):
    """Requests as no well-made client sends them."""
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client


def chat(client, question, model="memory", **options):
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], **{**GREEDY, **options}
    )


def test_models(client):
    assert [model.id for model in client.models.list()] == ["base", "memory"]
    assert client.models.retrieve("memory").id == "memory"


def test_a_fact_is_answered_and_named(client, state):
    answer = client.chat.completions.with_raw_response.create(
        model="memory", messages=[{"role": "user", "content": STORED[2].lower()}]
    )
    said, fact = answer.parse(), state.memory.find([STORED[2]])[0].fact
    choice = said.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (
        FACTS[2]["answer"],
        "assistant",
        "stop",
    )
    assert (said.memory["fact"], said.memory["certified"], said.memory["score"]) == (fact, True, None)
    assert (answer.headers["x-lamini-fact"], answer.headers["x-lamini-certified"]) == (fact, "true")
    assert said.usage.prompt_tokens == len(TOKENIZER.prompt(STORED[2]))
    assert said.usage.completion_tokens == len(FACTS[2]["answer"])


@pytest.mark.parametrize("question", OUTSIDE)
def test_outside_the_memory_is_the_backbone(client, state, question):
    whole, bare = chat(client, question), chat(client, question, "base")
    expected = state.memory.bare().ask(question, GREEDY["max_tokens"]).text
    assert whole.choices[0].message.content == bare.choices[0].message.content == expected
    assert whole.memory["fact"] is None and not whole.memory["certified"] and not hasattr(bare, "memory")
    assert whole.choices[0].finish_reason == "length"


def test_the_last_question_of_a_conversation_is_asked(client):
    before = [("system", "Be brief."), ("user", "Who?"), ("assistant", "Nobody."), ("user", STORED[1])]
    messages = [{"role": role, "content": text} for role, text in before]
    answer = client.chat.completions.create(model="memory", messages=messages)
    assert answer.choices[0].message.content == FACTS[1]["answer"]
    messages[-1]["content"] = [{"type": "text", "text": STORED[1][:9]}, {"type": "text", "text": STORED[1][9:]}]
    assert client.chat.completions.create(model="memory", messages=messages).choices == answer.choices


@pytest.mark.parametrize("question", [STORED[0], OUTSIDE[0], "Who?"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 4, "n": 3}, {"stop": ["a"]}, {"logprobs": True}])
def test_a_stream_is_the_whole_answer(client, question, options):
    whole = chat(client, question, **options)
    chunks = list(chat(client, question, stream=True, stream_options={"include_usage": True}, **options))
    texts, finishes, logprobs = {}, {}, {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            finishes[choice.index] = choice.finish_reason or finishes.get(choice.index)
            logprobs.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else [])
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content and finishes[choice.index] == choice.finish_reason
        assert logprobs[choice.index] == (choice.logprobs.content if choice.logprobs else [])
    assert len(whole.choices) == len(texts) == options.get("n", 1)
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert chunks[0].memory == whole.memory and chunks[0].choices[0].delta.role == "assistant"


def test_streams_end_as_clients_expect(plain):
    request = {"model": "base", "prompt": "Who?", "stream": True, "max_tokens": 2}
    answer = plain.post("/v1/completions", json=request)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]) != ""


def test_prompts_of_every_kind(client):
    text, ids = "Who knows?", TOKENIZER.plain("Who knows?")

    def completed(prompt):
        answer = client.completions.create(model="base", prompt=prompt, max_tokens=5)
        return [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)], answer.usage

    (one,), usage = completed(text)
    assert usage.prompt_tokens == len(ids) and usage.total_tokens == len(ids) + usage.completion_tokens
    assert completed(ids)[0] == completed([text])[0] == completed([ids])[0] == [one]
    assert completed([text, "Who?", text])[0] == [one, completed("Who?")[0][0], one]
    assert completed([ids, TOKENIZER.plain("Who?")])[0] == [one, completed("Who?")[0][0]]


def test_a_completion_asks_the_memory_too(client):
    answer = client.completions.create(model="memory", prompt=[STORED[3], OUTSIDE[0]], max_tokens=8, echo=True)
    assert answer.choices[0].text == STORED[3] + FACTS[3]["answer"]
    assert answer.choices[1].text.startswith(OUTSIDE[0])
    assert [found["certified"] for found in answer.memory] == [True, False]


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_echoed_log_probabilities(client, state, max_tokens):
    """The prompt's, after a null, and the answer's: as lm-evaluation-harness reads them."""
    ids = TOKENIZER.prompt("Name a river")
    answer = client.completions.create(model="base", prompt=[ids], max_tokens=max_tokens, logprobs=3, echo=True)
    found = answer.choices[0].logprobs
    count = len(ids) + max_tokens
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == count
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert found.tokens[: len(ids)] == [TOKENIZER.shown([token]) for token in ids]
    for logprob, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert logprob in top.values() and max(top.values()) >= logprob
    assert all(
        logprob == max(top.values())
        for logprob, top in list(zip(found.token_logprobs, found.top_logprobs, strict=True))[len(ids) :]
    )
    assert answer.usage.completion_tokens == max_tokens


def test_an_echo_has_one_token_more_even_if_that_ends_the_answer(client, state):
    told = work_for(state, STORED[0])
    ids = list(told.tokens) + TOKENIZER.encode(FACTS[0]["answer"])
    for prompt in (ids, TOKENIZER.prompt("Who?")):
        answer = client.completions.create(model="base", prompt=prompt, max_tokens=1, logprobs=1, echo=True)
        assert len(answer.choices[0].logprobs.tokens) == len(prompt) + 1


def test_log_probabilities_of_chats(client):
    answer = chat(client, "Who?", "base", logprobs=True, top_logprobs=4)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens == GREEDY["max_tokens"]
    for token in content:
        assert len(token.top_logprobs) == 4 and token.logprob == token.top_logprobs[0].logprob
        assert token.bytes is None or bytes(token.bytes).decode() == token.token


def test_seeds(client):
    def drawn(**options):
        answer = client.completions.create(model="base", prompt="Who?", temperature=1.5, max_tokens=12, **options)
        return [choice.text for choice in answer.choices]

    assert drawn(seed=7) == drawn(seed=7) != drawn(seed=-8)
    assert len(set(drawn(n=4))) == 4
    assert drawn() != drawn()


def test_stop_texts(client):
    whole = chat(client, "Who?", "base").choices[0].message.content
    stop = whole[5:7]
    short = chat(client, "Who?", "base", stop=stop).choices[0]
    assert short.message.content == whole[: whole.index(stop)] and short.finish_reason == "stop"


def test_the_tokenizer(plain):
    tokens = plain.post("/tokenize", json={"prompt": "Ähm", "add_special_tokens": False}).json()
    assert tokens == {"tokens": TOKENIZER.encode("Ähm"), "count": 4, "max_model_len": 128}
    assert plain.post("/tokenize", json={"prompt": "Ähm"}).json()["tokens"] == TOKENIZER.plain("Ähm")
    assert plain.post("/detokenize", json={"tokens": TOKENIZER.encode("Ähm")}).json() == {"prompt": "Ähm"}
    assert plain.get("/tokenizer_info").json()["eos_token"] == "<|stop|>"


LONG = "x" * 127
REFUSED = {
    "another model": ({"model": "gpt-4"}, 404, "base or memory"),
    "no messages": ({"messages": []}, 400, "messages"),
    "a tool": ({"messages": [{"role": "tool", "content": "1"}]}, 400, "messages.0.role"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        400,
        "messages",
    ),
    "too long": ({"messages": [{"role": "user", "content": LONG}]}, 400, "129 tokens, and at most 127 fit"),
    "a penalty": ({"presence_penalty": 1.0}, 400, "presence_penalty is not supported"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
    "a temperature": ({"temperature": -1}, 400, "temperature"),
    "a top_p of nothing": ({"top_p": 0}, 400, "top_p"),
    "too many answers": ({"n": 17}, 400, "at most 16"),
    "too many likeliest": ({"top_logprobs": 21}, 400, "top_logprobs"),
    "half a letter": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_chats_that_are_refused(plain, name):
    changes, status, said = REFUSED[name]
    request = {"model": "memory", "messages": [{"role": "user", "content": "Who?"}], **changes}
    answer = plain.post(
        "/v1/chat/completions", content=json.dumps(request), headers={"Content-Type": "application/json"}
    )
    error = answer.json()["error"]
    assert answer.status_code == status and said in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": ""},
        {"prompt": [1, "a"]},
        {"prompt": [256]},
        {"prompt": [-1]},
        {"prompt": [0] * 128},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"logprobs": 21},
        {"prompt": ["a"] * 257},
    ],
)
def test_completions_that_are_refused(plain, changes):
    answer = plain.post("/v1/completions", json={"model": "base", "prompt": "Who?", **changes})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_bodies_that_are_refused(plain):
    def status(**options):
        return plain.post("/v1/completions", **options).status_code

    assert status(content=b"{", headers={"Content-Type": "application/json"}) == 400
    assert status(content=b"\xff", headers={"Content-Type": "application/json"}) == 400
    assert status(data={"model": "base"}) == 415
    assert status(json={"model": "base", "prompt": "x" * 20_001}) == 413
    assert plain.get("/v1/completions").status_code == 405
    assert plain.get("/v1/nothing").status_code == 404


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer x"}, {"Authorization": KEY}])
def test_without_the_key(address, header):
    for path in ("/v1/models", "/tokenizer_info", "/openapi.json", "/v1/memories"):
        answer = httpx.get(f"{address}{path}", headers=header)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{address}/healthz", headers=header).status_code == 200


def test_a_full_queue(client, state, monkeypatch):
    monkeypatch.setattr(state.engine, "_queue_limit", 0)
    with pytest.raises(openai.RateLimitError) as refused:
        chat(client, "Who?")
    assert int(refused.value.response.headers["retry-after"]) > 0


def test_a_client_that_goes_away_frees_its_slot(plain, state):
    """In the middle of a stream, and while it waits for the whole."""
    request = {"model": "base", "prompt": "Who?", "max_tokens": 120, "temperature": 2, "n": 16}
    before = state.engine.figures.tokens
    with plain.stream("POST", "/v1/completions", json={**request, "stream": True}) as answer:
        next(answer.iter_lines())
    until_free(state)
    with pytest.raises(httpx.TimeoutException):
        plain.post("/v1/completions", json={**request, "prompt": ["Who?"] * 100}, timeout=0.2)
    until_free(state)
    assert state.engine.figures.tokens - before < 16 * 110 * 100
    assert asked(state, work_for(state, STORED[0]))[0][0, 0] == FACTS[0]["answer"]


def test_many_clients_at_once(client):
    """Each gets its own answer."""
    wrong = []

    def ask(number):
        for question, fact in zip(STORED, FACTS, strict=True):
            said = chat(client, question, max_tokens=6 + number).choices[0].message.content
            wrong.extend([said] if said != fact["answer"] else [])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def until_free(state):
    deadline = time.monotonic() + 20
    while state.engine.figures.active or state.engine.figures.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.02)
