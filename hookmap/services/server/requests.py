"""The fields of a request. An unknown field is refused: a misspelt one would silently change nothing.

OpenAI's fields that change no answer here are ignored. Those that would change it, and are not supported, are refused
where they ask for something (`refused`).
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from hookmap.capture.options import field_of
from hookmap.loading.generation import HALF
from hookmap.services.server.errors import bad

MAX_TOKENS = 16
"""of a completion, unless the request says: OpenAI's default"""

Positive = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """A body in which an unknown field is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SummaryRequest(Strict):
    """`summary` of the `hookmap` field: figures that are sent with each generated token."""

    point: str
    of: Literal["norm", "lens"] = Field("norm", description="of the row: its length, or the lens's likeliest token")
    layers: str | int | list[int] = Field("all", description="numbers, negative from the end, or `all`")
    calls: str | int | list[int] = field_of("calls")
    prompt: bool | None = Field(None, description="also of the prompt's rows, with the first token")
    top: Annotated[int, Field(ge=1, le=20)] | None = Field(None, description="lens: so many likeliest tokens")
    follow: Whole | None = Field(None, description="lens: the rank and probability of this token id")


class Recording(Strict):
    """The `hookmap` field: what is kept of the run, as `HookedModel.capture` takes it."""

    points: str | list[str] | dict[str, str | int | list[int] | None] | None = Field(
        None, description="names of points, or an object of layers by point; the server's own where left out"
    )
    layers: str | int | list[int] | None = Field(None, description="numbers, negative from the end, or `all`")
    calls: str | int | list[int] | None = Field(None, description="runs of layers that run several times, or `last`")
    positions: str | list[int] = Field("all", description="of which tokens; see docs/capture.md")
    every: Positive = field_of("every")
    mean: bool = field_of("mean")
    features: int | list[int] | None = field_of("features")
    features_seed: Whole = field_of("features_seed")
    keep_dtype: Literal["float32", "bfloat16", "float16"] | None = field_of("keep_dtype")
    overflow: Literal["warn", "refuse"] = field_of("overflow")
    interventions: list[dict[str, Any]] | None = None
    return_: Literal["store", "inline", "none"] = Field("store", alias="return", description="where rows go")
    summary: SummaryRequest | None = None
    label: Annotated[str, Field(max_length=512)] | None = Field(None, description="what the session is found by")


class StreamOptions(Strict):
    """What a stream ends with."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Sampling(Strict):
    """The fields of both routes."""

    reads: ClassVar[str] = "messages"
    """the field of the prompt"""
    model: str | None = Field(None, description="the loaded model; the first one where left out")
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1: of all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="a smaller one overflows")
    seed: int | None = Field(None, ge=-(2**62), le=2**62)
    n: Positive | None = None
    max_tokens: Whole | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    hookmap: Recording | None = Field(None, description="keep activations of this run")
    store_activations: bool | None = Field(None, description="keep the server's points and layers")
    return_token_ids: bool | None = Field(None, description="the token ids of the prompt and the answer, as in vLLM")
    metadata: dict[str, str] | None = Field(None, description="up to 16 texts, kept with the session")

    presence_penalty: float | None = Field(None, ge=-2, le=2, description="off the scores of tokens of the answer")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="the same, as often as each stands there")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, description="by token id")
    min_tokens: Whole | None = Field(None, description="before which neither the end nor stop_token_ids may come")
    ignore_eos: bool | None = Field(None, description="go on behind the model's own end")
    stop_token_ids: list[int] | None = Field(None, description="tokens that end the answer as the model's own end does")
    prompt_logprobs: int | None = Field(None, ge=0, le=20, description="of the prompt's tokens, as in vLLM")
    user: Any = None

    @property
    def token_limit(self) -> int | None:
        """The most tokens that may be generated; None: as many as fit."""
        return self.max_tokens

    @property
    def limits(self) -> str:
        """The field of that limit."""
        return "max_tokens"

    @property
    def logprob_count(self) -> int | None:
        """The number of likeliest tokens that are sent with each token; None: no logprobs."""
        return None

    @property
    def format(self) -> dict[str, Any] | None:
        """What the text must fit, as `response_format` says it."""
        return None

    @property
    def reads_prompt(self) -> bool:
        """Whether logprobs of the prompt are asked for."""
        return self.prompt_logprobs is not None

    @property
    def reads_only(self) -> bool:
        """Whether nothing is to be generated after the prompt."""
        return False

    @property
    def title(self) -> str:
        """What is asked, as a list of sessions shows it."""
        return ""

    @property
    def characters(self) -> int:
        """Of the longest prompt, before a template adds to it."""
        return 0

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def refused(self) -> None:
        """Raises ApiError for what is asked and not supported."""
        if self.prompt_logprobs is not None and self.stream:
            raise bad("prompt_logprobs come with an answer in one piece: leave stream out.", "prompt_logprobs")
        if self.store_activations is not None and self.hookmap is not None:
            keeps = self.hookmap.return_ != "none"
            if keeps != self.store_activations:
                asks = "keep rows" if keeps else "keep none"
                told = str(self.store_activations).lower()
                raise bad(
                    f"store_activations: {told}, and the hookmap field asks to {asks}: leave one of them out.",
                    "store_activations",
                )
        given = [*(self.metadata or {}).items()]
        if len(given) > 16 or any(len(key) > 64 or len(value) > 512 for key, value in given):
            raise bad("metadata: expected at most 16 names of 64 characters, each a text of up to 512.", "metadata")
        if any(HALF.search(key + value) for key, value in given):
            raise bad("metadata: half a surrogate pair is no text.", "metadata")
        if self.stream_options and not self.stream:
            raise bad("stream_options is for stream: true.", "stream_options")
        if len(self.stops) > 16:
            raise bad(f"stop: expected at most 16 texts, got {len(self.stops)}.", "stop")
        if any(not 0 < len(text) <= 1000 or HALF.search(text) for text in self.stops):
            raise bad("stop: expected texts of 1 to 1000 characters, none of them half a surrogate pair.", "stop")


