"""One block's dataflow -> its points: which value each abstract name means, and the reasons for those it lacks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from hookmap.discovery.attention import ATTENTION, attention_points
from hookmap.discovery.block import ROLES, Block, Branch, Role
from hookmap.discovery.block_stream import Middle, additions, first_middle, middles, obstacles
from hookmap.discovery.branch_inputs import BranchInput, input_of, locate_input, own_module, states_read
from hookmap.discovery.branch_kinds import (
    BranchKinds,
    BranchOrder,
    cross_attention_info,
    kinds_of,
    mixer_info,
    mlp_info,
)
from hookmap.discovery.branch_outputs import has_post_norm, locate_output, locate_raw_output
from hookmap.discovery.chained_mlps import why_no_mlp
from hookmap.discovery.experts import ROUTER, mlp_points
from hookmap.discovery.locate import Location, Locator
from hookmap.discovery.norm_scales import NO_NORM, scale_of
from hookmap.discovery.scans import has_scan, scan_points
from hookmap.discovery.wiring import Found, Places, Wiring
from hookmap.maps.points import POINTS, PointName
from hookmap.maps.relations import Relation
from hookmap.maps.templates import BranchInfo, at_name

NormPlacement = Literal["pre", "post", "sandwich", "none", "other"]
Inputs = Mapping[str, tuple[Branch, BranchInput]]
"""mixer_in, mlp_in, and mixer_in.1 for a second mixer -> the branch and what it reads"""


@dataclass(frozen=True)
class BlockPoints:
    """What the map says of one block."""

    branch_order: BranchOrder
    norm_placement: NormPlacement
    mixer: BranchInfo | None
    mlp: BranchInfo | None
    cross_attn: BranchInfo | None = None
    coupled: bool = False
    """whether it has two streams, as a reversible block does"""
    locations: dict[str, Location] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    relations: list[Relation] = field(default_factory=list)
    readers: dict[str, str] = field(default_factory=dict)
    """mixer, mlp -> path template of the first module whose input is the stream that the branch reads"""


def points_of_block(block: Block) -> BlockPoints:
    """Name the values of one block."""
    kinds, locator = kinds_of(block), _locator(block)
    inputs = _inputs(block, locator)
    middle = first_middle(block) if kinds.order == "sequential" else None
    places: Places = {
        "resid_pre": _place(block.entry, "input", locator),
        **_branches(block, "mixer", inputs, locator),
        **_middles(block, kinds, middle, locator),
        **(_branches(block, "cross_attn", inputs, locator) if block.role("cross_attn") else {}),
        **_branches(block, "mlp", inputs, locator),
        "resid_post": _place(block.exit, "output", locator),
    }
    places |= _own_inputs(block, inputs, places, locator)
    places |= _attention_names(kinds, places)
    inside = _inside(block, kinds, locator)
    places |= inside.places
    places |= _scales(block, inputs, locator)
    found = {name: place for name, place in places.items() if isinstance(place, Location)}
    linear = _linear(block, found)
    sums = [each for each in additions(block, middle, found, locator.parameter) if each.can_be_checked(linear)]
    relations = [*sums, *(each for each in inside.relations if each.can_be_checked(found))]
    return BlockPoints(
        branch_order=kinds.order,
        coupled=bool(block.streams.twin),
        norm_placement=_norm_placement(block, inputs),
        mixer=mixer_info(block, kinds, locator.templated),
        mlp=mlp_info(block, kinds, locator.templated),
        cross_attn=cross_attention_info(block, locator.templated),
        locations=found,
        unavailable={name: reason for name, reason in places.items() if isinstance(reason, str)},
        relations=relations,
        readers=_readers(block, kinds, locator),
    )


def _linear(block: Block, found: Collection[str]) -> set[str]:
    """The points without the bare outputs that pass a norm before they are added: they are no multiple of what is."""
    branches = ((role, suffix, branch) for role in ROLES for suffix, branch in block.numbered(role))
    return {*found} - {f"{role}_out_raw{suffix}" for role, suffix, branch in branches if has_post_norm(block, branch)}


def _locator(block: Block) -> Locator:
    templates = {at_name(each, block.layers.name(block.number)): each for each in block.layers.lists}
    return Locator(block.values, block.call, block.seq, templates, block.layers.rows)


def _place(value: int, prefer: str, locator: Locator) -> Location | str:
    return locator.locate(value, prefer) or locator.why_nowhere(value)


# What the branches read and add ---------------------------------------------------------------------------------


def _inputs(block: Block, locator: Locator) -> Inputs:
    return {
        f"{role}_in{suffix}": (branch, input_of(block, branch, locator))
        for role in ROLES
        for suffix, branch in block.numbered(role)
    }


def _branches(block: Block, role: Role, inputs: Inputs, locator: Locator) -> Places:
    """Input, bare output and output of each branch of a role."""
    names = (f"{role}_in", f"{role}_out_raw", f"{role}_out")
    branches = block.numbered(role)
    if not branches:
        return dict.fromkeys(names, _why_no_branch(block, role))
    places: Places = {}
    for suffix, branch in branches:
        places[names[0] + suffix] = locate_input(block, inputs[names[0] + suffix][1], locator)
        places[names[1] + suffix] = locate_raw_output(block, branch, locator)
        places[names[2] + suffix] = locate_output(block, branch, locator)
    if len(branches) > 1:
        own = [suffix for suffix, _ in branches].index("")
        places |= {f"{name}.{own}": places[name] for name in names if isinstance(places[name], Location)}
    return places


def _why_no_branch(block: Block, role: Role) -> str:
    if not block.path and block.entry != block.exit:
        return _why_no_addition(block)
    return "this block has no mixer" if role == "mixer" else why_no_mlp(block)


def _why_no_addition(block: Block) -> str:
    if block.streams.mixed:
        return (
            "the block mixes several residual streams with one another, each in a tensor of its own: nothing is added "
            "to one alone"
        )
    if len(block.values.shape(block.entry)) > 3:
        return "the block mixes several residual streams with one another: nothing is added to them as a whole"
    names = ", ".join(f"`{name}`" for name in obstacles(block))
    return (
        "no residual addition was found in this block: between what enters and what leaves it are not only additions, "
        f"constant factors and norms, but {names}"
    )


def _own_inputs(block: Block, inputs: Inputs, places: Places, locator: Locator) -> Places:
    """An input that another point names too is placed at the branch's own module, where a write reaches it alone."""
    found: Places = {}
    for name, (branch, each) in inputs.items():
        place = places[name]
        if isinstance(place, str) or each.value is None or not _is_shared(name, place, places):
            continue
        if (own := own_module(block, branch, each.value, locator)) is not None:
            placed = replace(locator.at(own), beside=place.beside)
            found |= {other: placed for other, its in places.items() if its is place}
    return found


