"""What a capture takes besides its prompts: each option once, with its type, default and meaning.

`Hooked.capture` and its siblings, and the models on Ray, take these by name. `hookmap.yaml`, the command line and the
server's `hookmap` field have the same names; `tests/capture/test_options.py` holds them to it. Imports no torch.
"""

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from os import PathLike
from typing import Annotated, Any, Literal, TypedDict, TypeVar, get_type_hints

from hookmap.loading.chat_template import Chat

BATCH_SIZE = 8
BATCH_TOKENS = 4096

Points = str | Iterable[str] | Mapping[str, Any]
"""names, or layers of its own for each: {"resid_post": [3, 8], "z": "all"}"""
Layers = str | int | Iterable[int]
Calls = str | int | Iterable[int]
Positions = str | slice | Sequence[int]
EngineName = Literal["auto", "hooks", "nnsight", "vllm"]


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    samples_done: int
    samples: int
    tokens_done: int
    """generated so far in the current batch, for each prompt"""
    tokens: int
    """generated at most for each prompt"""


@dataclass(frozen=True)
class Option:
    """The default of an option, and what it means."""

    default: Any
    meaning: str
    """on every face: Python, hookmap.yaml, the server"""
    detail: str = ""
    """what Python's help says besides"""

    def __str__(self) -> str:
        return f"{self.meaning}: {self.detail}" if self.detail else self.meaning


class RowOptions(TypedDict, total=False):
    """Which rows of each tensor are stored, and how. `hookmap.capture.rows.row_selection` reads them."""

    positions: Annotated[
        Positions,
        Option(
            "all",
            'tokens whose rows are stored: "all", "prompt", "generated", "last", "last_prompt", a span "4:20", '
            'positions (negative ones count from the end of the prompt), "image" (tokens that stand for an image), '
            '"text" (the others), or "text=…": tokens whose text contains it, or of the prompt that it lies in',
        ),
    ]
    every: Annotated[int, Option(1, "only positions that are multiples of it")]
    mean: Annotated[bool, Option(False, "one row for each sample: the mean over its positions")]
    features: Annotated[
        int | Iterable[int] | None,
        Option(None, "indices into the last axis of each row, or how many of them to draw; all unless given"),
    ]
    features_seed: Annotated[int, Option(0, "seed of the draw of features")]
    keep_dtype: Annotated[Any, Option(None, "dtype of the stored rows; the model's own unless given")]
    overflow: Annotated[
        str,
        Option(
            "warn",
            "what to do where a finite number is infinite in keep_dtype",
            '"warn" stores the infinity, warns, and counts it in the manifest; "refuse" raises CaptureError and stores '
            "nothing of that batch",
        ),
    ]


class TemplateOptions(TypedDict, total=False):
    """How prompts go through the chat template. `hookmap.loading.chat_template.Templating` reads them."""

    chat: Annotated[
        Chat,
        Option(
            "auto",
            '"auto" sends messages through the chat template and reads strings as they are; True makes each string a '
            "user's message; False refuses messages",
        ),
    ]
    add_generation_prompt: Annotated[
        bool | None,
        Option(
            None,
            "whether the assistant's turn begins after the messages; unless given, it does where the last message is "
            "not the assistant's",
        ),
    ]
    continue_final_message: Annotated[
        bool | None,
        Option(
            None,
            "whether the last message is left open, so that generation continues it; unless given, that of an "
            "assistant is, where text is generated",
        ),
    ]
    chat_template_kwargs: Annotated[
        Mapping[str, Any] | None, Option(None, "variables of the chat template, such as {'enable_thinking': False}")
    ]


class BatchOptions(TypedDict, total=False):
    """How many prompts run together."""

    batch_size: Annotated[
        int | None,
        Option(None, f"prompts that run together, padded; {BATCH_SIZE} unless given, where text is generated"),
    ]
    batch_tokens: Annotated[
        int, Option(BATCH_TOKENS, "tokens that run together where nothing is generated, pads included")
    ]


class VectorOptions(TemplateOptions, BatchOptions, total=False):
    """What decides how two lists of prompts are read."""


class MeasureOptions(TemplateOptions, BatchOptions, total=False):
    """What decides how prompts are read by one forward pass each."""

    prompt_column: Annotated[str | None, Option(None, "column of a table or data set that holds the prompt")]


class EstimateOptions(RowOptions, MeasureOptions, total=False):
    """What decides how large a capture is."""

    calls: Annotated[
        Calls,
        Option(
            "all",
            'which runs of layers that run several times in one forward pass: "all", "last", or numbers, 0-based, '
            "negative from the end",
            "each is stored under its number",
        ),
    ]


class WriteOptions(TypedDict, total=False):
    """What is written while the model runs."""

    interventions: Annotated[
        Any,
        Option(
            (),
            "what is written while the model runs: interventions, documents of them, or a file; the stored rows are "
            "those after the write",
        ),
    ]


