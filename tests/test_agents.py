"""AGENTS.md and llms.txt: what they tell a coding agent to type runs, and what they name is there."""

import re
import subprocess
from pathlib import Path

import pytest
from support.pages import CHECKOUT, Session, blocks, parse

import hookmap
from hookmap import light
from hookmap.model import HookedModel

AGENTS, LLMS = ((CHECKOUT / name).read_text(encoding="utf-8") for name in ("AGENTS.md", "llms.txt"))


@pytest.mark.slow
def test_every_block_for_agents_runs_and_prints_what_it_shows(own_folder: None, tmp_path: Path) -> None:
    (tmp_path / "hookmap").symlink_to(CHECKOUT / "hookmap")
    Session("AGENTS.md", AGENTS).run()


def test_make_knows_every_target_that_is_named() -> None:
    targets = re.findall(r"^make (\S+)$", "\n".join(block.text for block in blocks(AGENTS)), re.MULTILINE)
    assert targets
    for target in targets:
        done = subprocess.run(["make", "--dry-run", target], cwd=CHECKOUT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", [AGENTS, LLMS], ids=["AGENTS.md", "llms.txt"])
def test_commands_within_a_sentence_are_understood(text: str) -> None:
    found = re.findall(r"`(hookmap [a-z][^`|]*)`", text)
    assert found
    for command in found:
        parse(command)


@pytest.mark.parametrize("text", [AGENTS, LLMS], ids=["AGENTS.md", "llms.txt"])
def test_every_page_that_is_named_is_there(text: str) -> None:
    named = set(re.findall(r"\b(?:docs/[\w-]+\.md|tests/\w+\.py|[A-Z]+\.md)\b", text))
    assert len(named) > 3
    assert [name for name in sorted(named) if not (CHECKOUT / name).exists()] == []


def test_every_method_that_is_named_is_there() -> None:
    for owner, names in ((HookedModel, r"hm\.(\w+)\("), (hookmap, r"hookmap\.(\w+)\(")):
        called = set(re.findall(names, AGENTS + LLMS))
        assert called
        assert [name for name in sorted(called) if not hasattr(owner, name)] == []


def test_llms_txt_has_the_form_of_its_convention() -> None:
    """llmstxt.org: a title, a quoted summary, then sections of links."""
    lines = LLMS.splitlines()
    assert lines[0] == "# hookmap" and lines[2].startswith("> ")
    for section in re.split(r"^## .*$", LLMS, flags=re.MULTILINE)[1:]:
        assert all(re.fullmatch(r"- \[[^]]+\]\([^)]+\)(?:: .+)?", line) for line in section.split("\n") if line.strip())


def test_every_point_that_agents_are_told_is_one() -> None:
    (told,) = re.findall(r"^## The points\n\n(.*?)TransformerLens", AGENTS, re.MULTILINE | re.DOTALL)
    names = re.findall(r"`(\w+)`", told)
    m = light.load_map("Qwen3ForCausalLM")
    assert len(names) > 15 and set(names) <= set(m.points)
