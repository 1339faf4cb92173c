"""The vocabulary: the abstract names of tensors, the same in every model.

Names are TransformerLens's without the `hook_` prefix. This module knows names and nothing of models.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Self

from hookmap.maps.grammar import read_selector, selector_text, why_no_selector
from hookmap.wording import did_you_mean

RESIDUAL_AXES = ("batch", "pos", "d_model")
HEADS_AXES = ("batch", "pos", "heads", "d_head")
SCALE_AXES = ("batch", "pos", "one")
NOT_GATED = "nothing is multiplied by the activation function's result"
"""why a block has mlp_pre and no mlp_pre_linear"""
LATENT_AXES = ("batch", "pos", "d_latent")
EXPERT_AXES = ("batch", "pos", "k")
PLACE_AXES = ("batch", "pos", "...")
"""of a tensor that is named by its place: what else its axes are, the model knows"""


@dataclass(frozen=True)
class Point:
    """One abstract tensor: its name, its axes, and its definition in one sentence."""

    name: str
    meaning: str
    per_layer: bool = True
    axes: tuple[str, ...] = RESIDUAL_AXES
    deeper: bool = False
    """inside a branch: "all" leaves it out, it must be named"""
    eager: bool = False
    """only eager attention has it as a tensor, or in this place: a run that reads or writes it switches to that"""
    absent: str = "the dataflow shows no such tensor"
    """the reason where a map has neither the point nor a reason of its own"""


_NO_SCAN = "this block's mixer has no scan"
_NO_EXPERTS = "this block has no mixture of experts"
_NO_CROSS = "this block has no attention to an encoder's positions"


def _of_experts(name: str, meaning: str, axis: str) -> Point:
    return Point(name, meaning, axes=("batch", "pos", axis), deeper=True, absent=_NO_EXPERTS)


_ALL = (
    Point("embed", "the token embedding's output, before scaling and positions", per_layer=False),
    Point("resid_pre", "the residual stream that enters the block, before any normalisation"),
    Point("mixer_in", "what the mixer reads: after its pre-norm"),
    Point("mixer_out_raw", "the bare mixer's output, before post-norm, scale or gate"),
    Point("mixer_out", "exactly what the mixer branch adds to the residual stream"),
    Point("attn_in", "mixer_in, where the mixer is attention"),
    Point("mixer_norm_scale", "what the mixer's pre-norm multiplies the stream by", axes=SCALE_AXES, deeper=True),
    Point(
        "q_latent",
        "the compressed queries, as the projection to the heads' queries reads them",
        axes=LATENT_AXES,
        deeper=True,
        absent="the queries are not projected from something compressed",
    ),
    Point(
        "k_latent",
        "the compressed keys and values, as the projection to the heads' values reads them",
        axes=LATENT_AXES,
        deeper=True,
        absent="keys and values are not projected from something compressed",
    ),
    Point("q", "the queries' projection, before norm and rotary embedding", axes=HEADS_AXES, deeper=True),
    Point("k", "the keys' projection, before norm and rotary embedding", axes=HEADS_AXES, deeper=True),
    Point("v", "the values' projection", axes=HEADS_AXES, deeper=True),
    Point(
        "q_rot",
        "the queries as attention reads them: after norm and rotary embedding",
        axes=HEADS_AXES,
        deeper=True,
        eager=True,
    ),
    Point(
        "k_rot",
        "the keys as attention reads them: after norm and rotary embedding",
        axes=HEADS_AXES,
        deeper=True,
        eager=True,
    ),
    Point(
        "attn_scores",
        "the attention scores as softmax reads them: scaled, capped and masked; needs eager attention",
        axes=("batch", "heads", "query", "key"),
        deeper=True,
        eager=True,
    ),
    Point(
        "pattern",
        "the attention weights; needs eager attention",
        axes=("batch", "heads", "query", "key"),
        deeper=True,
        eager=True,
    ),
    Point(
        "scan_in", "what enters the scan of a mixer that is no attention", axes=PLACE_AXES, deeper=True, absent=_NO_SCAN
    ),
    Point("scan_out", "what the scan gives, before its gate and norm", axes=PLACE_AXES, deeper=True, absent=_NO_SCAN),
    Point(
        "mixer_gate",
        "what the scan's output is multiplied by, before its activation function",
        axes=PLACE_AXES,
        deeper=True,
        absent=_NO_SCAN,
    ),
    Point("z", "the heads' outputs, as the output projection reads them", axes=HEADS_AXES, deeper=True),
    Point(
        "attn_result",
        "what each head gives: its z times its part of the output projection; with the bias they sum to attn_out_raw",
        axes=("batch", "pos", "heads", "d_model"),
        deeper=True,
    ),
    Point("attn_out_raw", "mixer_out_raw, where the mixer is attention"),
    Point("attn_out", "mixer_out, where the mixer is attention"),
    Point(
        "resid_mid_sum",
        "in post-norm blocks: the stream after the mixer's contribution, before the norm on it",
        absent="nothing is done to the sum: it is resid_mid",
    ),
    Point("resid_mid", "the residual stream after the mixer's contribution, as the MLP branch reads it"),
    Point(
        "cross_attn_in", "what a decoder's cross-attention reads of the stream: after its pre-norm", absent=_NO_CROSS
    ),
    Point("cross_attn_out_raw", "the bare cross-attention's output, before post-norm, scale or gate", absent=_NO_CROSS),
    Point("cross_attn_out", "exactly what the cross-attention adds to the residual stream", absent=_NO_CROSS),
    Point("mlp_in", "what the MLP reads: after its pre-norm"),
    Point("mlp_norm_scale", "what the MLP's pre-norm multiplies the stream by", axes=SCALE_AXES, deeper=True),
    Point("mlp_pre", "what the activation function reads", axes=("batch", "pos", "d_mlp"), deeper=True),
    Point("mlp_pre_linear", "what its result is multiplied by", axes=("batch", "pos", "d_mlp"), deeper=True),
    Point("mlp_post", "what the down projection reads: after the gate", axes=("batch", "pos", "d_mlp"), deeper=True),
    _of_experts("router_logits", "the router's score of each expert", "experts"),
    _of_experts("router_indices", "the experts chosen for each token", "k"),
    _of_experts("router_weights", "the weights of the chosen experts' outputs", "k"),
    Point(
        "expert_post",
        "what the down projection of each chosen expert reads, in the order of router_indices",
        axes=(*EXPERT_AXES, "d_expert"),
        deeper=True,
        absent=_NO_EXPERTS,
    ),
    Point(
        "expert_out",
        "what each chosen expert gives, before its weight, in the order of router_indices",
        axes=(*EXPERT_AXES, "d_model"),
        deeper=True,
        absent=_NO_EXPERTS,
    ),
    Point(
        "shared_expert_out",
        "what the experts that every token has add to mlp_out_raw, after their gate",
        deeper=True,
        absent=_NO_EXPERTS,
    ),
    Point("mlp_out_raw", "the bare MLP's output, before post-norm or scale"),
    Point("mlp_out", "exactly what the MLP branch adds to the residual stream"),
    Point("resid_post", "the residual stream that leaves the block"),
    Point("final_norm", "the residual stream after the model's last norm", per_layer=False),
    Point(
        "final_norm_scale",
        "what the model's last norm multiplies the stream by",
        per_layer=False,
        axes=SCALE_AXES,
        deeper=True,
    ),
    Point(
        "logits_raw",
        "the logits before any soft-cap or scale",
        per_layer=False,
        axes=("batch", "pos", "d_vocab"),
        deeper=True,
    ),
    Point("logits", "the logits, after any soft-cap or scale", per_layer=False, axes=("batch", "pos", "d_vocab")),
)

POINTS: dict[str, Point] = {point.name: point for point in _ALL}

FEATURES = "features"
"""the point of a dictionary's features, which no model has: a capture computes it of the point that is read"""
_FEATURES = Point(
    FEATURES,
    "the features of a dictionary, kept sparse",
    axes=("batch", "pos", FEATURES),
    deeper=True,
    absent="features are those of a dictionary: give it, dictionaries=[hookmap.load_dictionary(PATH)]",
)

