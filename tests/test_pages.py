"""The docs cannot drift: what they show runs, and gives what they show."""

import gc
import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import click
import pytest
from support.notebooks import NOTEBOOKS, code_of, first_of, session, shows
from support.pages import CHECKOUT, REAL, Session, agree, blocks, parse

pytestmark = pytest.mark.slow

FOUND = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in FOUND}
RUN_ELSEWHERE = {"coming-from.md"}  # the same names in four programs, a script of each: tests/test_coming_from.py
FIRST_READ = {"README.md", "quickstart.md", *(name for name in TEXTS if name.startswith("task-"))}  # in an empty folder
IMAGES = CHECKOUT / "docs" / "images"
REAL_MODEL = os.environ.get("HOOKMAP_REAL_MODEL")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # as pages name it, and as a folder that they find
PAGES = [name for name, text in TEXTS.items() if "```" in text and name not in RUN_ELSEWHERE]
REAL_PAGES = [name for name in PAGES if f"<!-- not run: {REAL} -->" in TEXTS[name]]
NEEDS = {
    "capture.md": "xarray",
    "elsewhere.md": "ray",
    "evaluation.md": "inspect_ai",
    "experiments.md": "inspect_ai",
    "images.md": "PIL",
    "interventions.md": "vl_convert",
    "lenses.md": "vl_convert",
    "probes.md": "sklearn",
    "server.md": "openai",
    "steering-vectors.md": "gguf",
    "task-probe.md": "sklearn",
    "task-serve.md": "openai",
}
# All reasons that there are, and how many blocks each holds back. One more is a decision: can it not run?
NOT_RUN = {
    "asks another machine": 7,
    "installs packages": 7,
    "takes minutes": 9,
    "another program": 1,
    "needs the real model": 29,
    "needs vLLM": 10,
}


@pytest.fixture(autouse=True)
def _the_demo_model_where_a_checkout_has_it(own_folder: None, tmp_path: Path) -> None:
    (tmp_path / "hookmap").symlink_to(CHECKOUT / "hookmap")


# inspect_ai's own calls of what its dependencies have deprecated; the clients that pages leave open.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs_and_prints_what_it_shows(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if name in FIRST_READ:
        (tmp_path / "hookmap").unlink()
    Session(name, TEXTS[name]).run()
    gc.collect()  # what is left open is closed here, and no other test hears of it


@pytest.mark.real
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("name", REAL_PAGES)
def test_the_real_model_prints_what_a_page_shows_of_it(name: str, tmp_path: Path) -> None:
    """`make real-docs`. With HOOKMAP_DRAW the pictures that came out take the places of those in docs/images."""
    if REAL_MODEL is None or not Path(REAL_MODEL).is_dir():
        pytest.skip("no folder of the real model here: run `make real-docs`")
    (tmp_path / HUB_ID).parent.mkdir()
    (tmp_path / HUB_ID).symlink_to(REAL_MODEL)
    for file in Path(REAL_MODEL).glob("gguf/*.gguf"):
        (tmp_path / file.name).symlink_to(file)
    Session(name, TEXTS[name], real=True).run()
    drawn = {"real-" + "-".join(file.relative_to(tmp_path).parts): file for file in tmp_path.rglob("*.png")}
    shown = set(re.findall(r"images/(real-[\w-]+\.png)\)", TEXTS[name]))
    assert shown <= drawn.keys(), "a page shows what its blocks draw: images/real-lens.png is its lens.png"
    for picture in shown if os.environ.get("HOOKMAP_DRAW") else ():
        Image = pytest.importorskip("PIL.Image")
        Image.open(drawn[picture]).convert("RGB").quantize(256).save(IMAGES / picture, optimize=True)
    gc.collect()


def test_the_pictures_of_the_real_model_are_small() -> None:
    found = sorted(IMAGES.glob("real-*"))
    assert found and [file.name for file in found if file.stat().st_size > 60_000] == []
    used = set(re.findall(r"images/(real-[\w.-]+)\)", "".join(TEXTS.values())))
    assert {file.name for file in found} == used


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_prints_what_it_shows(name: str) -> None:
    pytest.importorskip("vl_convert")
    assert all(cell["outputs"] for cell in code_of(name) if shows(cell)), "python scripts/run_notebooks.py"
    session(name).run()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_begins_with_a_cell_that_sets_colab_up(name: str, tmp_path: Path) -> None:
    """Where hookmap is installed it starts nothing; elsewhere one pip. The badge comes with the repository."""
    source = "".join(code_of(name)[0]["source"])
    extras = re.findall(r"hookmap\[[a-z,]+\]", source)
    assert len(extras) == 1
    pip = tmp_path / "python"
    pip.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    pip.chmod(0o755)
    for isolated, told in ([], False), (["-I", "-S"], True):
        code = f"import sys; sys.executable = {str(pip)!r}\n{source}"
        subprocess.run(
            [sys.executable, *isolated, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}
        )
        assert (tmp_path / "told").exists() == told
    assert (tmp_path / "told").read_text() == f"-m pip install -q {extras[0]}\n"
    run_notebooks = runpy.run_path(str(CHECKOUT / "scripts" / "run_notebooks.py"))
    first = first_of(name)
    assert first.startswith("".join(run_notebooks["badge"](name)) or "# ")


