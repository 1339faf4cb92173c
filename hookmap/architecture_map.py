"""The map: a frozen JSON document that says where each point of one architecture, or of one model, is.

A map holds kinds of blocks and path templates over `{i}`, never one row per layer, so it stays small and
serves every size of an architecture. It knows nothing of torch: `discovery` writes it, `selectors` reads it.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hookmap.errors import MapError, MapNotFoundError
from hookmap.points import POINTS

SCHEMA_VERSION = 1
SCHEMA_ID = "https://hookmap.dev/schema/architecture-map-1.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TermTemplate(_Frozen):
    """One tensor at a module's boundary, times a constant."""

    module: str = Field(description="module path from the model's root; `{i}` is the layer; empty for the root itself")
    side: Literal["input", "output"]
    index: int | str | None = Field(
        default=None, description="position or name in the arguments or the output; null where the output is the tensor"
    )
    scale: float = Field(default=1.0, description="the constant that the model multiplies this tensor by, outside modules")
    flat: bool = Field(default=False, description="the module sees [batch * pos, ...]; a capture unflattens it")


class PointTemplate(_Frozen):
    """Where a point is: the sum over its terms of scale * tensor, and its place in the forward order."""

    terms: tuple[TermTemplate, ...] = Field(min_length=1)
    order: int = Field(ge=0, description="place of the last term in the forward order of its block")
    evidence: str = Field(default="", description="what in the dataflow shows it")


class Branch(_Frozen):
    """The mixer or the MLP of a kind of block."""

    type: str = Field(description="mixer: attention, recurrent, convolution; mlp: dense, moe")
    module: str | None = Field(default=None, description="path template of the module that computes it, if one does")
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
    mixer: Branch | None = None
    mlp: Branch | None = None
    relations: tuple[str, ...] = Field(
        default=(), description="exact relations among this kind's points, e.g. `resid_mid = resid_pre + mixer_out`"
    )
    points: dict[str, PointTemplate]
    unavailable: dict[str, str] = Field(default_factory=dict, description="point -> the reason why it is not there")


class ArchitectureMap(_Frozen):
    """The whole document. `discover` makes it; `save` and `load` keep it; `selectors` turns it into taps."""

    schema_version: Literal[1] = SCHEMA_VERSION
    architecture: str
    layer_access_pattern: str = Field(description="the layer list, indexed: `model.layers[i]`")
    pre_attention_path: str | None = Field(description="template of the module whose input is `resid_pre`: the pre-norm")
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
    discovered_by: str = Field(default="", description="how the dataflow was read: meta, narrow copy, or the model itself")
    verified_by: tuple[str, ...] = Field(default=(), description="the checks that this map passed, and on what")

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
        from hookmap.selectors import unavailable

        return unavailable(self, point, layer)

    def selectors(self, points: Any = "all", layers: Any = "all") -> "tuple[Any, ...]":
        """Forward-ordered selectors; see `hookmap.selectors.select`."""
        from hookmap.selectors import select

        return select(self, points, layers)

    def to_json(self) -> str:
        """The document as JSON, lists of numbers on one line."""
        text = json.dumps(self.model_dump(mode="json", exclude_defaults=False), indent=2, ensure_ascii=False)
        return re.sub(r"\[\s*(-?\d+(?:,\s*-?\d+)*)\s*\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the document to `path`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")