# Names of other tools that mean the same tensor. A name of theirs that means another tensor is not an alias:
# TransformerLens's `hook_mlp_in` is the stream *before* the norm, ours is after it.
_NNTERP = {
    "token_embeddings": "embed",
    "layers_input": "resid_pre",
    "layers_output": "resid_post",
    "attentions_output": "attn_out_raw",
    "attention_probabilities": "pattern",
    "mlps_input": "mlp_in",
    "mlps_output": "mlp_out_raw",
}
_TRANSFORMER_LENS = {
    "hook_embed": "embed",
    "hook_resid_pre": "resid_pre",
    "hook_attn_out": "attn_out",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_out": "mlp_out",
    "hook_resid_post": "resid_post",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_z": "z",
    "attn.hook_rot_q": "q_rot",
    "attn.hook_rot_k": "k_rot",
    "attn.hook_attn_scores": "attn_scores",
    "attn.hook_pattern": "pattern",
    "attn.hook_result": "attn_result",
    "mlp.hook_pre": "mlp_pre",
    "mlp.hook_pre_linear": "mlp_pre_linear",
    "mlp.hook_post": "mlp_post",
    "mlp.hook_expert_indices": "router_indices",
}
_FALSE_FRIENDS = {
    "hook_mlp_in": "TransformerLens's hook_mlp_in is the stream before the norm: use resid_mid (or mlp_in)",
    "hook_attn_in": "TransformerLens's hook_attn_in is the stream before the norm: use resid_pre (or attn_in)",
    "ln1.hook_scale": "TransformerLens's hook_scale is what the norm divides by: 1 / mixer_norm_scale",
    "ln2.hook_scale": "TransformerLens's hook_scale is what the norm divides by: 1 / mlp_norm_scale",
    "ln_final.hook_scale": "TransformerLens's hook_scale is what the norm divides by: 1 / final_norm_scale",
    "attentions_input": "nnterp's attentions_input is the attention module's input: use attn_in",
}
_BLOCK_NAME = re.compile(r"^blocks\.([0-9]+)\.(.+)$")