def test_the_badge_opens_the_notebook_of_the_projects_repository() -> None:
    badge = runpy.run_path(str(CHECKOUT / "scripts" / "run_notebooks.py"))["badge"]
    (line,) = badge("a.ipynb", '[project.urls]\nRepository = "https://github.com/them/hookmap/"')
    assert line.endswith("(https://colab.research.google.com/github/them/hookmap/blob/main/docs/notebooks/a.ipynb)\n")
    assert badge("a.ipynb", "[project]") == badge("a.ipynb", '[project.urls]\nRepository = "https://else.org/x"') == []


def test_what_does_not_run_is_counted() -> None:
    assert Counter(block.not_run for name in PAGES for block in blocks(TEXTS[name]) if block.not_run) == NOT_RUN


# The comparison begins with what others do better.
@pytest.mark.parametrize("name", [name for name in (*PAGES, *RUN_ELSEWHERE) if name != "comparison.md"])
def test_a_page_shows_an_example_within_a_screenful(name: str) -> None:
    before, fence, _ = TEXTS[name].partition("```")
    assert fence and before.count("\n") < 10 and len(before) < 700


@pytest.mark.parametrize("name", PAGES)
def test_commands_stand_in_fences_where_they_run(name: str) -> None:
    outside = re.sub("^```.*?^```$", "", TEXTS[name], flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"^    (?:\$ |hookmap |python |make ).*", outside, flags=re.MULTILINE) == []


@pytest.mark.parametrize("name", TEXTS)
def test_commands_within_a_sentence_are_understood(name: str) -> None:
    for command in re.findall(r"`(hookmap [a-z][^`|]*)`", TEXTS[name]):
        parse(command)


def test_a_page_is_one_session() -> None:
    page = """
```json title="in/a.json"
[1.5]
```

```python
from pathlib import Path

numbers = [float(Path("in/a.json").read_text().strip("[]\\n"))]
```

```python
print(numbers, "in 3.2 s")
numbers[1]
```

```text
[1.5] in 0.1 s
IndexError: …
```

```sh
export NUMBER=7  # for what follows
```

```console
$ echo $NUMBER \\
    and 8; echo 9
7 and 8
9
$ hookmap config sow
…
Error: No such command 'sow'. …
```

<!-- not run: there is no such model -->
```sh
hookmap capture nobody/nothing --points resid_mid
```
"""
    Session("a page", page).run()


NOT_A_PAGE: dict[str, tuple[str, type[Exception]]] = {
    "python prints something else": ("```python\nprint(1)\n```\n\n```text\n2\n```\n", AssertionError),
    "python fails": ("```python\n1 / 0\n```\n", ZeroDivisionError),
    "text behind no python": ("```text\nof nothing\n```\n", AssertionError),
    "a command prints something else": ("```console\n$ echo 1\n2\n```\n", AssertionError),
    "a command fails": ("```sh\nhookmap sow\n```\n", AssertionError),
    "a fence without a language": ("```\nhookmap discover\n```\n", AssertionError),
    "a fence of another form": ("```python {odd}\nprint(1)\n```\n", AssertionError),
    "a file without a name": ("```yaml\nof: no file\n```\n", AssertionError),
    "a mark above no block": ("<!-- not run: why -->\n\nNo block.\n", AssertionError),
    "no such option": ("<!-- not run: why -->\n```sh\nhookmap capture --pints z\n```\n", click.NoSuchOption),
}


@pytest.mark.parametrize("what", NOT_A_PAGE)
def test_what_a_page_may_not_show(what: str) -> None:
    page, error = NOT_A_PAGE[what]
    with pytest.raises(error):
        Session("a page", page).run()


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("took 1.5 s, 3.1 MB", "took 12.75 s, 401.1 MB", True),
        ("0.967", "0.968", True),
        ("0.967", "0.969", False),
        ("1.0e-05", "2.0e-05", True),
        ("mlp_out[16]  +7.758", "mlp_out[16] +7.758  ", True),
        ("mlp_out[16] +7.758", "mlp_out[17] +7.758", False),
        ("38 tokens", "39 tokens", False),
        ("first\n…\nlast", "first\nsecond\nthird\nlast", True),
        ("first\n…\nlast", "first\nsecond", False),
    ],
)
def test_what_counts_as_shown(shown: str, printed: str, same: bool) -> None:
    assert agree(shown, printed) is same
