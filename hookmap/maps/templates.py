"""What a map is made of: templates over `{i}`, the layer, and kinds of block. Knows neither the document nor torch."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, field_validator

from hookmap.documents import Frozen
from hookmap.maps.grammar import operation_text
from hookmap.maps.points import why_absent
from hookmap.maps.relations import Relation

_PLACEHOLDER = re.compile(r"\{i(\+\d+)?\}")
_SHOWN = 4
"""constants that are listed; of more, the first and the last"""


class Heads(Frozen):
    """Which features of a tensor's last axis are the heads of a point, and in which order they lie.

    The axis is cut into `groups` of one length; of each, the features from `start` to `stop` are heads of `d_head`.
    """

    groups: int = Field(default=1, ge=1, description="1: q, k and v side by side, or one of them alone")
    start: int = Field(default=0, ge=0, description="first feature in each group")
    stop: int = Field(ge=1, description="the feature behind the last one in each group")
    d_head: int = Field(ge=1, description="features of one head")


def at_name(template: str, name: str) -> str:
    """The path of one layer: its name for `{i}`; where it is a number, the number k further on for `{i+k}`."""
    return _PLACEHOLDER.sub(lambda match: str(int(name) + int(match[1])) if match[1] else name, template)


def is_template(path: str) -> bool:
    """Whether the path differs from layer to layer."""
    return _PLACEHOLDER.search(path) is not None


def boundary(
    module: str, side: str, index: int | str | None, scale: float = 1.0, times: str = " * ", weight: str | None = None
) -> str:
    """A tensor at a boundary, as people read it: `0.5 * model.layers.0.mlp.output[0]`; `module` with the operation."""
    factor = ("" if scale == 1.0 else f"{scale:g}{times}") + ("" if weight is None else f"{weight}{times}")
    return f"{factor}{module}.{side}{'' if index is None else f'[{index!r}]'}"


def short_path(path: str, prefix: str) -> str:
    """The module's path from `prefix` on, the block's own path; from the model's root if that is empty."""
    return path.removeprefix(prefix).lstrip(".") or ("block" if prefix else "model")


class TermTemplate(Frozen):
    """One tensor at the boundary of a module, or of an operation in its forward, times a constant and a parameter."""

    module: str = Field(description="module path from the model's root; `{i}` is the layer; empty for the root itself")
    side: Literal["input", "output"]
    index: int | str | None = Field(
        default=None, description="position or name in the arguments or the output; null where the output is the tensor"
    )
    operation: str | None = Field(
        default=None,
        description="the operator whose input or output it is, in the module's own forward: the name of a PyTorch "
        "operator, such as `_softmax`; `index` is then a place among its tensors",
    )
    occurrence: int | None = Field(
        default=None, ge=0, description="which operation of that name in the module's forward; null: the only one"
    )
    visits: int | None = Field(
        default=None,
        ge=1,
        description="how many operations of that name every forward has, where that is known",
    )
    experts: str | None = Field(
        default=None,
        description="path of a parameter that holds the weights of all experts: the point is what the products with it "
        "read (side `input`) or what the experts give (`output`) inside the module, of each token for the experts that "
        "the router chose for it, in the order of `router_indices`",
    )
    through: str | None = Field(
        default=None,
        description="path of a parameter, with `.T` behind it where it is transposed: the point is each head's "
        "features times the head's rows of it; a capture reads it in the model",
    )
    scale: float = Field(default=1.0, description="the constant that the model multiplies it by, outside modules")
    weight: str | None = Field(
        default=None,
        description="path of the parameter that the model multiplies it by, outside modules: a number, or one for each "
        "feature; a capture reads it in the model",
    )
    flat: bool = Field(default=False, description="the module sees [batch * pos, ...]; a capture unflattens it")
    axes: tuple[str, ...] | None = Field(
        default=None,
        description="its axes there, where they are not (batch, pos, ...); a capture reorders them; `batch*heads` is "
        "one axis of both, the heads of one row of the batch side by side",
    )
    rows: Literal["all", "first", "last"] = Field(
        default="all", description="which of its positions are the tokens', where the tensor has more"
    )
    call: int | None = Field(
        default=None,
        ge=0,
        description="which call of the module in its block's first run, where others are before or behind",
    )
    calls_per_run: int = Field(
        default=1, ge=1, description="how many calls of the module lie between one run of its block and the next"
    )

    heads: Heads | None = Field(
        default=None, description="the point is [batch, pos, heads, d_head], and these features of the last axis"
    )

    def call_in(self, run: int, runs: int = 1) -> int | None:
        """Which call of the module in one forward pass: in the block's run `run`, 0-based, of `runs`; None: the one."""
        if self.call is None:
            return run if runs > 1 else None
        return self.call + run * self.calls_per_run

    def text(self, prefix: str = "", times: str = " * ") -> str:
        """Factor, module path from `prefix` on, side and index: `0.5 * mlp.output[0]`."""
        weight = None if self.weight is None else short_path(self.weight, prefix)
        if self.experts is not None:
            return boundary(short_path(self.experts, prefix), self.side, None)
        module = short_path(self.module, prefix) + operation_text(self.operation, self.occurrence)
        product = "" if self.through is None else f" @ {short_path(self.through, self.module)}"
        return boundary(module, self.side, self.index, self.scale, times, weight) + product


