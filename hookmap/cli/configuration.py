"""Every setting that a file or the environment may give: one document, its schema, and where each value came from.

From weak to strong: the default, hookmap.yaml (in the working directory or the nearest folder above it), the variable
HOOKMAP_<KEY>, and the option that was typed. A key of a section, `queue` of `serve:`, is serve.queue and
HOOKMAP_SERVE_QUEUE.

Not pydantic-settings: it merges its sources before it validates, so an error names no source and a wrong value of the
file is hidden behind a variable, and it stops at the first variable that it cannot parse. All of that is told here.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import click
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from hookmap.capture.options import field_of
from hookmap.cli.parsing import FILE_NAME, PREFIX, parse_calls, parse_layers
from hookmap.loading.yaml_file import read_yaml
from hookmap.wording import did_you_mean

SCHEMA_ID = "urn:hookmap:schema:hookmap-1"
_PATHS = ("model", "map", "tokenizer", "prompts", "eval.data")
"""read relative to the file's folder if such a path exists; else they are taken as written, as a hub id is"""
_FOLDERS = ("serve.sessions",)
"""always read relative to the file's folder; made if they do not exist"""


def _typed(value: "int | str | list[int | str]") -> str:
    """A YAML list or a single value in the form of an option: `8,12,16`."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _typed_points(value: "int | str | list[int | str] | dict[str, int | str | list[int | str] | None]") -> str:
    """Layers by point in the form of --points: `resid_post@3,5,z@all`."""
    if not isinstance(value, dict):
        return _typed(value)
    return ",".join(f"{name}@{'all' if layers is None else _typed(layers)}" for name, layers in value.items())


def _typed_features(value: "int | str | list[int]") -> str:
    """In the form of --features: `64` is a number of features to draw, `3,` a list of one feature."""
    return f"{_typed(list(value))}," if isinstance(value, list) else str(value)


def _checked(parse: Callable[[str], object]) -> AfterValidator:
    """The text stays as it is, where the command line could parse it."""

    def check(value: str) -> str:
        try:
            parse(value)
        except click.BadParameter as error:
            raise ValueError(error.message) from error
        return value

    return AfterValidator(check)


def _several(value: object) -> object:
    """A text is split at its commas."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def _object(value: object) -> object:
    """A variable is text: read it as JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


Of = TypeVar("Of", bound="Section")
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0.001)]
Texts = Annotated[list[Text], BeforeValidator(_several, json_schema_input_type=str | list[Text])]
Listed = int | Text | Annotated[list[int | Text], Field(min_length=1)]
Names = Annotated[Listed, AfterValidator(_typed)]
Points = Annotated[Listed | Annotated[dict[Text, Listed | None], Field(min_length=1)], AfterValidator(_typed_points)]
Features = Annotated[
    Count | Text | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)], AfterValidator(_typed_features)
]
Kwargs = Annotated[dict[str, Any], BeforeValidator(_object, json_schema_input_type=dict[str, Any])]


class Section(BaseModel):
    """Each key has the name and the meaning of an option."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Serving(Section):
    """Options of `hookmap serve`, without points, layers, those that load the model, and the access keys."""

    host: Text = Field("127.0.0.1", description="where to listen; 0.0.0.0 for every address")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="0 takes a free one")
    served_model_name: Text | None = Field(None, description="what clients call the model; else its own")
    allow: Texts = Field([], description="models that may be loaded")
    allowed_host: Texts = Field([], description="names of this server besides localhost")
    function: Texts = Field([], description="functions that interventions may name, package.module:function")
    sessions: Text = Field("sessions", description="the folder of the sessions")
    vectors: Text | None = Field(None, description="a folder of steering vectors that are offered to clients")
    max_bytes: Amount = Field(20.0, description="GiB of all sessions; the oldest finished go first")
    max_age: Amount = Field(168.0, description="hours that a session stays")
    request_bytes: Amount = Field(2.0, description="GiB of activations that one request may keep")
    inline_bytes: Count = Field(16 * 2**20, description="bytes that an answer may carry itself")
    engine: Literal["hooks", "vllm"] = Field("hooks", description="what runs the model")
    eager: bool = Field(False, description="with engine vllm: compile nothing")
    vllm: Kwargs | None = Field(None, description="with engine vllm: arguments of vLLM's LLM, such as max_model_len")
    queue: Count = Field(64, description="requests that may wait for the model; more get 429")
    batch: Count = Field(16, description="rows that run together, and join while others run; 1: each alone")
    deterministic: bool = Field(False, description="each request alone: its answer depends on no other")
    batch_tokens: Count = Field(32768, description="of such a batch: rows times the longest prompt and answer")
    connections: Count = Field(1000, description="clients that may be connected; more get 503")
    max_new_tokens: Count = Field(4096, description="that a request may ask for")
    drain: Count = Field(30, description="seconds that running requests get at the end")


