"""The page at /, in a browser, by keyboard: it shows what the server says, asks nobody else, and has no complaints."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import browsing, chromium
from support.served import MESSAGES, NAME, QUESTION, Served, demo, serving

pytest.importorskip("playwright", reason="the page is tested in a browser: pip install playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="the page is tested in Chromium, and there is none"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as found:
        yield found


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose complaints, and what it asks for, fail the test at its end."""
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    found, asked, wrong = context.new_page(), [], []
    context.on("request", lambda request: asked.append(request.url))
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    found.set_default_timeout(20_000)
    yield found
    own = re.match(r"http://[^/]+/", found.url)
    context.close()
    assert own and [url for url in asked if not url.startswith((own[0], "data:"))] == []
    assert [text for text in wrong if "responded with a status of 40" not in text] == [], "refusals are shown, no fault"


def opened(page: Any, served: Served) -> None:
    page.goto(served.url)
    page.wait_for_selector("#tree button")


def told(page: Any) -> str:
    """What the page says is wrong, once it does."""
    page.wait_for_selector("#error:not(:empty)")
    return str(page.text_content("#error"))


def ask(page: Any) -> None:
    """By keyboard, and wait for the end."""
    page.focus("#text")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    done(page)


def done(page: Any) -> None:
    page.wait_for_selector("#map[aria-busy=false]")


