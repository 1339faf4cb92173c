"""Tool calls in a model's text: `<tool_call>{"name": …, "arguments": …}</tool_call>`, as Hermes and Qwen write them.

Imports nothing of the web server: the evaluations read calls with it, too.
"""

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from hookmap.services.server.text import beginning_at_end

_OPEN = "<tool_call>"
_WHOLE = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_WHOLE_OR_LAST = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class WrittenCall:
    """One call as the model wrote it."""

    name: str
    arguments: dict[str, Any] | str
    """an object, or text that should be its JSON"""
    problem: str | None = None
    """why it is no call; its name and arguments are empty then"""


def split_calls(text: str, cut_off: bool = False) -> tuple[str, tuple[WrittenCall, ...]]:
    """The text outside of calls, and the calls. `cut_off`: also a last call without its closing tag."""
    pattern = _WHOLE_OR_LAST if cut_off else _WHOLE
    return pattern.sub("", text), tuple(_read(body) for body in pattern.findall(text))


def _read(body: str) -> WrittenCall:
    try:
        found = json.loads(body)
        name, arguments = found["name"], found.get("arguments", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return WrittenCall("", {}, str(error))
    if not isinstance(name, str) or not isinstance(arguments, dict | str):
        return WrittenCall("", {}, "expected a name and an object of arguments")
    return WrittenCall(name, arguments)


@dataclass(frozen=True)
class Call:
    """A call of an answer, as OpenAI sends it."""

    id: str
    name: str
    arguments: str
    """JSON"""


class ToolText:
    """Sends an answer's text up to its first call, and reads the calls when the answer has ended.

    Where one of the calls cannot be read, all of them stay text.
    """

    def __init__(self, reads_calls: bool) -> None:
        self._reads = reads_calls
        self._held = ""

    def add(self, text: str) -> str:
        """The text that is certainly no call."""
        if not self._reads:
            return text
        self._held += text
        place = self._held.find(_OPEN)
        keep = len(self._held) - place if place >= 0 else beginning_at_end(self._held, _OPEN)
        sent, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return sent

    def end(self) -> tuple[str, tuple[Call, ...]]:
        """The rest of the text, and the calls."""
        _, found = split_calls(self._held, cut_off=True)
        if not found or any(call.problem for call in found):
            return self._held, ()
        return "", tuple(_as_sent(call) for call in found)


def _as_sent(call: WrittenCall) -> Call:
    arguments = call.arguments
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call(f"call_{secrets.token_hex(12)}", call.name, written)


def template_of(tokenizer: Any) -> str:
    """The text of the chat template that is given the tools."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("tool_use", template.get("default"))
    return template or ""


def reads_calls(tokenizer: Any) -> bool:
    """Whether this model's chat template writes calls in the form that is read here."""
    return _OPEN in template_of(tokenizer)