class Evaluating(Section):
    """Options of `hookmap eval`, without those of captures, of sampling and of loading the model."""

    data: Text | None = Field(None, description="a file, hf://NAME:SPLIT, demo; else the hub's")
    samples: Count | None = Field(None, description="the first so many; else all, of demo 100")
    skip: Annotated[int, Field(ge=0)] = Field(0, description="leave the first so many out")
    mode: Literal["no-tools", "with-tools"] = Field("no-tools", description="with-tools gives it a calculator")
    ask: Literal["gsm8k", "inspect_evals", "bare"] | None = Field(None, description="what form of answer to ask for")
    parallel: Count = Field(8, description="samples at once, which is the batch")
    max_new_tokens: Count = Field(512, description="for each answer")


class Settings(Section):
    """The keys of hookmap.yaml."""

    model_config = ConfigDict(title=FILE_NAME)

    model: Text | None = Field(None, description="a hub id or a model folder; else the bundled demo model")
    map: Text | None = Field(None, description="a map file, instead of discovering one")
    tokenizer: Text | None = Field(None, description="a folder or a hub id; else the model's own")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the weights")
    device: Text | None = Field(None, description="cpu, cuda, cuda:1, auto; else a GPU where there is one")
    config: Kwargs | None = Field(None, description="fields of the model, over those of its config.json")
    trust_remote_code: bool = Field(False, description="run the modelling code that the model brings")
    check: bool = Field(True, description="hold a map that is not proved against one forward pass")
    points: Points | None = Field(
        None, description="which tensors: a list, layers by point, or all; of serve, resid_post"
    )
    layers: Annotated[Names, _checked(parse_layers)] = Field("all", description="a list, a range such as 0-3, or all")
    calls: Annotated[Names, _checked(parse_calls)] = Field(
        "all", description="runs of layers that run several times: a list, a range, last or all"
    )
    prompts: Text | None = Field(None, description="a data set of prompts: a file, a folder, or hf://NAME:SPLIT")
    prompt_column: Text | None = Field(None, description="where the prompt is; else prompt, messages, question, …")
    id_column: Text | None = Field(None, description="the samples' own names; else id, where there is one")
    image_column: Text | None = Field(None, description="the image of each text, or a list of them")
    decoder_column: Text | None = Field(
        None, description="what an encoder-decoder's decoder begins with; else decoder_text or decoder_token_ids"
    )
    chat: bool | None = Field(None, description="send texts through the chat template; else as they are")
    add_generation_prompt: bool | None = Field(None, description="begin the assistant's turn behind messages")
    continue_final_message: bool | None = Field(None, description="leave the last message open, so that it goes on")
    chat_template_kwargs: Kwargs | None = Field(None, description="what the chat template reads: enable_thinking, …")
    max_new_tokens: Annotated[int, Field(ge=0)] = Field(64, description="for each prompt; 0 only reads")
    batch_size: Count = Field(8, description="prompts that run together")
    batch_tokens: Count = field_of("batch_tokens")
    positions: Names = Field("all", description="rows of which tokens: all, prompt, generated, last, 4:20, 0,-1, …")
    every: Count = field_of("every")
    mean: bool = field_of("mean")
    features: Features | None = Field(None, description="how many features of a row to draw, or a list of those kept")
    features_seed: int = field_of("features_seed")
    keep_dtype: Literal["float32", "bfloat16", "float16"] | None = field_of("keep_dtype")
    overflow: Literal["warn", "refuse"] = field_of("overflow")
    engine: Literal["auto", "hooks", "nnsight", "ray", "remote", "vllm"] = Field(
        "auto", description="what watches the model"
    )
    workers: Count = Field(1, description="processes, with engine ray or vllm")
    address: Text | None = Field(None, description="of a Ray cluster, or auto; of an nnsight server, or local")
    temperature: Annotated[float, Field(ge=0)] | None = Field(None, description="sample at it; else greedy, as is 0")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="the likeliest tokens of this mass")
    top_k: Annotated[int, Field(ge=0)] | None = Field(None, description="this many likeliest tokens; 0: all")
    seed: int | None = field_of("seed")
    serve: Serving = Serving.model_validate({})
    eval: Evaluating = Evaluating.model_validate({})


