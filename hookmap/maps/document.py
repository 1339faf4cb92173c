"""The map: a frozen JSON document that says where each point of one architecture, or of one model, is.

A map holds kinds of blocks and path templates over `{i}`, never one row per layer, so it stays small and
serves every size of an architecture. It knows nothing of torch: `discovery` writes it, `selectors` reads it.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from hookmap.errors import MapError, MapNotFoundError
from hookmap.maps.points import POINTS
from hookmap.placeholders import gguf_told, is_gguf, is_pointer, pointers_told

SCHEMA_VERSION: Literal[1] = 1
SCHEMA_ID = "urn:hookmap:schema:architecture-map-1"


# A number, or a word without spaces: sentences stay on lines of their own.
_SCALAR = r'(?:-?\d+|"[^"\s]*")'


def _on_one_line(match: re.Match[str]) -> str:
    return "[" + re.sub(r"\s+", " ", match[1]) + "]"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Heads(_Frozen):
    """Which features of a tensor's last axis are the heads of a point, and in which order they lie.

    The axis is cut into `groups` of one length; of each, the features from `start` to `stop` are heads of `d_head`.
    """

    groups: int = Field(default=1, ge=1, description="1: q, k and v side by side, or one of them alone")
    start: int = Field(default=0, ge=0, description="first feature in each group")
    stop: int = Field(ge=1, description="the feature behind the last one in each group")
    d_head: int = Field(ge=1, description="features of one head")


class TermTemplate(_Frozen):
    """One tensor at a module's boundary, times a constant."""

    module: str = Field(description="module path from the model's root; `{i}` is the layer; empty for the root itself")
    side: Literal["input", "output"]
    index: int | str | None = Field(
        default=None, description="position or name in the arguments or the output; null where the output is the tensor"
    )
    scale: float = Field(default=1.0, description="the constant that the model multiplies it by, outside modules")
    flat: bool = Field(default=False, description="the module sees [batch * pos, ...]; a capture unflattens it")
    axes: tuple[str, ...] | None = Field(
        default=None, description="its axes there, where they are not (batch, pos, ...); a capture reorders them"
    )
    rows: Literal["all", "first", "last"] = Field(
        default="all", description="which of its positions are the tokens', where the tensor has more"
    )
    call: int | None = Field(
        default=None, ge=0, description="which call of the module in one forward pass, where it is called several times"
    )

    heads: Heads | None = Field(
        default=None, description="the point is [batch, pos, heads, d_head], and these features of the last axis"
    )

    @model_serializer(mode="wrap")
    def _without_the_usual(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        usual = {"axes": None, "rows": "all", "call": None, "heads": None}
        return {key: value for key, value in handler(self).items() if key not in usual or value != usual[key]}


class PointTemplate(_Frozen):
    """Where a point is: the sum over its terms of scale * tensor, and its place in the forward order."""

    terms: tuple[TermTemplate, ...] = Field(min_length=1)
    order: int = Field(ge=0, description="place of the last term in the forward order of its block")
    evidence: str = Field(default="", description="what in the dataflow shows it")
    beside: tuple[TermTemplate, ...] = Field(
        default=(),
        description="of `mixer_in`, `mlp_in`: what else of the tokens the branch reads (Gemma 4's embeddings)",
    )

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "beside" or value}


class Branch(_Frozen):
    """The mixer or the MLP of a kind of block."""

    type: str = Field(description="mixer: attention, recurrent, convolution; mlp: dense, moe")
    modules: tuple[str, ...] = Field(
        default=(), description="path templates of the modules inside the block that compute it"
    )
    module_class: str | None = Field(default=None, description="its class in the library, for people")
    experts: int | None = Field(default=None, description="MoE: number of routed experts")
    experts_per_token: int | None = Field(default=None, description="MoE: experts that each token uses")
    shared_experts: int | None = Field(default=None, description="MoE: experts that every token uses")


class BlockKind(_Frozen):
    """One kind of block; a hybrid model has several."""

    name: str
    block_class: str
    layers: tuple[int, ...]
    branch_order: Literal["sequential", "parallel", "mixer_only", "mlp_only", "other"]
    norm_placement: Literal["pre", "post", "sandwich", "none", "other"]
    axes: tuple[str, ...] = Field(
        default=("batch", "pos", "d_model"),
        description="axes of the residual stream as captured; several streams are kept whole, with an axis `stream`",
    )
    calls: int = Field(
        default=1, ge=1, description="how often each of these layers runs in one forward pass; its points are of one"
    )
    mixer: Branch | None = None
    mlp: Branch | None = None
    relations: tuple[str, ...] = Field(
        default=(), description="exact relations among this kind's points, e.g. `resid_mid = resid_pre + mixer_out`"
    )
    points: dict[str, PointTemplate]
    unavailable: dict[str, str] = Field(default_factory=dict, description="point -> the reason why it is not there")

    @model_serializer(mode="wrap")
    def _without_the_usual(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if (key, value) != ("calls", 1)}

    def without(self, lost: Mapping[str, str]) -> "BlockKind":
        """The same kind where these points are unavailable, with their reasons, and no relation names them."""
        points = {name: point for name, point in self.points.items() if name not in lost}
        said = [line for line in self.relations if not lost.keys() & set(re.split(r"[^\w.]+", line))]
        unavailable = {**self.unavailable, **lost}
        return self.model_copy(update={"points": points, "unavailable": unavailable, "relations": tuple(said)})


