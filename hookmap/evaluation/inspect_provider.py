"""The model provider `hookmap/MODEL` for inspect_ai: it runs a model in this process, requests in batches.

Each batch is one generation, and its activations stream to a capture folder of its own. The metadata of a request's
output say where its activations are, under `hookmap`: {"capture": folder, "samples": [...], "tokens": [...]}, with one
sample and one count of generated tokens for each choice. Without activations `capture` is null.
"""

import asyncio
import json
import queue
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageTool,
    ContentImage,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolCall, ToolChoice, ToolInfo

from hookmap.activations import Sample
from hookmap.datasets.messages import has_images
from hookmap.errors import CaptureError, TokenizerError
from hookmap.loading.chat_template import Templating
from hookmap.loading.prompts import Prompt, templated
from hookmap.services.server.tool_calls import WrittenCall, split_calls

if TYPE_CHECKING:
    from hookmap.model import HookedModel
    from hookmap.services.ray.model import RayModel

MAX_TOKENS = 512
BATCH_SIZE = 8
METADATA = "hookmap"
_QUIET = 0.05
"""seconds without a new request after which a batch runs although it is not full"""


@dataclass(frozen=True)
class _Answer:
    """The result of a request."""

    samples: tuple[Sample, ...]
    capture: str | None
    """the batch's folder"""
    ends: tuple[int, ...]
    """the tokens that end an answer"""


@dataclass(frozen=True)
class _Request:
    prompt: Prompt
    rows: int
    """number of answers asked for"""
    settings: str
    """settings of the generation, as JSON; all requests of a batch have the same"""
    answer: "Future[_Answer]"


class HookmapAPI(ModelAPI):
    """A model in this process or, with `workers`, in that many others.

    Model arguments: points, layers, calls, keep (`positions`, `mean`, … of `HookedModel.capture`), captures (a folder),
    batch_size (in all; the config's max_connections unless given), chat_template_kwargs (enable_thinking, …), and
    hookmap.open's, or hookmap.open_on_ray's.
    A request with a seed runs by itself, all its answers together, so that they repeat to the last bit.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - inspect's own signature; the config is frozen
        points: Any = (),
        layers: Any = "all",
        calls: Any = "all",
        keep: Mapping[str, Any] | None = None,
        captures: str | None = None,
        batch_size: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **opening: Any,
    ) -> None:
        """`model_name`: a hub id, a folder, or `demo`. Loads nothing yet. Raises CaptureError."""
        super().__init__(model_name, base_url, api_key, [], config)
        if points and captures is None:
            raise CaptureError("points are kept in a folder: give captures=FOLDER.")
        self._opening, self._workers = opening, opening.get("workers", 1)
        self._template = dict(chat_template_kwargs or {})
        self._points, self._layers, self._calls, self._keep = points or (), layers, calls, dict(keep or {})
        self._batch_size = batch_size or config.max_connections or BATCH_SIZE
        self._captures = Path(captures) if captures and points else None
        self._requests: queue.Queue[_Request] = queue.Queue()

    @cached_property
    def hooked(self) -> "HookedModel | RayModel":
        """The model, opened at first use: inspect also makes providers only to look at their names.

        Raises what `hookmap.open` does, and SelectionError for the points.
        """
        from hookmap.demo import MODEL_PATH
        from hookmap.model import open
        from hookmap.services.ray.model import open_on_ray

        opener: Any = open_on_ray if "workers" in self._opening else open
        opened: HookedModel | RayModel = opener(
            MODEL_PATH if self.model_name == "demo" else self.model_name, **self._opening
        )
        if self._points:
            opened.map.selectors(self._points, self._layers, self._calls)
        threading.Thread(target=self._serve, name="hookmap-batches", daemon=True).start()
        return opened

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """See inspect_ai.model.ModelAPI."""
        prompt = self._encode(input, tools)
        ids = prompt.token_ids
        request = _Request(prompt, config.num_choices or 1, json.dumps(_settings(config), sort_keys=True), Future())
        self._requests.put(request)
        answer = await asyncio.wrap_future(request.answer)
        made = [len(sample.token_ids) - len(ids) for sample in answer.samples]
        total = sum(made)
        where = {"capture": answer.capture, "samples": [s.sample for s in answer.samples], "tokens": made}
        return ModelOutput(
            model=self.model_name,
            choices=[
                self._choice(sample.text, bool(tools), _is_cut(sample, config, answer.ends))
                for sample in answer.samples
            ],
            usage=ModelUsage(input_tokens=len(ids), output_tokens=total, total_tokens=len(ids) + total),
            metadata={METADATA: where},
        )

    def _choice(self, written: str, tools: bool, full: bool) -> ChatCompletionChoice:
        text, calls = parse_tool_calls(written) if tools else (written, [])
        message = ChatMessageAssistant(content=text, tool_calls=calls or None, model=self.model_name, source="generate")
        return ChatCompletionChoice(
            message=message, stop_reason="tool_calls" if calls else "max_tokens" if full else "stop"
        )

    def max_connections(self) -> int:
        """The size of a batch."""
        return self._batch_size

    def _encode(self, input: list[ChatMessage], tools: list[ToolInfo]) -> Prompt:
        tokenizer = self.hooked.tokenizer
        messages = [_plain(message) for message in input]
        named = {"tools": [_described(tool) for tool in tools]} if tools else {}
        how = Templating(chat_template_kwargs={**self._template, **named}, generates=True)
        if has_images(messages):
            return templated(messages, 0, tokenizer, how, getattr(self.hooked, "reader", None))
        if not getattr(tokenizer, "chat_template", None):
            text = "\n\n".join(message["content"] for message in messages) + "\n\n"
            [prompt] = self.hooked.encode(text, False)
            return prompt
        return templated(messages, 0, tokenizer, how)

    def _serve(self) -> None:
        """Run batches for ever; this is the only thread that runs the model."""
        held: list[_Request] = []
        while True:
            held = held or [self._requests.get()]
            try:
                while len(held) < self._batch_size:
                    held.append(self._requests.get(timeout=_QUIET))
            except queue.Empty:
                pass
            batch = self._batch(held)
            held = [r for r in held if not any(r is one for one in batch)]
            try:
                for request, answer in zip(batch, self._run(batch), strict=True):
                    if not request.answer.cancelled():
                        request.answer.set_result(answer)
            except BaseException as error:  # raised in the waiting requests; this thread goes on
                for request in batch:
                    if not request.answer.done():
                        request.answer.set_exception(error)

    def _batch(self, held: list[_Request]) -> list[_Request]:
        """The first request, and those with the same settings, as far as they fit; a seeded one runs alone."""
        batch, rows = [held[0]], held[0].rows
        for request in held[1:]:
            alone = json.loads(request.settings)["seed"] is not None
            if request.settings == held[0].settings and not alone and rows + request.rows <= self._batch_size:
                batch.append(request)
                rows += request.rows
        return batch

    def _run(self, batch: list[_Request]) -> list[_Answer]:
        folder = self._new_folder()
        rows = [request.prompt for request in batch for _ in range(request.rows)]
        settings = json.loads(batch[0].settings)
        together = len(rows) if settings["seed"] is not None else min(len(rows), self._batch_size)
        run = self.hooked.capture(
            rows,
            points=self._points,
            layers=self._layers,
            calls=self._calls,
            batch_size=-(-together // self._workers),
            store=folder,
            **self._keep,
            **settings,
        )
        samples = iter(run.samples)
        name = None if folder is None else folder.name
        found = run.manifest.settings["generation"].get("eos_token_id")
        ends = () if found is None else (found,) if isinstance(found, int) else tuple(found)
        return [_Answer(tuple(islice(samples, request.rows)), name, ends) for request in batch]

    def _new_folder(self) -> Path | None:
        """A folder that no batch of this run, or of a killed one, has used."""
        if self._captures is None:
            return None
        self._captures.mkdir(parents=True, exist_ok=True)
        taken = [int(path.name) for path in self._captures.iterdir() if path.name.isdecimal()]
        return self._captures / f"{max(taken, default=0) + 1:06d}"


@modelapi(name="hookmap")
def hookmap_provider() -> type[ModelAPI]:
    """Registers `hookmap/MODEL` with inspect_ai."""
    return HookmapAPI


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as Qwen and Hermes write it -> the text besides, calls.

    A call that is no such JSON comes back with the reason, which the model is told.
    """
    rest, written = split_calls(text)
    calls = [_tool_call(f"call_{number}", call) for number, call in enumerate(written)]
    return rest.strip() if calls else text, calls