def _is_shared(name: str, place: Location, places: Places) -> bool:
    """Whether another point has the same terms; mixer_in and mixer_in.1 count as one."""
    others = [other for key, other in places.items() if PointName.of(key).base != PointName.of(name).base]
    return any(isinstance(other, Location) and other.terms == place.terms for other in others)


def _readers(block: Block, kinds: BranchKinds, locator: Locator) -> dict[str, str]:
    """For each role, the first module that the stream enters on its way into the first branch."""
    found: dict[str, str] = {}
    for role in ROLES:
        for branch in block.main(role)[:1]:
            entered = block.boundaries(states_read(block, branch)[-1], "input")
            if entered and not (role == "mlp" and kinds.order == "parallel"):
                found[role] = locator.templated(entered[0].call.path)
    return found


def _norm_placement(block: Block, inputs: Inputs) -> NormPlacement:
    pre = any(each.normed for _, each in inputs.values())
    post = any(step.kind == "norm" for step in block.path)
    post |= any(has_post_norm(block, branch) for branch, _ in inputs.values())
    if pre and post:
        return "sandwich"
    return "pre" if pre else "post" if post else "none"


# The stream between the branches --------------------------------------------------------------------------------


def _middles(block: Block, kinds: BranchKinds, middle: Middle | None, locator: Locator) -> Places:
    """The stream after each addition but the last, as the next branch reads it."""
    if middle is None:
        return dict.fromkeys(("resid_mid", "resid_mid_sum"), _why_no_middle(block, kinds))
    places: Places = {"resid_mid": _place(middle.read, "input", locator)}
    if middle.is_changed:
        places["resid_mid_sum"] = _place(middle.summed, "input", locator)
    else:
        places["resid_mid_sum"] = POINTS["resid_mid_sum"].absent
    several = middles(block)
    if len(several) > 1:
        places |= {f"resid_mid.{n}": _place(each.read, "input", locator) for n, each in enumerate(several)}
    return places