class ImageURL(BaseModel):
    """Where an image is: in the request itself. `detail` is ignored: the model's processor chooses the size."""

    model_config = ConfigDict(frozen=True, strict=True)
    url: str = Field(description="data:image/png;base64,…; addresses are not fetched, and files not read")
    detail: str | None = None


class Part(BaseModel):
    """A part of a message: text, or an image."""

    model_config = ConfigDict(frozen=True, strict=True)
    type: str
    text: str | None = None
    image_url: ImageURL | None = None


class Message(BaseModel):
    """One message. What OpenAI's own answers carry besides (`refusal`, `annotations`) is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    images: Any = None
    audio: Any = None


class Function(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="for the model's chat template")
    add_generation_prompt: bool | None = Field(None, description="begin the assistant's turn; unless the last goes on")
    continue_final_message: bool | None = Field(None, description="leave the last message open, so that it goes on")
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    modalities: list[str] | None = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limits(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def format(self) -> dict[str, Any] | None:
        return self.response_format

    @property
    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def title(self) -> str:
        content = next((each.content for each in reversed(self.messages) if each.role == "user"), None) or ""
        return content if isinstance(content, str) else " ".join(part.text or "" for part in content)

    @property
    def characters(self) -> int:
        contents = [each.content or "" for each in self.messages]
        parts = [[text] if isinstance(text, str) else [part.text or "" for part in text] for text in contents]
        return sum(len(text) for part in parts for text in part)

    def refused(self) -> None:
        super().refused()
        if (self.response_format or {}).get("type", "text") != "text":
            others = ("min_tokens", "ignore_eos", "stop_token_ids", *(() if self.tool_choice == "none" else ("tools",)))
            if beside := [name for name in others if getattr(self, name)]:
                raise bad(f"response_format decides what may come: leave {', '.join(beside)} out.", "response_format")
        if self.reasoning_effort is not None:
            raise bad("reasoning_effort is not done; see chat_template_kwargs.", "reasoning_effort")
        if self.modalities not in (None, ["text"]):
            raise bad("modalities: only text.", "modalities")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad("top_logprobs needs logprobs: true.", "top_logprobs")
        if self.tool_choice not in (None, "auto", "none"):
            raise bad(
                "tool_choice: this server cannot force a call; give auto or none, or a response_format.",
                "tool_choice",
            )
        if self.tool_choice == "auto" and not self.tools:
            raise bad("tool_choice: auto needs tools.", "tool_choice")


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    reads: ClassVar[str] = "prompt"
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = Field(None, description="the prompt before the completion, with its logprobs where asked")
    suffix: str | None = None
    best_of: Positive | None = None

    @property
    def token_limit(self) -> int | None:
        return MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        return self.logprobs

    @property
    def reads_prompt(self) -> bool:
        return self.echoes_logprobs or super().reads_prompt

    @property
    def echoes_logprobs(self) -> bool:
        """Whether those of the prompt stand before those of the completion."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def reads_only(self) -> bool:
        return bool(self.echo) and self.max_tokens == 0

    @property
    def title(self) -> str:
        first = self.prompt if isinstance(self.prompt, str) or not self.prompt else self.prompt[0]
        return first if isinstance(first, str) else ""

    @property
    def characters(self) -> int:
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return max((len(text) for text in texts if isinstance(text, str)), default=0)

    def refused(self) -> None:
        super().refused()
        if self.suffix:
            raise bad("suffix is not done by this server.", "suffix")
        if self.best_of not in (None, self.n or 1):
            raise bad("best_of is not done by this server: give n.", "best_of")