SECTIONS: dict[str, type[Section]] = {"serve": Serving, "eval": Evaluating}


def fields() -> dict[str, FieldInfo]:
    """The field of each key, in the document's order; keys of a section as `serve.queue`."""
    return {key: field for key, field in Settings.model_fields.items() if key not in SECTIONS} | {
        f"{name}.{key}": field for name, section in SECTIONS.items() for key, field in section.model_fields.items()
    }


@dataclass(frozen=True)
class Setting:
    """A value and where it came from."""

    value: Any
    source: str
    """the file with its path, the variable's name, or `default`"""


def find(start: Path | None = None) -> dict[str, Setting]:
    """Each setting by its key, in the document's order, defaults included.

    Raises click.UsageError with everything that is wrong in the nearest hookmap.yaml at or above `start` (the working
    directory) and in the environment, at once.
    """
    file = _nearest(start or Path.cwd())
    document = {} if file is None else _document(file)
    values, wrong_keys = _read(document)
    typed, wrong_variables = _environment(os.environ)
    problems = _under(str(file), wrong_keys) + _under("the environment", wrong_variables)
    if problems:
        raise click.UsageError("\n".join(problems))
    found = {key: Setting(field.default, "default") for key, field in fields().items()}
    if file is not None:
        found |= {key: Setting(_relative_to(file, key, value), str(file)) for key, value in values.items()}
    return found | {key: Setting(value, _variable(key)) for key, value in typed.items()}


def read_section(section: type[Of], name: str, settings: dict[str, Any], given: dict[str, Any]) -> Of:
    """The section `name`: each key as it was typed, else as the settings have it, else its default.

    `given`, the options of the command, loses the section's keys.
    """
    said = {key: settings[f"{name}.{key}"] for key in section.model_fields if f"{name}.{key}" in settings}
    typed = {key: given.pop(key) for key in section.model_fields}
    lists = {key: list(value) for key, value in typed.items() if isinstance(value, tuple)}
    chosen = {key: value for key, value in (typed | lists).items() if value not in (None, "", [])}
    return section.model_validate(said | chosen)