def _why_no_middle(block: Block, kinds: BranchKinds) -> str:
    match kinds.order:
        case "parallel":
            return f"{'attention' if kinds.has_attention else 'mixer'} and MLP run in parallel"
        case "mixer_only":
            return why_no_mlp(block)
        case "mlp_only":
            return "this block has no mixer"
    return "the MLP comes before the mixer: use resid_post" if block.role("mixer") else _why_no_addition(block)


# Attention, and what is inside the branches ---------------------------------------------------------------------


def _attention_names(kinds: BranchKinds, places: Places) -> Places:
    """attn_in, attn_out_raw and attn_out: the mixer's points, where it is attention."""
    names = ("mixer_in", "mixer_out_raw", "mixer_out")
    if kinds.mixers and not kinds.has_attention:
        reason = "this block's mixer is not attention: use {}"
        return {PointName.of(name).as_attention(): reason.format(name) for name in names}
    found = {PointName.of(name).as_attention(): places[name] for name in names}
    for number, kind in enumerate(kinds.mixers):
        own = kind == "attention" and number not in kinds.behind
        numbered = {f"{name}.{number}" for name in names} & places.keys() if own else ()
        found |= {PointName.of(name).as_attention(): places[name] for name in sorted(numbered)}
    return {name: place for name, place in found.items() if "." not in name or isinstance(place, Location)}


def _inside(block: Block, kinds: BranchKinds, locator: Locator) -> Found:
    """q, k, v, z and pattern; mlp_post; the router. The points of a role's second branch are numbered 1."""
    mlps = zip(block.numbered("mlp"), kinds.choices, strict=True)
    suffixes = [suffix for suffix, _ in block.numbered("mixer")]
    found: list[tuple[str, Found]] = []
    for number, (suffix, each) in enumerate(block.numbered("mixer")):
        if (before := kinds.behind.get(number)) is not None:
            reason = "this branch reads the output of another, whose attention it is: use {}"
            found.append((suffix, Found({name: reason.format(name + suffixes[before]) for name in ATTENTION})))
        elif kinds.mixers[number] == "attention":
            found.append((suffix, attention_points(Wiring(block, each, locator))))
        wiring = Wiring(block, each, locator)
        if kinds.mixers[number] == "recurrent" or (len(each.parts) > 1 and has_scan(wiring)):
            found.append((suffix, Found(scan_points(wiring))))
    found += [(n, mlp_points(Wiring(block, each, locator), choice)) for (n, each), choice in mlps]
    places = {name + suffix: place for suffix, each in found for name, place in each.places.items()}
    absent: Places = {name: reason for name, reason in _why_nothing_inside(block).items() if name not in places}
    relations = tuple(relation for suffix, each in found if not suffix for relation in each.relations)
    return Found(places | absent, relations)


def _scales(block: Block, inputs: Inputs, locator: Locator) -> Places:
    """What the norm before each branch multiplies by."""
    found: Places = {}
    for name, (_, each) in inputs.items():
        if not name.startswith("cross_attn"):
            scale = PointName.of(name).numbered(f"{PointName.of(name).branch}_norm_scale")
            is_normed = each.normed and each.value is not None
            found[scale] = scale_of(locator, each.value) if is_normed and each.value is not None else NO_NORM
    for role in ("mixer", "mlp"):
        found.setdefault(f"{role}_norm_scale", _why_no_branch(block, role))
    return found


def _why_nothing_inside(block: Block) -> dict[str, str]:
    """The reasons that hold where no branch of the right kind is there."""
    no_attention = "this block's mixer is not attention" if block.role("mixer") else _why_no_branch(block, "mixer")
    inside_mlp = dict.fromkeys(("mlp_pre", "mlp_pre_linear", "mlp_post", *ROUTER), _why_no_branch(block, "mlp"))
    return {**dict.fromkeys(ATTENTION, no_attention), **inside_mlp}
