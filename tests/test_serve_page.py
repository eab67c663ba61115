"""The page in a real browser: a fact is added, found in other words, forgotten, and not found any more."""

import re
import shutil

import pytest

pytest.importorskip("playwright", reason="pip install playwright")
pytest.importorskip("uvicorn", reason="pip install -e .[serve]")
pytest.importorskip("httpx", reason="pip install -e .[test]")

import served
from playwright import sync_api

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
expect = sync_api.expect
SLOW = 120_000  # milliseconds in which a first fact is compiled for and tuned
QUESTION, ANSWER = "Where is the spare key of the Lindgren house?", "Under the third flower pot"
IN_OTHER_WORDS = "Where do I find the spare key of the Lindgren house?"
KEY = "a-key-of-this-test"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = served.make_memory(tmp_path_factory.mktemp("page") / "memory")
    with served.serving(directory, LAMINI_API_KEY=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    """The page, to which the key has been given; nothing that it does may be an error to the browser."""
    context = browser.new_context(viewport={"width": 1000, "height": 800})
    page, bad = context.new_page(), []
    page.on("console", lambda message: bad.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: bad.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(server.url) else bad.append(request.url))
    page.goto(server.url)
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_have_count(0)
    yield page
    context.close()
    assert [text for text in bad if "401" not in text] == []  # Chromium tells of the answer that the key is missing


def ask(page, question):
    page.get_by_label("Question", exact=True).first.fill(question)
    page.keyboard.press("Enter")
    expect(page.locator("#ask-status")).to_have_text(re.compile("^With memory: "), timeout=SLOW)


def text_of(page, which):
    return page.locator(f"#{which}-answer .text").inner_text()


def test_a_fact_is_added_found_in_other_words_and_forgotten(page):
    """By the keyboard alone."""
    page.get_by_role("button", name="Add facts").focus()
    page.keyboard.press("Enter")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Tab")
    page.keyboard.type(ANSWER)
    page.keyboard.press("Enter")
    expect(page.locator("#facts-status")).to_have_text("The fact holds.", timeout=SLOW)
    row = page.get_by_role("listitem").filter(has_text=QUESTION)
    expect(row).to_contain_text("certified")

    ask(page, IN_OTHER_WORDS)
    assert text_of(page, "memory") == ANSWER != text_of(page, "base")
    expect(page.locator("#memory-answer .source")).to_have_text(re.compile(rf"certified.*{re.escape(QUESTION)}.*score"))
    expect(page.locator("svg.plot .fires .label")).to_have_text(QUESTION)
    expect(page.locator("#plot-summary")).to_contain_text("reaches")

    page.get_by_role("button", name=f"Forget: {QUESTION}").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Keep")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#facts-status")).to_have_text(re.compile("Forgotten|Nothing is stored"), timeout=SLOW)
    expect(row).to_have_count(0)
    expect(page.locator("#facts")).to_be_focused()

    ask(page, IN_OTHER_WORDS)
    assert text_of(page, "memory") == text_of(page, "base") != ANSWER
    expect(page.locator("#memory-answer .source")).to_contain_text("the model speaks alone")


def test_many_facts_are_added_searched_and_changed(page):
    page.get_by_role("button", name="Add facts").click()
    page.get_by_text("Many facts at once").click()
    lines = [f'{{"question": "What is in drawer {i}?", "answer": "{i * 37}"}}' for i in range(3)]
    page.get_by_label("One on each line:").fill("\n".join(lines))
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.locator("#facts-status")).to_have_text("All 3 facts hold.", timeout=SLOW)
    page.get_by_label("Search the facts").fill("drawer 2")
    expect(page.locator("#list > li")).to_have_count(1)
    page.get_by_role("button", name="Change: ").click()
    page.get_by_label("Answer, word for word").last.fill("A ball of string")
    page.keyboard.press("Enter")
    expect(page.locator("#facts-status")).to_have_text("The change holds.", timeout=SLOW)
    expect(page.get_by_role("button", name="Change: ")).to_be_focused()
    page.get_by_role("button", name="Details: ").click()
    expect(page.locator("#list .more li").last).to_contain_text("certified")
    ask(page, "What is in drawer 2?")
    assert text_of(page, "memory") == "A ball of string"

    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.locator("#facts-status")).to_have_text("Write a question and its answer.")


def test_what_facts_say_is_text_and_nothing_else(page):
    question, answer = 'Who wrote <img src="x" onerror="alert(1)"> there?', "<b>Ida</b>"
    page.get_by_role("button", name="Add facts").click()
    page.get_by_label("Question", exact=True).last.fill(question)
    page.get_by_label("Answer, word for word").fill(answer)
    page.keyboard.press("Enter")
    expect(page.locator("#facts-status")).to_have_text("The fact holds.", timeout=SLOW)
    ask(page, question)
    assert text_of(page, "memory") == answer
    expect(page.locator("main img, main b")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phones_and_the_dark(page, scheme):
    """Nothing is wider than a phone; text stands out against its background; every control has a name."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 700})
    ask(page, "Where does the ferry to Marstrand stop?")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    colors = page.evaluate("[getComputedStyle(document.documentElement)].map((s) => [s.color, s.backgroundColor])[0]")
    ink, paper = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors)
    assert (ink < 150 and paper > 650) if scheme == "light" else (ink > 650 and paper < 150)
    for control in page.get_by_role("textbox").all() + page.get_by_role("button").all():
        described = control.aria_snapshot()
        assert re.search(r'"[^"]+"', described), described
