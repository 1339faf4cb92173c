"""Every setting that a file or the environment may give: one document, its schema, and where each value came from.

From weak to strong: the default, hookmap.yaml (found upwards), the variable HOOKMAP_<KEY>, and what is typed.
"""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import click
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hookmap.cli.settings import FILE_NAME, PREFIX

SCHEMA_ID = "https://hookmap.dev/schema/hookmap-1.json"
_PATHS = ("model", "map", "tokenizer", "prompts")
_SERVICE_PORT = re.compile(r"(tcp|udp|sctp)://[^/]+:\d+")
"""what Kubernetes sets HOOKMAP_PORT to in the pods beside a service named hookmap, with HOOKMAP_SERVICE_HOST"""


def _typed(value: "int | str | list[int | str]") -> str:
    """A YAML list or one value, as it would be typed: `8,12,16`."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _typed_features(value: "int | str | list[int]") -> str:
    """As --features takes them: `64` draws so many, `3,` is a list of one."""
    return f"{_typed(list(value))}," if isinstance(value, list) else str(value)


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Names = Annotated[int | Text | Annotated[list[int | Text], Field(min_length=1)], AfterValidator(_typed)]
Features = Annotated[
    Count | Text | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)], AfterValidator(_typed_features)
]


class Settings(BaseModel):
    """What hookmap.yaml may say. The keys are the names of the options, and mean what those mean."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, title=FILE_NAME)

    model: Text | None = Field(None, description="a hub id or a model folder; else the bundled demo model")
    map: Text | None = Field(None, description="a map file, instead of discovering one")
    tokenizer: Text | None = Field(None, description="a folder or a hub id; else the model's own")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the weights")
    device: Text | None = Field(None, description="cpu, cuda, cuda:1, auto; else a GPU where there is one")
    trust_remote_code: bool = Field(False, description="run the modelling code that the model brings")
    points: Names | None = Field(None, description="which tensors: a list, or all; of serve, resid_post")
    layers: Names = Field("all", description="a list, a range such as 0-3, or all")
    prompts: Text | None = Field(None, description="a data set of prompts: a file, a folder, or hf://NAME:SPLIT")
    prompt_column: Text | None = Field(None, description="where the prompt is; else prompt, messages, question, …")
    id_column: Text | None = Field(None, description="the samples' own names; else id, where there is one")
    chat: bool | None = Field(None, description="send prompts through the chat template; else where there is one")
    max_new_tokens: Annotated[int, Field(ge=0)] = Field(
        64, description="for each prompt; 0 only reads; of serve, the most that a request may ask for (4096)"
    )
    batch_size: Count = Field(8, description="prompts that run together")
    batch_tokens: Count = Field(4096, description="tokens that a harvest runs at once")
    positions: Names = Field("all", description="rows of which tokens: all, prompt, generated, last, 4:20, 0,-1, …")
    every: Count = Field(1, description="only positions that it divides")
    mean: bool = Field(False, description="one row a sample: the mean over its positions")
    features: Features | None = Field(None, description="how many features of a row to draw, or a list of those kept")
    features_seed: int = Field(0, description="draws other features")
    keep_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of the rows kept; else the model's own"
    )
    engine: Literal["auto", "hooks", "nnsight", "ray", "remote"] = Field("auto", description="what watches the model")
    workers: Count = Field(1, description="with engine ray")
    address: Text | None = Field(None, description="of a Ray cluster, or auto; of an nnsight server, or local")
    temperature: Annotated[float, Field(ge=0)] | None = Field(None, description="sample at it; else greedy, as is 0")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="the likeliest tokens of this mass")
    top_k: Count | None = Field(None, description="this many likeliest tokens")
    seed: int | None = Field(None, description="makes sampling repeatable")
    host: Text = Field("127.0.0.1", description="where serve listens; 0.0.0.0 for every address")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="of serve")


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
    found = {name: Setting(field.default, "default") for name, field in Settings.model_fields.items()}
    if file is not None:
        found |= {name: Setting(_beside(file, name, value), str(file)) for name, value in values.items()}
    return found | {name: Setting(value, PREFIX + name.upper()) for name, value in typed.items()}