@dataclass(frozen=True)
class PointName:
    """The parts of a point's name: `mlp_out.1` is the `mlp_out` of the MLP branch with number 1."""

    base: str
    number: str = ""
    """empty for the first branch of its role, which has no number in its names"""

    @classmethod
    def of(cls, name: str) -> Self:
        """A tensor that is named by its place has no number, and its whole name for a base."""
        base, _, number = (name, "", "") if is_place(name) else name.partition(".")
        return cls(base, number)

    def __str__(self) -> str:
        return self.numbered(self.base)

    @property
    def definition(self) -> Point:
        if self.base == FEATURES:
            return _FEATURES
        return _at_place(self.base) if is_place(self.base) else POINTS[self.base]

    def numbered(self, base: str) -> str:
        """The name of another point of the same branch: `mlp_in` for `mlp_out.1` gives `mlp_in.1`."""
        return f"{base}.{self.number}" if self.number else base

    @property
    def branch(self) -> str:
        """`cross_attn` of `cross_attn_out_raw`: the branch that it is an end of; any other base unchanged."""
        return re.sub(r"_(in|out_raw|out)$", "", self.base)

    def end(self, name: str) -> str:
        """The `in`, `out_raw` or `out` of the same branch: `out_raw` for `mlp_out.1` gives `mlp_out_raw.1`."""
        return self.numbered(f"{self.branch}_{name}")

    def as_mixer(self) -> str:
        """`mixer_out` for `attn_out`; any other name unchanged."""
        return self._renamed("attn_", "mixer_")

    def as_attention(self) -> str:
        """`attn_out` for `mixer_out`; any other name unchanged."""
        return self._renamed("mixer_", "attn_")

    def _renamed(self, old: str, new: str) -> str:
        renamed = new + self.base.removeprefix(old)
        return self.numbered(renamed if self.base.startswith(old) and renamed in POINTS else self.base)