class GradientOptions(EstimateOptions, WriteOptions, total=False):
    """What gradients take besides prompts, a metric, points and layers."""


class GenerationOptions(TypedDict, total=False):
    """Fields of transformers' GenerationConfig that are set often. Every other field is taken too."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    min_new_tokens: int
    num_return_sequences: int
    eos_token_id: int | list[int] | None
    use_cache: bool


class RunOptions(EstimateOptions, GenerationOptions, WriteOptions, total=False):
    """What decides how a capture runs."""

    do_sample: Annotated[bool, Option(False, "sample the tokens; greedy unless asked")]
    seed: Annotated[int | None, Option(None, "makes sampling repeatable", "torch's own generators stay as they were")]
    stop: Annotated[str | Sequence[str], Option((), "strings that end a sample")]
    engine: Annotated[
        EngineName,
        Option(
            "auto",
            '"hooks" (PyTorch\'s own, the fastest), "nnsight", or "auto": hooks, unless the model was given as an '
            "nnsight model",
        ),
    ]
    dictionaries: Annotated[
        Any,
        Option(
            (),
            "sparse autoencoders or transcoders whose features are stored, sparse, as the point features of the layer "
            'that each reads; points="features" stores nothing else',
        ),
    ]
    before: Annotated[
        bool,
        Option(
            False,
            "store the rows right before the interventions too, as `.before` of the result; with store=, also in its "
            "folder `before`, a capture of its own",
        ),
    ]
    progress: Annotated[Callable[[Progress], None] | None, Option(None, "called after each step")]


class CaptureOptions(RunOptions, total=False):
    """All that `Hooked.capture` takes besides prompts, points, layers and max_new_tokens."""

    store: Annotated[
        str | PathLike[str] | None,
        Option(None, "folder that the rows are streamed to, with constant memory; None holds them in memory"),
    ]
    resume: Annotated[
        bool, Option(False, "continue the interrupted capture in that folder; finished samples do not run again")
    ]


@cache
def options_of(kind: type) -> dict[str, tuple[Any, Option]]:
    """Type and option by name, for a class above. Fields of GenerationConfig have no Option and are left out."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: (hint.__origin__, hint.__metadata__[0]) for name, hint in hints.items() if hasattr(hint, "__metadata__")
    }


def field_of(name: str, **constraints: Any) -> Any:
    """A field of a pydantic model with the default and the meaning of an option of `CaptureOptions`."""
    from pydantic import Field

    option = options_of(CaptureOptions)[name][1]
    return Field(default=option.default, description=option.meaning, **constraints)


def with_defaults(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of `kind`: as given, else its default. Raises TypeError for another name."""
    options = options_of(kind)
    if unknown := ", ".join(given.keys() - options):
        raise TypeError(f"unexpected keyword arguments: {unknown}; expected some of {', '.join(options)}")
    return {name: given.get(name, option.default) for name, (_, option) in options.items()}


def of_kind(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `given` that are options of `kind`."""
    return {name: value for name, value in given.items() if name in options_of(kind)}


Function = TypeVar("Function", bound=Callable[..., Any])


def as_of(other: Callable[..., Any]) -> Callable[[Function], Function]:
    """Show another function's parameters in the signature of one that hands all of its own on to it."""

    def documented(function: Function) -> Function:
        function.__signature__ = inspect.signature(other)  # type: ignore[attr-defined]
        return function

    return documented


def takes(kind: type, of: Callable[..., Any] | None = None) -> Callable[[Function], Function]:
    """Show the options of `kind`, which a function takes as **options, in its signature and its docstring.

    `of`: a function that gets all of them, and whose own keywords are shown in the signature, too.
    """

    def documented(function: Function) -> Function:
        shown = inspect.signature(function)
        own = [each for each in shown.parameters.values() if each.kind is not each.VAR_KEYWORD]
        keywords = () if of is None else inspect.signature(of).parameters.values()
        own += [each for each in keywords if each.kind is each.KEYWORD_ONLY]
        named = {each.name for each in own}
        options = {name: each for name, each in options_of(kind).items() if name not in named}
        parameters = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=hint)
            for name, (hint, option) in options.items()
        ]
        meanings = {name: str(option) for name, (_, option) in options.items()}
        if kind.__annotations__.keys() >= GenerationOptions.__annotations__.keys():
            parameters.append(inspect.Parameter("generation", inspect.Parameter.VAR_KEYWORD, annotation=Any))
            meanings["generation"] = "any field of transformers' GenerationConfig, such as temperature"
        lines = [textwrap.fill(f"{name}: {text}.", 110, subsequent_indent="  ") for name, text in meanings.items()]
        function.__signature__ = shown.replace(parameters=[*own, *parameters])  # type: ignore[attr-defined]
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", *lines])
        return function

    return documented
