"""Tools: what the chat template is given, and the calls in an answer, where the template's way of writing is known.

Known is the one of Hermes and Qwen: `<tool_call>{"name": …, "arguments": …}</tool_call>`. Elsewhere, and where a call
is not JSON, the text stays text.
"""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hookmap.services.server.errors import bad
from hookmap.services.server.text import beginning_at_end

_OPEN = "<tool_call>"
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A call that the model asks for."""

    id: str
    name: str
    arguments: str
    """JSON"""


class ToolText:
    """Lets an answer's text through up to its first call, and reads the calls when it has ended."""

    def __init__(self, reads_calls: bool) -> None:
        self._reads = reads_calls
        self._held = ""

    def add(self, text: str) -> str:
        """The text that is no call for certain."""
        if not self._reads:
            return text
        self._held += text
        place = self._held.find(_OPEN)
        keep = len(self._held) - place if place >= 0 else beginning_at_end(self._held, _OPEN)
        sent, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return sent

    def end(self) -> tuple[str, tuple[Call, ...]]:
        """The rest of the text, and the calls."""
        if calls := _calls(self._held):
            return "", calls
        return self._held, ()


def _calls(text: str) -> tuple[Call, ...]:
    """All calls of a text that begins with one; none where one of them is not understood."""
    found = []
    for body in _CALL.findall(text):
        try:
            call = json.loads(body)
            arguments = call.get("arguments", {})
            name = call["name"]
        except (ValueError, KeyError, AttributeError, RecursionError):
            return ()
        if not isinstance(name, str) or not isinstance(arguments, dict | str):
            return ()
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        found.append(Call(f"call_{secrets.token_hex(12)}", name, written))
    return tuple(found)


def template_of(tokenizer: Any) -> str:
    """The text of the chat template that tools are given to."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("tool_use", template.get("default"))
    return template or ""


def check_template(tools: Sequence[Any], tokenizer: Any) -> None:
    """Raises ApiError where the template takes no tools: they would be dropped without a word."""
    if tools and "tools" not in template_of(tokenizer):
        raise bad("tools: this model's chat template takes none.", "tools")


def reads_calls(tokenizer: Any) -> bool:
    """Whether calls in this model's answers are understood."""
    return _OPEN in template_of(tokenizer)


def with_arguments(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls of an earlier answer as templates read them: arguments as an object, not as its JSON."""
    found = []
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad("messages: expected tool_calls with function.name and function.arguments.", "messages")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise bad("messages: function.arguments of a tool call is not JSON.", "messages") from None
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found