def text_of_all(terms: Sequence[TermTemplate], prefix: str = "", times: str = " * ") -> str:
    """One term of several kinds of block, which differ in its constant alone: `(0.7, 0.5, …, 0.1) * mlp.output`."""
    factors = list(dict.fromkeys(f"{term.scale:g}" for term in terms))
    if len(factors) == 1:
        return terms[0].text(prefix, times)
    shown = factors if len(factors) <= _SHOWN else [*factors[:2], "…", factors[-1]]
    return f"({', '.join(shown)}){times}{terms[0].model_copy(update={'scale': 1.0}).text(prefix, times)}"


class PointTemplate(Frozen):
    """Where a point is: the sum over its terms of scale * tensor, and its place in the forward order."""

    terms: tuple[TermTemplate, ...] = Field(min_length=1)
    order: int = Field(ge=0, description="place of the last term in the forward order of its block")
    evidence: str = Field(default="", description="what in the dataflow shows it")
    write: TermTemplate | None = Field(
        default=None,
        description="where it is written, if that is not where it is read: the model has used the tensor before a "
        "module shows it",
    )
    beside: tuple[TermTemplate, ...] = Field(
        default=(),
        description="of `mixer_in`, `mlp_in`: what else of the tokens the branch reads (Gemma 4's embeddings)",
    )


class BranchInfo(Frozen):
    """The mixer or the MLP of a kind of block."""

    type: str = Field(description="mixer: attention, recurrent, convolution; mlp: dense, moe")
    modules: tuple[str, ...] = Field(
        default=(), description="path templates of the modules inside the block that compute it"
    )
    module_class: str | None = Field(default=None, description="its class in the library, for people")
    experts: int | None = Field(default=None, description="MoE: number of routed experts")
    experts_per_token: int | None = Field(default=None, description="MoE: experts that each token uses")
    shared_experts: int | None = Field(default=None, description="MoE: experts that every token uses")


class BlockKind(Frozen):
    """One kind of block; a hybrid model has several."""

    name: str
    layers: tuple[int, ...]
    block_class: str
    branch_order: Literal["sequential", "parallel", "mixer_only", "mlp_only", "other"]
    norm_placement: Literal["pre", "post", "sandwich", "none", "other"]
    axes: tuple[str, ...] = Field(
        default=("batch", "pos", "d_model"),
        description="axes of the residual stream as captured; several streams are kept whole, with an axis `stream`",
    )
    calls: int = Field(
        default=1,
        ge=1,
        description="how often each of these layers runs in one forward pass; its points are of each run",
    )
    coupled: bool = Field(
        default=False,
        description="the block has two streams in two tensors, and each branch adds to the stream that it does not "
        "read; resid_pre and resid_post are of the one that the mixer reads, resid_mid of the other",
    )
    mixer: BranchInfo | None = None
    mlp: BranchInfo | None = None
    cross_attn: BranchInfo | None = Field(
        default=None, description="a decoder's branch that attends to the positions of an encoder"
    )
    relations: tuple[str, ...] = Field(
        default=(), description="exact relations among this kind's points, e.g. `resid_mid = resid_pre + mixer_out`"
    )
    points: dict[str, PointTemplate]
    unavailable: dict[str, str] = Field(
        default_factory=dict, description="point -> the reason why it is not there, if not the usual one"
    )

    @field_validator("unavailable")
    @classmethod
    def _without_what_goes_without_saying(cls, reasons: dict[str, str]) -> dict[str, str]:
        return {name: reason for name, reason in reasons.items() if reason != why_absent(name)}

    def without(self, lost: Mapping[str, str]) -> "BlockKind":
        """The same kind where these points are unavailable, with their reasons, and no relation names them."""
        points = {name: point for name, point in self.points.items() if name not in lost}
        parsed = {text: Relation.parse(text) for text in self.relations}
        kept = [text for text, relation in parsed.items() if relation is None or not lost.keys() & relation.points()]
        unavailable = {**self.unavailable, **lost}
        return self.model_copy(update={"points": points, "unavailable": unavailable, "relations": tuple(kept)})
