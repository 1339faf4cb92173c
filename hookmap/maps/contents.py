"""What a map says, field by field."""

import itertools
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from hookmap.documents import Frozen
from hookmap.errors import SelectionError
from hookmap.maps.layer_order import layers_of, pairs_of
from hookmap.maps.points import POINTS, PointName
from hookmap.maps.templates import BlockKind, PointTemplate, at_name

SCHEMA_VERSION = 3


class Proof(Frozen):
    """Versions of transformers in which discovery finds this map, and the checks that it passes there."""

    transformers: tuple[str, ...] = Field(default=(), description="oldest first")
    on: str = Field(default="random weights, narrow width, full depth", description="what was run")
    checks: dict[str, int] = Field(default_factory=dict, description="the check -> how many statements it proved")


class MapContents(Frozen):
    """Every field of a map, in the order of its document; and what follows from the fields alone."""

    architecture: str
    part: str = Field(
        default="",
        description="`vision`: the map is of the part that reads pictures, whose positions are patches; empty: of the "
        "language model",
    )
    layer_access_pattern: str = Field(description="the layer list, indexed: `model.layers[i]`")
    pre_attention_path: str | None = Field(description="template of the module that reads `resid_pre`: the pre-norm")
    pre_mlp_path: str | None = Field(description="template of the module whose input is `resid_mid`, or null")

    num_layers: int = Field(ge=1, le=100_000)
    d_model: int = Field(ge=1)
    num_heads: int | None = None
    d_vocab: int | None = None

    embedding_path: str | None
    layers_path: str = Field(description="path template of one block: `model.layers.{i}`")
    layer_names: tuple[str, ...] = Field(
        default=(),
        description="what `{i}` is for each layer, where that is not its number: `coda.0`, `block_a`; {i+1}: one more",
    )
    runs: str = Field(
        default="",
        description="the order in which layers run, `0-1, 3 x (2-3), 4-5`; empty: each once, as they are numbered",
    )
    joined: bool = Field(
        default=True, description="false where the model adds to the stream between one block and the next"
    )
    between: dict[str, str] = Field(
        default_factory=dict,
        description="`3 -> 2`: what enters layer 2 when it runs after layer 3, where that is not what layer 3 gave; "
        "`0-2 -> 1-3`: the same of each layer {i} and the next; `3 -> final_norm`: what the last norm reads",
    )
    left_out: tuple[str, ...] = Field(
        default=(), description="other lists of blocks that the output is computed through: no point is of them"
    )
    final_norm_path: str | None
    lm_head_path: str | None

    model_points: dict[str, PointTemplate] = Field(description="points of the whole model: embed, final_norm, logits")
    model_unavailable: dict[str, str] = Field(default_factory=dict, description="as in a kind")
    kinds: tuple[BlockKind, ...] = Field(min_length=1)

    scope: Literal["architecture", "model"] = Field(description="`model`: only for the config with this hash")
    model_id: str | None = None
    model_type: str | None = None
    config: dict[str, Any] = Field(default_factory=dict, description="the config's difference from its defaults")
    config_hash: str | None = None
    transformers_version: str
    hookmap_version: str
    discovered_by: str = Field(
        default="", description="what ran: the model on meta, a narrow copy, or the model itself"
    )
    proofs: tuple[Proof, ...] = Field(default=(), description="what verified the map, and where")

    @model_validator(mode="after")
    def _every_layer_has_one_kind(self) -> Self:
        found = sorted(layer for kind in self.kinds for layer in kind.layers)
        if found != list(range(self.num_layers)):
            raise ValueError(f"the kinds' layers must cover 0..{self.num_layers - 1} once each, found {found}")
        if len(self.layer_names) not in (0, self.num_layers):
            raise ValueError(f"layer_names must name all {self.num_layers} layers, found {len(self.layer_names)}")
        names = [kind.name for kind in self.kinds]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"each kind has a name of its own, found twice: {', '.join(twice)}")
        for kind in self.kinds:
            ran = sorted({layers_of(self.runs).count(layer) for layer in kind.layers})
            if self.runs and kind.points and ran != [kind.calls]:
                raise ValueError(f"kind {kind.name!r} says that it runs {kind.calls} times, runs says {ran}")
            for name in (*kind.points, *kind.unavailable):
                if PointName.of(name).base not in POINTS:
                    raise ValueError(f"kind {kind.name!r} has the unknown point {name!r}")
        return self

    @property
    def proved_on(self) -> tuple[str, ...]:
        """The versions of transformers in which discovery finds this map and its checks pass, oldest first."""
        from packaging.version import Version

        return tuple(sorted({version for proof in self.proofs for version in proof.transformers}, key=Version))

    @property
    def order(self) -> tuple[tuple[int, int], ...]:
        """(layer, run) in the order of the forward pass, both 0-based; one entry for each time that a layer runs."""
        calls = {layer: kind.calls for kind in self.kinds for layer in kind.layers}
        rounds = range(max(calls.values()))
        layers = layers_of(self.runs) or tuple(i for r in rounds for i in sorted(calls) if calls[i] > r)
        counts = {layer: itertools.count() for layer in layers}
        return tuple((layer, next(counts[layer])) for layer in layers)

    def is_joined(self, before: int, here: int) -> bool:
        """Whether what layer `before` gives enters layer `here`, which runs behind it, or a constant times it."""
        known = pairs_of(tuple(self.between))
        return (before, here) not in known if known else self.joined

    def at_layer(self, template: str, layer: int) -> str:
        """A path template at one layer: `model.layers.{i}.mlp` -> `model.layers.3.mlp`."""
        return at_name(template, self.layer_names[layer] if self.layer_names else str(layer))

    def kind_of(self, layer: int) -> BlockKind:
        """The kind of block that `layer` is, from the end where negative. Raises SelectionError where there is none."""
        number = layer + self.num_layers if layer < 0 else layer
        for kind in self.kinds:
            if number in kind.layers:
                return kind
        raise SelectionError(f"layer {layer} is out of range: {self.layers_there}.")

    @property
    def layers_there(self) -> str:
        """Which layers may be named, for messages."""
        return f"the model has layers 0 to {self.num_layers - 1} (or -{self.num_layers} to -1)"

    @property
    def points(self) -> tuple[str, ...]:
        """Names of the points that exist on at least one layer, in the vocabulary's order."""
        found = {name for kind in self.kinds for name in kind.points} | set(self.model_points)
        order = {name: position for position, name in enumerate(POINTS)}
        return tuple(sorted(found, key=lambda name: (order[PointName.of(name).base], name)))