def schema() -> dict[str, Any]:
    """The JSON Schema of hookmap.yaml, for editors; docs/hookmap.schema.json is this, and a test holds it so."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID}
    return {**head, **Settings.model_json_schema()}


def _nearest(start: Path) -> Path | None:
    files = (folder / FILE_NAME for folder in (start, *start.parents))
    return next((file for file in files if file.is_file()), None)


def _document(file: Path) -> dict[Any, Any]:
    try:
        document = read_yaml(file)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise click.UsageError(f"{file}: expected keys and values such as `model: Qwen/Qwen3-0.6B`, found {document!r}")
    return document


def _read(document: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values that the file gives, and what is wrong with it, a line each."""
    values: dict[Any, Any] = {}
    problems = []
    for key, value in document.items():
        if key not in SECTIONS:
            values[key] = value
        elif isinstance(value, dict):
            values |= {f"{key}.{name}": inner for name, inner in value.items()}
        elif value is not None:
            problems.append(f"{key}: expected keys and values, found {value!r}")
    known = fields()
    problems += [f"unknown key {key!r}: {_near(str(key))}" for key in values if key not in known]
    read, wrong = _validated({key: value for key, value in values.items() if key in known}, Settings.model_validate)
    return read, problems + [f"{key}: expected {_expected(key)}, found {values[key]!r}" for key in wrong]


def _environment(environment: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The values that variables give, and what is wrong with them. An empty variable counts as not set."""
    given = {key: environment[name] for key in fields() if environment.get(name := _variable(key))}
    read, wrong = _validated(given, Settings.model_validate_strings)
    return read, [f"{_variable(key)}: expected {_expected(key)}, found {given[key]!r}" for key in wrong]


def _variable(key: str) -> str:
    return PREFIX + key.replace(".", "_").upper()


def _validated(values: Mapping[str, Any], read: Callable[[Any], Settings]) -> tuple[dict[str, Any], list[str]]:
    """The values of these keys, converted to the document's types; or no values, and the keys whose value is wrong."""
    document: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (document.setdefault(section, {}) if section else document)[name] = value
    try:
        found = read(document).model_dump(exclude_unset=True, exclude_none=True)
    except ValidationError as error:
        places = [each["loc"] for each in error.errors()]
        return {}, list(dict.fromkeys(f"{at[0]}.{at[1]}" if at[0] in SECTIONS else str(at[0]) for at in places))
    inner = {f"{name}.{key}": value for name in SECTIONS for key, value in found.pop(name, {}).items()}
    return found | inner, []


def _under(head: str, problems: list[str]) -> list[str]:
    return [f"{head}:", *(f"  - {problem}" for problem in problems)] if problems else []


def _near(key: str) -> str:
    return did_you_mean(key, fields(), n=2) or f"the keys are {', '.join(fields())}"


def _rules(section: type[Section], name: str) -> list[dict[str, Any]]:
    """The alternatives that the JSON Schema of a field allows."""
    rule = section.model_json_schema()["properties"][name]
    return [each for each in rule.get("anyOf", [rule]) if each.get("type") != "null"]


def _expected(key: str) -> str:
    """What the key takes, in a few words."""
    section, _, name = key.rpartition(".")
    said = _rules(SECTIONS.get(section, Settings), name)
    if not any(each["type"] == "array" for each in said):
        return " or ".join(map(_words, said))
    if key == "features":
        return "a whole number, at least 1, or a list of whole numbers, at least 0"
    if key == "points":
        return (
            "a list, layers by point such as {resid_post: [3, 5], z: 8}, or one text such as 'resid_pre,z@8' or 'all'"
        )
    if key == "layers":
        return "a list, or one text such as '8,12,16', '0-3', '-1' or 'all'"
    if key == "calls":
        return "a list, or one text such as '0,2', '0-3', 'last' or 'all'"
    return "a text or a list of texts" if section else "a list, or one text such as '8,12,16' or 'all'"


def _words(rule: Mapping[str, Any]) -> str:
    if "enum" in rule:
        return f"one of {', '.join(rule['enum'])}"
    names = {
        "object": "keys and values",
        "string": "a text",
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
    }
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    said = [f"{words} {rule[bound]:g}" for bound, words in bounds.items() if bound in rule]
    return ", ".join([names[rule["type"]], *said])


def _relative_to(file: Path, key: str, value: Any) -> Any:
    """The value, a path being relative to the file's folder."""
    is_relative = key in _FOLDERS or (key in _PATHS and (file.parent / value).exists())
    return str(file.parent / value) if is_relative else value
