"""The list of checks, and when they are run. A new check is one function in a file of its family, named here once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import nn

from hookmap.errors import HookmapError
from hookmap.loading.finiteness import in_words, is_stream
from hookmap.maps.document import ArchitectureMap
from hookmap.stores.ledger import tensor_name
from hookmap.verification import causes, ends, heads, inside, reads, relations, scans, scores, streams, weights
from hookmap.verification.check import Check
from hookmap.verification.context import Context, missing_modules, run_once

_Check = Callable[[Context], Iterator[Check]]
CHEAP: tuple[_Check, ...] = (
    streams.shapes,
    streams.order,
    streams.runs,
    streams.hidden_states,
    streams.embed,
    streams.logits,
    streams.hand_over,
    streams.final_norm,
    relations.stated,
    relations.sums,
    relations.second_stream,
    streams.second_names,
    inside.bare,
    inside.branches,
    heads.patterns,
    scores.scores,
    scores.activations,
    scores.scales,
    weights.results,
    weights.latents,
    weights.experts,
)
"""those that one forward pass is enough for"""
CHECKS: tuple[_Check, ...] = (
    *CHEAP,
    heads.attentions,
    heads.one_head,
    scans.scans,
    reads.reads,
    ends.ends,
    scores.preactivations,
    scores.raw_logits,
    causes.causes,
)
EACH_RUN = (
    relations.sums,
    streams.second_names,
    inside.branches,
    heads.patterns,
    scores.scores,
    scores.activations,
    weights.results,
    weights.latents,
    weights.experts,
    heads.attentions,
)
"""those that are made of each run of the layers that run several times"""
LAST_RUN = (heads.one_head, reads.reads, ends.ends)
"""those that run the model: of the first run, and of the last"""


def overflow(found: ArchitectureMap, model: nn.Module, seed: int = 0) -> Check | None:
    """The check that says where the stream is not finite in the model's own precision; None where it is."""
    if missing_modules(found, model):
        return None
    try:
        return _not_finite(run_once(found, model, seed))
    except HookmapError:
        return None  # a tensor is not where the map says: `checks_of` says so


def checks_of(found: ArchitectureMap, model: nn.Module, seed: int = 0, cheap: bool = False) -> Iterator[Check]:
    """Every check of a map on a model; `cheap`: those that one forward pass on random tokens is enough for.

    Where nothing can be compared, the one check that says why: the model lacks a module, a tensor is not where the map
    says, or the stream is not finite.
    """
    if missing := missing_modules(found, model):
        yield Check("modules", (), False, f"the model has no module {', '.join(missing)}")
        return
    try:
        run = run_once(found, model, seed)
    except HookmapError as error:
        yield Check("selectors", (), False, str(error))
        return
    if (wrong := _not_finite(run)) is not None:
        yield wrong
        return
    try:
        for check in CHEAP if cheap else CHECKS:
            yield from check(run)
        for number in range(1, max(kind.calls for kind in found.kinds)):
            yield from _of_run(run.in_run(number), cheap)
    except Exception as error:  # a wrong map's tensors fail in sums, products and hooks as each of them does
        said = str(error).partition("\n")[0]
        yield Check("fit", (), False, f"what the map names does not fit together: {said}")


def _of_run(run: Context, cheap: bool) -> Iterator[Check]:
    """The checks of a later run of the layers that run several times."""
    each_run = [check for check in EACH_RUN if check in CHEAP or not cheap]
    ending = [kind for kind in run.map.kinds if kind.calls == run.number + 1]
    for check in each_run:
        yield from (_named(each, run.number) for each in check(run))
    last = replace(run, map=run.map.model_copy(update={"kinds": tuple(ending)}))
    for check in LAST_RUN if ending and not cheap else ():
        yield from (_named(each, run.number) for each in check(last))


def _named(check: Check, number: int) -> Check:
    return replace(check, detail=f"{check.detail}, in run {number}")


def _not_finite(run: Context) -> Check | None:
    """With an infinity in the stream, each check would fail for a reason that is not its own."""
    for selector, tensor in run.every.items():
        if not is_stream(selector.point):
            continue
        bad = ~tensor.flatten(2).isfinite().all(-1)  # [batch, pos]
        if bool(bad.any()):
            said = in_words(tensor_name(selector.key), int(bad.any(0).nonzero()[0]), tensor.dtype, run.model)
            return Check("finite", () if selector.layer is None else (selector.layer,), False, said)
    return None