def cells(page: Any) -> list[list[str]]:
    """The heat map: rows of texts, without their heads, the first layer first."""
    found = page.evaluate(
        "[...document.querySelectorAll('#map tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    return [row[1:] for row in reversed(found)]


def heads(page: Any) -> list[str]:
    return list(page.evaluate("[...document.querySelectorAll('#map thead th')].slice(1).map(c => c.title)"))


EVERY_FRAME = """() => {
    window.pictures = [];
    const look = () => {
        const answer = document.querySelector("#talk .assistant")?.textContent ?? "";
        pictures.push([Math.max(0, document.querySelectorAll("#map thead th").length - 1), answer.length]);
        requestAnimationFrame(look);
    };
    look();
}"""
"""notes tokens in the heat map and characters in the answer, in each picture that a person is shown"""


def slowly(seconds: float) -> Any:
    """Each forward pass takes so long, so that a stream can be looked at while it comes."""
    return demo().model.register_forward_pre_hook(lambda *_: time.sleep(seconds))


def test_the_heat_map_fills_in_while_the_answer_comes_and_is_of_captures_rows(page: Any, tmp_path: Path) -> None:
    run = demo().capture([MESSAGES], ["resid_post"], max_new_tokens=128)
    (sample,) = run.samples
    new = sample.token_ids[sample.prompt_tokens :]
    with serving(tmp_path) as served:
        opened(page, served)
        assert page.input_value("#model") == NAME
        hook = slowly(0.02)
        try:
            page.evaluate(EVERY_FRAME)
            ask(page)
            counts = page.evaluate("pictures")
        finally:
            hook.remove()
        between = {count for count, _ in counts if 0 < count < len(new)}
        assert len(between) >= 5, f"of {len(new)} tokens these numbers were seen: {sorted(between)}"
        assert [text for _, text in counts] == sorted(text for _, text in counts)
        assert page.text_content("#talk .assistant") == run.texts[0]
        assert heads(page) == [served.hm.tokenizer.decode([token]) for token in new]
        shown = cells(page)
        assert len(shown) == served.hm.map.num_layers
        for layer, row in enumerate(shown):
            norms = run.read(0, "resid_post", layer)[sample.prompt_tokens - 1 :].norm(dim=1).tolist()
            assert [float(text) for text in row] == pytest.approx(norms, rel=6e-3), "three digits are shown"


def test_another_point_and_the_lens_are_chosen_by_keyboard_for_the_same_answer(page: Any, tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        opened(page, served)
        ask(page)
        text, first = page.text_content("#talk .assistant"), cells(page)
        page.focus("#tree button[value=mlp_out]")
        page.keyboard.press("Enter")
        done(page)
        assert page.input_value("#point") == "mlp_out"
        assert page.get_attribute("#tree button[value=mlp_out]", "aria-pressed") == "true"
        assert (page.text_content("#talk .assistant"), cells(page) != first) == (text, True)

        page.focus("#of")
        page.keyboard.press("ArrowDown")
        page.focus("#point")
        page.keyboard.type("resid_post")
        done(page)
        run = served.hm.capture([MESSAGES], ["resid_post"], max_new_tokens=128)
        start = run.samples[0].prompt_tokens - 1
        words = [row[start:] for row in served.hm.lens(run).words]
        assert cells(page) == [[w.replace(" ", "␣").replace("\n", "↵") for w in row] for row in words]

        page.focus("#scroll")
        for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
            page.keyboard.press(key)
        status = page.text_content("#cell")
        assert status.startswith("resid_post, layer 18") and f"row {start + 1}" in status, status


def test_sessions_are_listed_and_deleted_by_keyboard_after_a_question(page: Any, tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        opened(page, served)
        ask(page)
        page.wait_for_selector("#sessions tbody button")
        (session,) = served.sessions.all()
        row = page.inner_text("#sessions tbody tr")
        assert session.id in row and f"{session.bytes / 1000:.1f} kB" in row
        for key, left in (("Escape", 1), ("Enter", 1), ("Tab Enter", 0)):
            page.focus("#sessions tbody button")
            page.keyboard.press("Enter")
            page.wait_for_selector("#sure[open]")
            assert session.id in page.text_content("#what")
            for each in key.split():
                page.keyboard.press(each)
            page.wait_for_selector("#sure", state="hidden")
            if not left:
                page.wait_for_selector("#sessions tbody button", state="detached")
            assert len(served.sessions.all()) == left, f"after {key}"
        assert page.text_content("#total") == "none"
        assert page.evaluate("document.activeElement.id") == "sessions-name", "the focus is not lost"


def test_what_the_server_refuses_is_shown_in_its_words_and_can_be_sent_again(page: Any, tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        opened(page, served)
        page.fill("#tokens", "5000")
        page.fill("#text", QUESTION)
        answer = served.chat(max_tokens=5000)
        page.press("#text", "Enter")
        assert told(page) == answer.json()["error"]["message"]
        assert (page.input_value("#text"), page.inner_text("#talk")) == (QUESTION, "")


def test_stop_ends_the_answer_and_the_run(page: Any, tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        opened(page, served)
        hook = slowly(0.02)
        try:
            page.fill("#text", QUESTION)
            page.press("#text", "Enter")
            page.wait_for_selector("#map thead th:nth-child(5)")
            page.focus("#stop")
            page.keyboard.press("Enter")
            served.idle()
        finally:
            hook.remove()
        whole = served.chat(max_tokens=128).json()["choices"][0]["message"]["content"]
        shown = page.text_content("#talk .assistant")
        assert shown and whole.startswith(shown) and shown != whole
        assert page.text_content("#error") == "" and page.is_hidden("#stop")


def test_a_server_with_a_key_is_used_with_it(page: Any, tmp_path: Path) -> None:
    with serving(tmp_path, key="k1") as served:
        page.goto(served.url)
        assert "a wrong key or none" in told(page)
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("k2")
        page.keyboard.press("Enter")
        page.wait_for_load_state("networkidle")
        assert page.inner_text("#tree") == ""
        page.fill("#key", "k1")
        page.press("#key", "Enter")
        page.wait_for_selector("#tree button")
        assert page.is_hidden("#entry") and page.text_content("#error") == ""
        ask(page)
        assert heads(page)


@pytest.mark.parametrize("width", [390, 1300])
def test_nothing_is_wider_than_the_screen(page: Any, tmp_path: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    with serving(tmp_path) as served:
        opened(page, served)
        ask(page)
        page.wait_for_selector("#sessions tbody button")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.locator("#sessions tbody button").bounding_box()
        assert box["x"] + box["width"] <= width, "a session can be deleted without scrolling aside"