def _tool_call(id: str, call: WrittenCall) -> ToolCall:
    if call.problem is None and isinstance(call.arguments, dict):
        return ToolCall(id=id, function=call.name, arguments=call.arguments)
    problem = call.problem or "the arguments are text"
    why = f'expected {{"name": …, "arguments": {{…}}}}: {problem}'
    return ToolCall(id=id, function="unknown", arguments={}, parse_error=why)


def remove_captures(folder: Path) -> None:
    """Remove the folders of batches, once their rows are copied."""
    shutil.rmtree(folder, ignore_errors=True)


def _settings(config: GenerateConfig) -> dict[str, Any]:
    """inspect's settings as arguments of `HookedModel.capture`. Without a temperature, or with 0, it is greedy."""
    drawn = {name: getattr(config, name) for name in ("temperature", "top_p", "top_k")}
    drawn = {name: value for name, value in drawn.items() if value is not None}
    if not drawn.get("temperature"):
        drawn = {}
    found = {"max_new_tokens": config.max_tokens or MAX_TOKENS, "do_sample": bool(drawn), **drawn}
    found["seed"] = config.seed if drawn else None
    return found | {"stop": list(config.stop_seqs or ())}


def _is_cut(sample: Sample, config: GenerateConfig, ends: tuple[int, ...]) -> bool:
    """Whether an answer stopped at the limit of tokens, not at its end."""
    made = sample.token_ids[sample.prompt_tokens :]
    ended = made[-1] in ends or any(stop in sample.text for stop in config.stop_seqs or ())
    return len(made) >= (config.max_tokens or MAX_TOKENS) and not ended


def _plain(message: ChatMessage) -> dict[str, Any]:
    parts = [] if isinstance(message.content, str) else message.content
    if other := [part.type for part in parts if part.type not in ("text", "reasoning", "image")]:
        raise TokenizerError(f"a message has {', '.join(other)}: hookmap reads text and images. Leave it out.")
    found: dict[str, Any] = {"role": message.role, "content": message.text}
    if any(isinstance(part, ContentImage) for part in parts):
        found["content"] = [_part(part) for part in parts if part.type != "reasoning"]
    if isinstance(message, ChatMessageAssistant) and message.tool_calls:
        found["tool_calls"] = [
            {"type": "function", "function": {"name": call.function, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if isinstance(message, ChatMessageTool) and message.error is not None:
        found["content"] = f"Error: {message.error.message}"
    return found


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, ContentImage):
        return {"type": "image", "url": part.image}
    return {"type": "text", "text": part.text}


def _described(tool: ToolInfo) -> dict[str, Any]:
    parameters = tool.parameters.model_dump(exclude_none=True)
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }
