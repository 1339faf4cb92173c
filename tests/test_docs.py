"""The docs cannot drift: what they show runs, and what there is, they name."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

import hookmap
from hookmap import errors
from hookmap.cli.configuration import fields
from hookmap.cli.main import main
from hookmap.cli.settings import load_settings
from hookmap.demo import MODEL_PATH

CHECKOUT = Path(__file__).resolve().parent.parent
PAGES = sorted([CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def names(page: str) -> str:
    return (CHECKOUT / "docs" / page).read_text(encoding="utf-8")


def run(code: str, folder: Path, cwd: Path = CHECKOUT) -> str:
    """What a script prints that holds this code."""
    script = folder / "page.py"
    script.write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, script], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_the_python_of_the_first_pages_runs_from_the_checkout(name: str, tmp_path: Path) -> None:
    run("\n".join(blocks(CHECKOUT / name, "python")), tmp_path)


def test_the_python_of_the_lens_page_gives_what_the_page_says(tmp_path: Path) -> None:
    printed = run("\n".join(blocks(CHECKOUT / "docs" / "lenses.md", "python")), tmp_path, cwd=tmp_path)
    assert "['1', '1', 'f', '7', '7']" in printed and "mlp_out[16]" in printed
    assert (tmp_path / "lens.png").exists() and (tmp_path / "attention.html").exists()


def test_the_python_of_the_steering_page_prints_what_the_page_shows(tmp_path: Path) -> None:
    page = CHECKOUT / "docs" / "steering-vectors.md"
    assert run("\n".join(blocks(page, "python")), tmp_path, cwd=tmp_path) == blocks(page, "text")[0]
    assert (tmp_path / "loses.safetensors").exists()


def test_the_python_of_the_probe_page_runs_around_the_command_that_it_shows(tmp_path: Path) -> None:
    """With fewer problems and the layer that finds it: the page's own run takes a minute."""
    pytest.importorskip("sklearn", reason='pip install "hookmap[eval]"')
    before, after = blocks(CHECKOUT / "docs" / "probes.md", "python")
    command = "['probe', 'sums', '--label', 'odd', '-o', 'probes', '--layers', '12,16', '--method', 'ridge']"
    code = before.replace("hookmap/demo/model", str(MODEL_PATH)).replace("600", "120")
    code += f"\nfrom hookmap.cli.main import main\nmain({command}, standalone_mode=False)\n{after}"
    assert run(code, tmp_path, cwd=tmp_path) == "probes\n"
    report = json.loads((tmp_path / "probes" / "report.json").read_text(encoding="utf-8"))
    assert report["best"]["layer"] == 16 and report["chosen"]["auroc"] > 0.8


@pytest.mark.parametrize("name", ["evaluation.md", "probes.md", "experiments.md"])
def test_the_commands_of_the_evaluation_pages_are_understood(name: str) -> None:
    """Parsed, not run: what they do is tested elsewhere."""
    lines = re.findall(r"^(?:\$ |    )hookmap ([^#\n&]+)", names(name), flags=re.MULTILINE)
    assert lines
    for line in lines:
        words, command = line.split(), main
        context = click.Context(main)
        while isinstance(command, click.Group):
            found = command.get_command(context, words[0])
            assert found is not None, line
            command, words = found, words[1:]
        command.make_context(line, words)


def test_the_experiment_page_shows_the_bundled_example() -> None:
    (shown,) = blocks(CHECKOUT / "docs" / "experiments.md", "yaml")
    assert shown == (CHECKOUT / "hookmap" / "demo" / "emotions.yaml").read_text(encoding="utf-8")


def test_the_notebook_runs_from_top_to_bottom_and_shows_what_it_prints(tmp_path: Path) -> None:
    cells = json.loads((CHECKOUT / "docs" / "notebooks" / "lenses.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    printed = run("\n".join("".join(cell["source"]) for cell in code), tmp_path, cwd=tmp_path)
    shown = [part for cell in code for out in cell["outputs"] if out.get("name") == "stdout" for part in out["text"]]
    assert printed == "".join(shown) and "9-4=5" in printed
    assert all(cell["outputs"] for cell in code)


def test_the_pictures_of_the_lens_page_are_of_todays_numbers() -> None:
    sys.path.insert(0, str(CHECKOUT / "scripts"))
    try:
        import draw_lenses
    finally:
        sys.path.pop(0)
    for name, chart in draw_lenses.charts().items():
        drawn = (CHECKOUT / "docs" / "images" / name).read_text(encoding="utf-8")
        words = re.findall(r">([^<>]+)</text>", drawn)
        fresh = re.findall(r">([^<>]+)</text>", svg(chart))
        assert words == fresh, "draw them again: python scripts/draw_lenses.py"


def svg(chart: Any) -> str:
    import vl_convert

    return str(vl_convert.vegalite_to_svg(chart.to_dict()))


def test_the_command_page_names_every_command() -> None:
    page = names("cli.md")
    for command in main.list_commands(click.Context(main)):
        assert f"`hookmap {command} " in page


def test_the_settings_file_of_the_docs_is_accepted_and_shows_every_key(tmp_path: Path) -> None:
    (example,) = blocks(CHECKOUT / "docs" / "cli.md", "yaml")
    (tmp_path / "hookmap.yaml").write_text(example, encoding="utf-8")
    assert set(load_settings(tmp_path)) == set(fields())


def errors_of_the_tree() -> list[str]:
    return [
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    ]


def test_the_error_page_names_every_error() -> None:
    page = names("errors.md")
    assert [name for name in errors_of_the_tree() if f"`{name}`" not in page and f"hookmap.{name}`" not in page] == []


def test_every_example_of_the_error_page_raises_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all but DeployError, which asks a network."""
    page = names("errors.md").replace("hookmap/demo/model", str(MODEL_PATH))
    (begin,) = re.findall(r"^```python\n(from .*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^## `(\w+)`\n\n```python\n(.*?)```\n\n```text\n(.*?)\n```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names_of_page: dict[str, Any] = {}
    exec(begin, names_of_page)  # noqa: S102 - the page's own code
    for name, code, message in found:
        with pytest.raises(errors.HookmapError) as raised:
            exec(code, names_of_page)  # noqa: S102
        assert (type(raised.value).__name__, str(raised.value)) == (name, message)
    assert len(found) == len(set(errors_of_the_tree()) - {"HookmapError", "DeployError"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_site_builds_offline_and_strictly_and_asks_no_other_machine(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason='pip install "hookmap[docs]"')
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    built = {file: file.read_text(encoding="utf-8") for file in tmp_path.rglob("*.html")}
    elsewhere = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=\"?https?:[^ >]*")
    assert [found for text in built.values() for found in elsewhere.findall(text)] == []
    commands = built[tmp_path / "reference" / "commands.html"]
    assert [name for name in main.list_commands(click.Context(main)) if f"hookmap {name}" not in commands] == []
    python = built[tmp_path / "reference" / "python.html"]
    assert [name for name in hookmap.__all__ if name != "__version__" and f'id="hookmap.{name}"' not in python] == []


def test_the_python_reference_has_every_module_that_the_docs_import_from() -> None:
    sys.path.insert(0, str(CHECKOUT / "scripts"))
    try:
        import docs_pages
    finally:
        sys.path.pop(0)
    code = "\n".join(block for page in PAGES for block in blocks(page, "python"))
    named = set(re.findall(r"^ *from hookmap\.(\S+) import", code, flags=re.MULTILINE))
    assert named - {name for names in docs_pages.MODULES.values() for name in names} == set()