def schema() -> dict[str, Any]:
    """The JSON Schema of hookmap.yaml, for editors; docs/hookmap.schema.json is this, and a test holds it so."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID}
    return {**head, **Settings.model_json_schema()}


def _nearest(start: Path) -> Path | None:
    files = (folder / FILE_NAME for folder in (start, *start.parents))
    return next((file for file in files if file.is_file()), None)


def _document(file: Path) -> dict[Any, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's whole numbers: to 1.1, the positions 4:20 are the number 260, and 010 is 8."""

    Loader.yaml_implicit_resolvers = {
        first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:int"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^-?(?:0|[1-9]\d*)$"), list("-0123456789"))
    try:
        document = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise click.UsageError(f"{file} is not YAML: {error}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise click.UsageError(f"{file}: expected keys and values such as `model: Qwen/Qwen3-0.6B`, found {document!r}")
    return document


def _read(document: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values that the file gives, and what is wrong with it, a line each."""
    unknown = [key for key in document if key not in Settings.model_fields]
    known = {key: value for key, value in document.items() if key in Settings.model_fields}
    problems = [f"unknown key {key!r}: {_near(str(key))}" for key in unknown]
    try:
        read = Settings.model_validate(known)
    except ValidationError as error:
        wrong = dict.fromkeys(str(each["loc"][0]) for each in error.errors())
        return {}, problems + [f"{key}: expected {_expected(key)}, found {known[key]!r}" for key in wrong]
    return read.model_dump(include=read.model_fields_set, exclude_none=True), problems


def _environment(environment: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The same of the variables. An empty one is one that is not set, and so is a Kubernetes service's own."""
    names = {key: PREFIX + key.upper() for key in Settings.model_fields}
    given = {key: environment[name] for key, name in names.items() if environment.get(name)}
    if f"{PREFIX}SERVICE_HOST" in environment and _SERVICE_PORT.fullmatch(given.get("port", "")):
        del given["port"]
    try:
        read = Settings.model_validate_strings(given)
    except ValidationError as error:
        wrong = dict.fromkeys(str(each["loc"][0]) for each in error.errors())
        return {}, [f"{names[key]}: expected {_expected(key)}, found {given[key]!r}" for key in wrong]
    return read.model_dump(include=read.model_fields_set, exclude_none=True), []


def _under(head: str, problems: list[str]) -> list[str]:
    return [f"{head}:", *(f"  - {problem}" for problem in problems)] if problems else []


def _near(key: str) -> str:
    near = difflib.get_close_matches(key, Settings.model_fields, n=2)
    return f"did you mean {' or '.join(near)}?" if near else f"the keys are {', '.join(Settings.model_fields)}"


def _expected(key: str) -> str:
    """What a person would have to write there, in a few words, as the schema says it."""
    rule = Settings.model_json_schema()["properties"][key]
    rules = [each for each in rule.get("anyOf", [rule]) if each.get("type") != "null"]
    if any(each["type"] == "array" for each in rules):
        if key == "features":
            return "a whole number, at least 1, or a list of whole numbers, at least 0"
        return "a list, or one text such as '8,12,16' or 'all'"
    return " or ".join(map(_words, rules))


def _words(rule: Mapping[str, Any]) -> str:
    if "enum" in rule:
        return f"one of {', '.join(rule['enum'])}"
    names = {"string": "a text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    said = [f"{words} {rule[bound]:g}" for bound, words in bounds.items() if bound in rule]
    return ", ".join([names[rule["type"]], *said])


def _beside(file: Path, key: str, value: Any) -> Any:
    """Paths of the file are relative to its folder. A hub id looks like a path too: only what is there is one."""
    return str(file.parent / value) if key in _PATHS and value and (file.parent / value).exists() else value
