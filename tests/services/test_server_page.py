"""The page at /, in a browser, by keyboard: it shows what the server says, asks nobody else, and has no complaints."""

import json
import re
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.browser import browsing, chromium
from support.served import MESSAGES, NAME, QUESTION, Served, demo, serving

pytest.importorskip("playwright", reason="the page is tested in a browser: pip install playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="the page is tested in Chromium, and there is none"),
]
TOKENS = 8
"""of an answer, unless a test needs it whole"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as found:
        yield found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    vectors = tmp_path_factory.mktemp("vectors")
    demo().steering_vector(["Tom is happy."], ["Tom is sad."], "resid_post", [8, 12]).save(
        vectors / "happy.safetensors"
    )
    (vectors / "other.safetensors").write_bytes(b"no vector")
    with serving(tmp_path_factory.mktemp("sessions"), vectors=vectors) as found:
        yield found


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose complaints, and what it asks for, fail the test at its end."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    found, asked, wrong = context.new_page(), [], []
    context.on("request", lambda request: asked.append(request.url))
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    found.set_default_timeout(120_000)
    yield found
    own = re.match(r"http://[^/]+/", found.url)
    context.close()
    assert own and [url for url in asked if not url.startswith((own[0], "data:", f"blob:{own[0]}"))] == []
    assert [text for text in wrong if "responded with a status of 40" not in text] == [], "refusals are shown, no fault"


def opened(page: Any, served: Served, tokens: int = TOKENS) -> None:
    page.goto(served.url)
    page.wait_for_selector("#tree button")
    page.fill("#tokens", str(tokens))


def told(page: Any) -> str:
    """What the page says is wrong, once it does."""
    page.wait_for_selector("#error:not(:empty)")
    return str(page.text_content("#error"))


def ask(page: Any, question: str = QUESTION) -> None:
    """By keyboard, and wait for the end."""
    page.focus("#text")
    page.keyboard.type(question)
    page.keyboard.press("Enter")
    page.wait_for_selector("#map tbody")
    done(page)


def done(page: Any) -> None:
    page.wait_for_selector("#send:enabled")
    page.wait_for_selector("#map[aria-busy=false] tbody")


def cells(page: Any) -> list[list[str]]:
    """The map: rows of texts, without their heads, the first layer first."""
    found = page.evaluate(
        "[...document.querySelectorAll('#map tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    return [row[1:] for row in reversed(found)]


def heads(page: Any) -> list[str]:
    return list(page.evaluate("[...document.querySelectorAll('#map thead th')].slice(1).map(c => c.textContent)"))


def seen(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "↵")


def numbered(text: str, word: str) -> int:
    """The number behind a word."""
    found = re.search(rf"{word} (\d+)", text)
    assert found is not None, text
    return int(found[1])


def choose_token(page: Any, number: int, box: str = "#talk .assistant") -> None:
    """By keyboard: the token of this number in an answer, the first one 1."""
    page.focus(box)
    for _ in range(number):
        page.keyboard.press("ArrowRight")


EVERY_CHANGE = """() => {
    window.pictures = [];
    const places = "section, #scroll, #legend, #text, #which";
    const look = () => {
        const tops = [...document.querySelectorAll(places)].map(
            each => [each.id, each.getBoundingClientRect().top, each.offsetHeight].join(" "));
        const columns = document.querySelectorAll("#map thead th").length - 1;
        const comes = document.querySelector("#map").ariaBusy === "true";
        const text = document.querySelector("#talk .assistant")?.textContent ?? "";
        pictures.push({columns, comes, text, tops, y: scrollY});
    };
    new MutationObserver(look).observe(document.body, {childList: true, subtree: true});
}"""
"""notes the columns of the map, the answer, and where everything stands, after each change of the page"""


def slowly(seconds: float) -> Any:
    """Each forward pass takes so long, so that a stream can be looked at while it comes."""
    return demo().model.register_forward_pre_hook(lambda *_: time.sleep(seconds))


def test_the_map_is_of_prompt_and_answer_and_fills_in_while_nothing_moves(page: Any, served: Served) -> None:
    run = demo().capture([MESSAGES], ["resid_post"], max_new_tokens=12)
    (sample,) = run.samples
    opened(page, served, 12)
    assert page.input_value("#model") == NAME
    hook = slowly(0.05)
    try:
        page.evaluate(EVERY_CHANGE)
        ask(page)
        pictures = page.evaluate("pictures")
    finally:
        hook.remove()
    between = {each["columns"] for each in pictures if sample.prompt_tokens <= each["columns"] < sample.rows}
    assert len(between) >= 4, f"of {sample.rows} columns these numbers were seen: {sorted(between)}"
    lengths = [len(each["text"]) for each in pictures]
    assert lengths == sorted(lengths)
    streamed = [each for each in pictures if each["comes"]]
    assert [each["y"] for each in streamed] == [0] * len(streamed), "the page scrolled"
    moved = {place for each in streamed for place in set(each["tops"]) ^ set(streamed[-1]["tops"])}
    assert moved == set(), "something moved"
    assert page.text_content("#talk .assistant") == run.texts[0]
    assert heads(page) == [seen(demo().tokenizer.decode([token])) for token in sample.token_ids[:-1]]
    shown = cells(page)
    assert len(shown) == served.hm.map.num_layers
    for layer, row in enumerate(shown):
        norms = run.read(0, "resid_post", layer).norm(dim=1).tolist()
        assert [float(text.replace(",", "")) for text in row] == pytest.approx(norms, rel=6e-3), (
            "three digits are shown"
        )


def test_the_legend_says_in_words_and_numbers_what_is_seen_and_every_layer_can_be(page: Any, served: Served) -> None:
    opened(page, served)
    ask(page)
    values = [float(text.replace(",", "")) for row in cells(page) for text in row]
    assert [float(page.text_content(end)) for end in ("#low", "#high")] == [min(values), max(values)]
    assert "Length of the row of resid_post" in page.text_content("#meaning")
    for number, text in ((1000, "1,000"), (12345.6, "12,300"), (999.97, "1,000"), (0.01234, "0.0123")):
        assert page.evaluate("n => import('./parts.js').then(parts => parts.number(n))", number) == text
    page.focus("#scroll")
    page.keyboard.press("ArrowUp")
    for layer in (19, 0):
        for _ in range(20):
            page.keyboard.press("ArrowUp" if layer else "ArrowDown")
        assert page.text_content("#cell").startswith(f"Layer {layer}, resid_post")
        box, around = page.locator("#map td.at").bounding_box(), page.locator("#scroll").bounding_box()
        assert around["y"] <= box["y"] and box["y"] + box["height"] <= around["y"] + around["height"]


def test_another_point_and_the_lens_are_chosen_by_keyboard_for_the_same_answer(page: Any, served: Served) -> None:
    opened(page, served)
    ask(page)
    text, first = page.text_content("#talk .assistant"), cells(page)
    page.focus("#scroll")
    page.keyboard.press("ArrowRight")
    assert "resid_post" in page.text_content("#cell")
    page.focus("#tree button[value=mlp_out]")
    page.keyboard.press("Enter")
    assert "resid_post" not in page.text_content("#cell"), "what it said was of a cell that is gone"
    done(page)
    assert page.input_value("#point") == "mlp_out"
    assert page.get_attribute("#tree button[value=mlp_out]", "aria-pressed") == "true"
    assert (page.text_content("#talk .assistant"), cells(page) != first) == (text, True)

    page.focus("#of")
    page.keyboard.press("ArrowDown")
    page.focus("#point")
    page.keyboard.type("resid_post")
    done(page)
    run = served.hm.capture([MESSAGES], ["resid_post"], max_new_tokens=TOKENS)
    assert cells(page) == [[seen(w) for w in row] for row in served.hm.lens(run).words]

    page.focus("#scroll")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    position = run.samples[0].prompt_tokens
    assert page.text_content("#cell").startswith(f"Layer 18, resid_post, token {position} "), page.text_content("#cell")
    page.click("#new")
    assert (page.text_content("#cell"), page.inner_text("#map"), page.inner_text("#tops")) == ("", "", "")


def test_a_token_shows_the_lens_of_each_layer_and_the_rank_of_a_followed_one(page: Any, served: Served) -> None:
    opened(page, served)
    ask(page)
    choose_token(page, 3)
    page.wait_for_selector("#tops tbody")
    run, model = served.hm.capture([MESSAGES], ["resid_post"], max_new_tokens=TOKENS), served.hm.model
    (sample,) = run.samples
    position = sample.prompt_tokens + 2
    assert f"Token {position} " in page.text_content("#which")
    with torch.no_grad():
        rows = [run.read(0, "resid_post", layer)[position] for layer in range(20)]
        shares = torch.stack([model.lm_head(model.model.norm(row)).float().softmax(-1) for row in rows])

    def table() -> tuple[list[list[str]], list[int]]:
        rows = page.evaluate(
            "[...document.querySelectorAll('#tops tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
        )
        found = [[cell.split("\n")[0] for cell in row] for row in reversed(rows)]
        return [row[1:6] for row in found], [int(row[6].replace(",", "")) for row in found]

    def ranks(token: int) -> list[int]:
        return ((shares > shares[:, token, None]).sum(-1) + 1).tolist()

    words, shown = table()
    assert words == [[seen(served.hm.tokenizer.decode([id])) for id in row] for row in shares.topk(5).indices.tolist()]
    assert shown == ranks(sample.token_ids[position + 1])
    assert page.get_attribute("#ranks svg", "aria-label").endswith("; ".join(map(str, shown)))

    other = int(shares[0].argmax())
    page.locator("#tops tbody tr:last-child button").first.click()
    page.wait_for_function("id => document.querySelector('#follow').value === id", arg=str(other))
    assert table()[1] == ranks(other)


def test_a_head_is_shown_where_it_looks_from_a_token(page: Any, served: Served) -> None:
    opened(page, served)
    ask(page)
    page.focus("#lens-tab")
    page.keyboard.press("ArrowRight")
    page.select_option("#attention-layer", "7")
    page.locator("#talk .user .token").nth(4).click()
    page.wait_for_selector("#weights span")
    page.select_option("#attention-head", "2")
    run = served.hm.capture([MESSAGES], ["pattern"], [7], max_new_tokens=0)
    ids = run.samples[0].token_ids
    position = numbered(page.text_content("#which"), "Token")
    assert served.hm.tokenizer.decode(ids[position : position + 4]) == QUESTION[4:8], "the token that was clicked"
    weights = run.read(0, "pattern", 7)[position][2][: position + 1]
    titles = page.evaluate("[...document.querySelectorAll('#weights span')].map(s => s.title)")
    assert len(titles) == position + 1
    for title, weight in zip(titles, weights.tolist(), strict=True):
        shown = title.rsplit(": ", 1)[1]
        assert shown == "< 0.1 %" or float(shown.split()[0]) == pytest.approx(100 * weight, rel=0.06)
    best = page.evaluate("[...document.querySelectorAll('#most li')].map(l => l.innerText)")
    assert [numbered(text, "token") for text in best] == weights.topk(5).indices.tolist()


def test_changes_by_form_give_a_second_answer_beside_the_plain_one(page: Any, served: Served) -> None:
    opened(page, served)
    ask(page)
    page.click("#changing summary")
    assert page.locator("#vector option").all_inner_texts() == ["happy"]
    page.fill("#strength", "6")
    page.select_option("#change-layer", "12")
    page.click("#add")
    page.wait_for_selector("#changes li")
    page.select_option("#kind", "ablate")
    page.select_option("#change-layer", "3")
    page.select_option("#change-head", "1")
    page.click("#add")
    page.select_option("#kind", "clamp")
    page.fill("#feature", "5")
    page.fill("#value", "2.5")
    page.click("#add")
    page.wait_for_selector("#changes li:nth-child(3)")
    page.click("#changes li:nth-child(3) button")
    page.click("#again")
    page.wait_for_selector("article:nth-child(2)")
    done(page)
    vector = json.loads(served.get("/v1/vectors/happy?layer=12").text)["vector"]
    changes = [
        {"do": "steer", "point": "resid_post", "layers": [12], "vector": vector, "strength": 6},
        {"do": "ablate", "point": "z", "layers": [3], "heads": [1]},
    ]
    run = served.hm.capture([MESSAGES], ["resid_post"], max_new_tokens=TOKENS, interventions=changes)
    plain = served.hm.capture([MESSAGES], ["resid_post"], max_new_tokens=TOKENS)
    texts = page.locator("#talk .assistant").all_text_contents()
    assert texts == [plain.texts[0], run.texts[0]] and len(set(texts)) == 2
    for number, of in ((2, run), (1, plain)):
        page.click(f"article:nth-child({number}) .head")
        norms = of.read(0, "resid_post", 15).norm(dim=1).tolist()
        assert [float(text) for text in cells(page)[15]] == pytest.approx(norms, rel=6e-3)
    page.click("article:nth-child(2) .head")
    page.select_option("#point", "resid_mid")  # read once more, with the changes
    done(page)
    other = served.hm.capture([MESSAGES], ["resid_mid"], max_new_tokens=TOKENS, interventions=changes)
    assert [float(text) for text in cells(page)[15]] == pytest.approx(
        other.read(0, "resid_mid", 15).norm(dim=1).tolist(), rel=6e-3
    )


def test_a_clamp_by_form_is_answered_as_a_plain_hook_would_have_it(page: Any, served: Served) -> None:
    opened(page, served)
    ask(page)
    page.click("#changing summary")
    page.select_option("#kind", "clamp")
    assert [page.is_visible(f) for f in ("#feature", "#value", "#vector", "#change-head")] == [True, True, False, False]
    assert page.input_value("#clamp-point") == "mlp_post"
    page.select_option("#change-layer", "12")
    page.fill("#feature", "5")
    page.fill("#value", "60")
    page.press("#value", "Enter")
    page.wait_for_selector("#changes li:has-text('feature 5 of mlp_post clamped to 60.0 (layer 12)')")
    page.click("#again")
    page.wait_for_selector("article:nth-child(2)")
    done(page)

    def clamp(_: Any, args: Any) -> Any:
        rows = args[0].clone()
        rows[..., 5] = 60.0
        return (rows,)

    def greedy() -> tuple[str, list[float]]:
        """The answer, and the lengths of the rows that leave block 15."""
        ids = served.hm.tokenizer.apply_chat_template(
            MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        rows: list[torch.Tensor] = []
        block = served.hm.model.model.layers[15]
        with block.register_forward_hook(lambda _, args, out: rows.append(out)):
            out = served.hm.model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        norms = torch.cat(rows, 1)[0].float().norm(dim=-1).tolist()
        new = out[0, ids["input_ids"].shape[1] :]
        return served.hm.tokenizer.decode(new, skip_special_tokens=True), norms

    plain = greedy()
    with served.hm.model.model.layers[12].mlp.down_proj.register_forward_pre_hook(clamp):
        changed = greedy()
    assert page.locator("#talk .assistant").all_text_contents() == [plain[0], changed[0]] and plain[0] != changed[0]
    assert [float(text.replace(",", "")) for text in cells(page)[15]] == pytest.approx(changed[1], rel=6e-3)

    page.fill("#feature", "100000")  # more than there are: told in words, and the chat goes on
    page.press("#value", "Enter")
    page.click("#again")
    assert "100000" in told(page)


def test_what_is_kept_is_chosen_and_found_again_downloaded_and_deleted(
    page: Any, served: Served, tmp_path: Path
) -> None:
    for each in served.sessions.all():
        served.sessions.delete(each.id)
    for number in range(11):
        served.chat(messages=[{"role": "user", "content": f"older {number}"}], max_tokens=1, store_activations=True)
    opened(page, served, 2)
    page.click("#keeping summary")
    page.uncheck("#points input[value=resid_post]")
    for point in ("mlp_out", "z"):
        page.check(f"#points input[value={point}]")
    page.fill("#layers", "2, 5-6")
    page.fill("#label", "first <b>try</b>")
    ask(page)
    page.wait_for_function("document.querySelector('#sessions li b')?.textContent.startsWith('Tom')")
    session = served.sessions.all()[-1]
    row = page.inner_text("#sessions li:first-child")
    for text in (QUESTION, "first <b>try</b>", "mlp_out", "z", f"{session.bytes / 1000:.1f} kB", session.id):
        assert text in row, row
    kept = served.get(f"/v1/activations/sessions/{session.id}").json()["tensors"]
    assert {(each["point"], each["layer"]) for each in kept} == {(p, n) for p in ("mlp_out", "z") for n in (2, 5, 6)}

    assert page.text_content("#which-sessions") == "1 to 10 of 12, newest first"
    page.click("#older")
    assert page.locator("#sessions li b").all_inner_texts() == ["older 1", "older 0"]
    page.fill("#search", "<B>TRY")
    assert page.locator("#sessions li").count() == 1

    with page.expect_download() as download:
        page.click("#sessions button:text('Download')")
    download.value.save_as(tmp_path / "session.zip")
    with zipfile.ZipFile(tmp_path / "session.zip") as archive:
        archive.extractall(tmp_path)
    import hookmap

    store = hookmap.open_store(tmp_path / session.id)
    whole = served.hm.capture([MESSAGES], {"mlp_out": [2]}, max_new_tokens=2)
    assert torch.equal(store.read(0, "mlp_out", 2), whole.read(0, "mlp_out", 2))

    for key, left in (("Escape", 12), ("Enter", 12), ("Tab Enter", 11)):
        page.focus("#sessions button.danger")
        page.keyboard.press("Enter")
        page.wait_for_selector("#sure[open]")
        assert session.id in page.text_content("#what")
        for each in key.split():
            page.keyboard.press(each)
        page.wait_for_selector("#sure", state="hidden")
        if left == 11:
            page.wait_for_selector("#sessions li", state="detached")
        assert len(served.sessions.all()) == left, f"after {key}"
    assert page.text_content("#which-sessions") == "none is found"
    assert page.evaluate("document.activeElement.id") == "sessions-name", "the focus is not lost"


def test_what_is_refused_is_shown_in_words_and_can_be_sent_again(page: Any, served: Served) -> None:
    opened(page, served, 5000)
    page.fill("#text", QUESTION)
    answer = served.chat(max_tokens=5000)
    page.press("#text", "Enter")
    assert told(page) == answer.json()["error"]["message"]
    assert (page.input_value("#text"), page.locator("#talk .user").count()) == (QUESTION, 0)
    page.fill("#tokens", "2")
    page.click("#keeping summary")
    page.fill("#layers", "2-")
    page.press("#text", "Enter")
    assert "expected all, or numbers and ranges" in told(page)


def test_stop_ends_the_answer_and_the_run_and_leaves_no_session(page: Any, served: Served) -> None:
    opened(page, served, 40)
    before = {each.id for each in served.sessions.all()}
    hook = slowly(0.5)
    try:
        page.fill("#text", QUESTION)
        page.press("#text", "Enter")
        page.wait_for_selector("#talk .assistant .token:nth-child(3)")
        page.focus("#stop")
        page.keyboard.press("Enter")
        page.wait_for_selector("#send:enabled")
        served.idle()
    finally:
        hook.remove()
    whole = served.chat(max_tokens=40).json()["choices"][0]["message"]["content"]
    shown = page.text_content("#talk .assistant")
    assert shown and whole.startswith(shown) and shown != whole
    assert page.text_content("#error") == "" and page.is_disabled("#stop")
    listed = set(page.locator("#sessions code").all_inner_texts())
    assert listed <= before, "no session that is about to go"
    for _ in range(600):
        if (left := {each.id for each in served.sessions.all()}) == before:
            break
        time.sleep(0.1)
    assert left == before
    choose_token(page, 2)
    page.wait_for_selector("#tops tbody")


def test_the_first_visit_to_a_server_with_a_key_is_a_form(page: Any, tmp_path: Path) -> None:
    with serving(tmp_path, key="k1") as served:
        page.goto(served.url)
        page.wait_for_selector("#entry", state="visible")
        assert page.text_content("#error") == "" and page.is_hidden("#bench")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("k2")
        page.keyboard.press("Enter")
        assert "not the server’s key" in told(page)
        page.fill("#key", "k1")
        page.press("#key", "Enter")
        page.wait_for_selector("#tree button")
        assert page.is_hidden("#entry") and page.text_content("#error") == ""
        page.fill("#tokens", "2")
        ask(page)
        assert heads(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_everything_fits_the_screen_has_a_name_and_can_be_read(
    page: Any, served: Served, width: int, scheme: Any
) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    opened(page, served, 2)
    ask(page)
    choose_token(page, 1)
    page.wait_for_selector("#tops tbody")
    for summary in ("#changing summary", "#keeping summary"):
        page.click(summary)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.wait_for_selector("#sessions button.danger")
    box = page.locator("#sessions button.danger").first.bounding_box()
    assert box["x"] + box["width"] <= width, "a session can be deleted without scrolling aside"
    tree = page.evaluate(
        "(t => [t.scrollHeight > t.clientHeight, getComputedStyle(t).overflow])(document.querySelector('#tree'))"
    )
    assert tree == [True, "auto"]
    lines = page.text_content("#tree").rstrip().split("\n")
    assert lines[0].endswith("d_vocab 259") and lines[-1].endswith("model.output['logits']"), "nothing is cut"
    names = page.evaluate(
        "[...document.querySelectorAll('button, input:not([hidden]), select, textarea, [tabindex=\"0\"], svg')].filter("
        "e => e.checkVisibility() && !(e.ariaLabel || e.labels?.length || e.textContent.trim() || "
        "e.getAttribute('aria-labelledby'))).map(e => e.outerHTML.slice(0, 90))"
    )
    assert names == [], "no name for a screen reader"
    contrast = page.evaluate(CONTRAST)
    assert {name: ratio for name, ratio in contrast.items() if ratio < 4.5} == {}, "too faint to read"


CONTRAST = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const linear = colour => {
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(each => {
            const v = each / 255;
            return v <= .04 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        });
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const behind = e => {
        for (; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if (colour !== "rgba(0, 0, 0, 0)") return colour;
        }
        return "Canvas";
    };
    const names = ["h2", "#cell", "#meaning", "#map td", "#map thead .at", ".token.at", ".hint", "#tops small",
                   "button.danger", "#send", "#tree", "#tree button"], found = {};
    for (const name of names) {
        for (const each of [...document.querySelectorAll(name)].slice(0, 400)) {
            const both = [linear(getComputedStyle(each).color), linear(behind(each))].sort((a, b) => b - a);
            found[name] = Math.min(found[name] ?? 99, (both[0] + .05) / (both[1] + .05));
        }
    }
    return found;
}"""
"""the least contrast of text in each part, as WCAG counts it"""


def test_text_of_a_model_or_a_person_is_text(page: Any, served: Served) -> None:
    opened(page, served, 2)
    ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
    assert page.locator("#talk img, #talk b, #map img, #map b").count() == 0
    assert "<b>bold</b>" in page.text_content("#talk .user")