class ArchitectureMap(_Frozen):
    """The whole document. `discover` makes it; `save` and `load` keep it; `selectors` turns it into taps."""

    schema_version: Literal[1] = SCHEMA_VERSION
    architecture: str
    layer_access_pattern: str = Field(description="the layer list, indexed: `model.layers[i]`")
    pre_attention_path: str | None = Field(description="template of the module that reads `resid_pre`: the pre-norm")
    pre_mlp_path: str | None = Field(description="template of the module whose input is `resid_mid`, or null")

    scope: Literal["architecture", "model"] = Field(description="`model`: only for the config with this hash")
    model_id: str | None = None
    model_type: str | None = None
    config: dict[str, Any] = Field(default_factory=dict, description="the config's difference from its defaults")
    config_hash: str | None = None
    transformers_version: str
    hookmap_version: str

    num_layers: int = Field(ge=1)
    d_model: int = Field(ge=1)
    num_heads: int | None = None
    d_vocab: int | None = None

    embedding_path: str | None
    layers_path: str = Field(description="path template of one block: `model.layers.{i}`")
    final_norm_path: str | None
    lm_head_path: str | None

    model_points: dict[str, PointTemplate] = Field(description="points of the whole model: embed, final_norm, logits")
    model_unavailable: dict[str, str] = Field(default_factory=dict)
    kinds: tuple[BlockKind, ...] = Field(min_length=1)
    joined: bool = Field(
        default=True, description="false where the model adds to the stream between one block and the next"
    )
    left_out: tuple[str, ...] = Field(
        default=(), description="other lists of blocks that the output is computed through: no point is of them"
    )
    discovered_by: str = Field(
        default="", description="what ran: the model on meta, a narrow copy, or the model itself"
    )
    verified_by: tuple[str, ...] = Field(default=(), description="the checks that this map passed, and on what")
    proved_on: tuple[str, ...] = Field(
        default=(),
        description="versions of transformers, oldest first, in which discovery finds this map and its checks pass",
    )

    @model_serializer(mode="wrap")
    def _without_the_usual(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        usual: dict[str, Any] = {"joined": True, "left_out": ()}
        return {key: value for key, value in handler(self).items() if key not in usual or value not in (usual[key], [])}

    @model_validator(mode="after")
    def _every_layer_has_one_kind(self) -> "ArchitectureMap":
        found = sorted(layer for kind in self.kinds for layer in kind.layers)
        if found != list(range(self.num_layers)):
            raise ValueError(f"the kinds' layers must cover 0..{self.num_layers - 1} once each, found {found}")
        for kind in self.kinds:
            for name in (*kind.points, *kind.unavailable):
                if name.partition(".")[0] not in POINTS:
                    raise ValueError(f"kind {kind.name!r} has the unknown point {name!r}")
        return self

    def kind_of(self, layer: int) -> BlockKind:
        """The kind of block that `layer` (0-based) is."""
        return next(kind for kind in self.kinds if layer in kind.layers)

    @property
    def points(self) -> tuple[str, ...]:
        """Names of the points that exist on at least one layer, in the vocabulary's order."""
        found = {name for kind in self.kinds for name in kind.points} | set(self.model_points)
        order = {name: position for position, name in enumerate(POINTS)}
        return tuple(sorted(found, key=lambda name: (order[name.partition(".")[0]], name)))

    def unavailable(self, point: str, layer: int | None = None) -> str | None:
        """Why `point` does not exist on `layer`, or None where it does."""
        from hookmap.maps.selectors import unavailable

        return unavailable(self, point, layer)

    def selectors(self, points: Any = "all", layers: Any = "all") -> "tuple[Any, ...]":
        """Forward-ordered selectors; `{"resid_post": [3], "z": [8]}` too; see `hookmap.maps.selectors.select`."""
        from hookmap.maps.selectors import select

        return select(self, points, layers)

    def rename(self) -> dict[str, list[str]]:
        """The points that are one module's boundary as nnsight's `rename=`; see `hookmap.maps.nnsight_names.rename`."""
        from hookmap.maps.nnsight_names import rename

        return rename(self)

    def __repr__(self) -> str:
        name = f" of {self.model_id}" if self.model_id else ""
        kinds = "1 kind of block" if len(self.kinds) == 1 else f"{len(self.kinds)} kinds of block"
        size = f"{self.num_layers} layers, d_model {self.d_model}, {kinds}"
        return f"<ArchitectureMap {self.architecture}{name}: {size}, {len(self.points)} points>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        from hookmap.html import map_html

        return map_html(self)

    def to_json(self) -> str:
        """The document as JSON; lists of numbers and of words on one line."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False)
        return re.sub(rf"\[\s*({_SCALAR}(?:,\s*{_SCALAR})*)\s*\]", _on_one_line, text) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the document to `path`, with the folders that it is in."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(self.to_json(), encoding="utf-8")


def schema() -> dict[str, Any]:
    """The JSON Schema of a map; `mappings/architecture-map.schema.json` is this, and a test holds it so."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID}
    return {**head, **ArchitectureMap.model_json_schema()}


def load(path: str | Path) -> ArchitectureMap:
    """The map in the file `path`. Raises MapNotFoundError or MapError, see `parse`."""
    file = Path(path)
    if is_gguf(file) and file.is_file():
        raise MapError(gguf_told(file))
    if is_pointer(file):
        raise MapError(pointers_told(file.parent, [file.name]))
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MapNotFoundError(f"there is no map file {path}. Make one: hookmap discover MODEL -o {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MapError(f"the map file {path} cannot be read: {error}") from error
    return parse(text, source=str(path))


def parse(document: str | Mapping[str, Any], source: str = "the document") -> ArchitectureMap:
    """A map from JSON text or from its parsed form; `source` names it in errors.

    Raises MapError with every problem at once: the field, what was expected, and what was found.
    """
    found = _parse_json(document if isinstance(document, str) else json.dumps(dict(document)), source)
    problems = _schema_problems(found)
    if not problems:
        try:
            return ArchitectureMap.model_validate_json(json.dumps(found))
        except ValidationError as error:  # what a schema cannot say: every layer has one kind, point names
            problems = [f"{_path(e['loc'])}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "\n".join(f"  - {problem}" for problem in problems)
    raise MapError(
        f"{source} is not a hookmap map, {count}:\n{lines}\n"
        f"Mend the file, or make it anew: hookmap discover MODEL -o {source if source.endswith('.json') else 'FILE'}"
    )


def _parse_json(text: str, source: str) -> Any:
    def refuse(constant: str) -> None:
        raise MapError(f"{source} is not JSON: {constant} is no JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        line = error.doc[error.doc.rfind("\n", 0, error.pos) + 1 :].partition("\n")[0].strip()
        raise MapError(
            f"{source} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
            f"{f', at: {line[:80]}' if line else ''}\n"
            "Mend the file there, or make it anew: hookmap discover MODEL -o FILE"
        ) from error


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(schema())


def _schema_problems(document: Any) -> list[str]:
    """Every violation of the published schema, as `field: expected ..., found ...`."""
    errors = _validator().iter_errors(document)
    return [line for error in sorted(errors, key=lambda e: list(map(str, e.absolute_path))) for line in _explain(error)]


def _explain(error: Any) -> Iterable[str]:
    where = _path(error.absolute_path)
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        for key in error.instance.keys() - known.keys():
            near = difflib.get_close_matches(key, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the fields are {', '.join(known)}"
            yield f"{_path([*error.absolute_path, key])}: unknown field; {hint}"
    elif error.validator == "required":
        missing = next(key for key in error.validator_value if f"'{key}' is a required" in error.message)
        expected = error.schema["properties"][missing]
        yield f"{_path([*error.absolute_path, missing])}: expected {_expected(expected)}, found nothing: it is missing"
    else:
        yield f"{where}: expected {_expected(error.schema)}, found {_shorten(error.instance)}"


def _expected(rule: Mapping[str, Any]) -> str:
    """A schema in a few words: what a person would have to write there."""
    if "const" in rule:
        return json.dumps(rule["const"])
    if "enum" in rule:
        return "one of " + ", ".join(map(json.dumps, rule["enum"]))
    if "anyOf" in rule:
        return " or ".join(map(_expected, rule["anyOf"]))
    if "$ref" in rule:
        return f"an object ({rule['$ref'].rpartition('/')[2]})"
    names = {"string": "a string", "integer": "a whole number", "number": "a number", "array": "a list"}
    names |= {"object": "an object", "boolean": "true or false", "null": "null"}
    text = names.get(rule.get("type", ""), "another value")
    if rule.get("minItems"):
        text += f" of at least {rule['minItems']}"
    return f"{text}, at least {rule['minimum']}" if "minimum" in rule else text


def _path(parts: Iterable[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".") or "the whole document"


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