def axes_of(name: str, ndim: int) -> tuple[str, ...]:
    """Names of the axes of a point's tensor, of which there are `ndim` where the name is a place."""
    axes = PointName.of(name).definition.axes
    return (*axes[:2], *(f"axis_{n}" for n in range(2, ndim))) if axes == PLACE_AXES else axes


def why_absent(name: str) -> str:
    """Why a block does not have this point, where its map says nothing of it; "" for a name that is none."""
    point = POINTS.get(PointName.of(name).base)
    return point.absent if point else ""


_PLACE = re.compile(r".\.(?:input|output)(?:\[.*\])?$")
_LAYER = re.compile(r"\{i(\+\d+)?\}")


@cache
def is_place(name: str) -> bool:
    """Whether a name is a place in the model: `model.layers.{i}.mlp.output`, `model.norm:rsqrt.output`."""
    return _PLACE.search(name) is not None


def _at_place(name: str) -> Point:
    per_layer = _LAYER.search(name) is not None
    eager = read_selector(name)[0].operation is not None
    return Point(name, "the tensor at this place in the model", per_layer, PLACE_AXES, deeper=True, eager=eager)


def _parsed_place(text: str) -> "ParsedPoint | str":
    """A place as it is written once and for all, or what is wrong with it."""
    whole = re.sub(r"\.input$", ".input[0]", text)
    try:
        place, factor = read_selector(whole)
    except ValueError:
        return f"{text!r} is no place in a model: {why_no_selector(whole)}"
    if factor != 1.0:
        return f"{text!r}: a place has no factor"
    return ParsedPoint(selector_text(place))


@dataclass(frozen=True)
class ParsedPoint:
    """A name as a user may write it: the point, and the layer where the name itself holds one."""

    point: str
    layer: int | None = None


def parse_point(name: str) -> ParsedPoint | str:
    """The point that `name` (ours, TransformerLens's or nnterp's) means, or a sentence that says why none."""
    text = name.strip()
    layer = None
    if is_place(text):
        return _parsed_place(text)
    if match := _BLOCK_NAME.match(text):
        layer, text = int(match[1]), match[2]
    point = _TRANSFORMER_LENS.get(text) or _NNTERP.get(text) or text
    parts = PointName.of(point)
    if (parts.base in POINTS or parts.base == FEATURES) and (not parts.number or re.fullmatch("[0-9]+", parts.number)):
        return ParsedPoint(point, layer)
    if text in _FALSE_FRIENDS:
        return _FALSE_FRIENDS[text]
    hint = did_you_mean(text.removeprefix("hook_"), POINTS, cutoff=0.5) or f"the points are {', '.join(POINTS)}"
    return f"unknown point {name!r}: {hint}"


def takes_layers(name: str) -> bool:
    """Whether layers are given with this name: not for a point of the whole model, nor if the name holds a layer."""
    parsed = parse_point(name)
    return isinstance(parsed, str) or (parsed.layer is None and PointName.of(parsed.point).definition.per_layer)


def transformer_lens_name(point: str, layer: int | None) -> str | None:
    """`blocks.8.hook_resid_mid`; None where TransformerLens has no name for this point."""
    name = next((theirs for theirs, ours in _TRANSFORMER_LENS.items() if ours == point), None)
    return name if name is None or layer is None else f"blocks.{layer}.{name}"
