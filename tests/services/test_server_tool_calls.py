"""Calls of tools are read out of an answer, whatever the pieces in which it comes; what is no call stays text."""

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.raises import raises

pytest.importorskip("fastapi")

from hookmap.services.server.chat import check_template, with_arguments
from hookmap.services.server.errors import ApiError
from hookmap.services.server.tool_calls import ToolText, reads_calls

TWO = (
    'Let me see. <tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü"}}\n</tool_call>\n'
    '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
)
HERMES = SimpleNamespace(chat_template="{% if tools %}<tool_call>{% endif %}")


def read(text: str, cuts: list[int], reads: bool = True) -> tuple[str, list[tuple[str, Any]], list[str]]:
    """What is sent as text, the calls, and the pieces sent before the end."""
    tool, places = ToolText(reads), sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    sent = [tool.add(text[a:b]) for a, b in itertools.pairwise(places)]
    rest, calls = tool.end()
    assert len({call.id for call in calls}) == len(calls)
    return "".join(sent) + rest, [(call.name, json.loads(call.arguments)) for call in calls], sent


@pytest.mark.slow
@given(st.lists(st.integers(0, 1000), max_size=20))
def test_two_calls_in_any_pieces(cuts: list[int]) -> None:
    text, calls, _ = read(TWO, cuts)
    assert text == "Let me see. "
    assert calls == [("add", {"a": 1, "b": "ü"}), ("now", {})]


@given(st.text(alphabet="<tol_ca>/{}x ", max_size=60), st.lists(st.integers(0, 100), max_size=10))
def test_text_without_a_call_is_sent_whole(text: str, cuts: list[int]) -> None:
    sent, calls, _ = read(text, cuts)
    assert (sent, calls) == (text, [])


@pytest.mark.parametrize(
    "body",
    ["no json", '{"arguments": {}}', "[]", '{"name": 3}', '{"name": "a", "arguments": [1]}', "[" * 100_000],
)
def test_a_call_that_is_not_understood_stays_text(body: str) -> None:
    text = f"a <tool_call>{body}</tool_call>"
    assert read(text, [3])[:2] == (text, [])


def test_a_call_cut_off_by_the_end_is_read_where_it_is_whole() -> None:
    assert read('<tool_call>{"name": "a", "arguments": "{}"}', [])[1] == [("a", {})]
    text = '<tool_call>{"name": "a", "argu'
    assert read(text, [])[:2] == (text, [])


def test_nothing_of_a_call_is_sent_before_it_is_known_to_be_none() -> None:
    _, _, sent = read("a <tool", [1, 2, 3, 4])
    assert "".join(sent) == "a "


def test_a_template_that_knows_no_calls_leaves_them_in_the_text() -> None:
    assert read(TWO, [5, 20], reads=False)[:2] == (TWO, [])
    assert reads_calls(HERMES) and not reads_calls(SimpleNamespace(chat_template="{{ tools }}"))
    check_template([{}], HERMES)
    with raises(ApiError, "takes none"):
        check_template([{}], SimpleNamespace(chat_template="{{ messages }}"))


def test_earlier_calls_go_to_the_template_as_objects() -> None:
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    assert with_arguments([call]) == [{"id": "1", "function": {"name": "add", "arguments": {"a": 1}}}]
    for wrong in ({"function": {"name": "a", "arguments": "{"}}, {"function": {}}, {}):
        with pytest.raises(ApiError):
            with_arguments([wrong])
