"""The list of checks, and when they are run. A new check is one function in a file of its family, named here once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from hookmap.errors import HookmapError
from hookmap.loading.finiteness import in_words, is_stream
from hookmap.maps.document import ArchitectureMap
from hookmap.stores.ledger import tensor_name
from hookmap.verification import causes, heads, inside, reads, relations, streams
from hookmap.verification.check import Check
from hookmap.verification.context import Context, missing_modules, run_once

CHECKS: tuple[Callable[[Context], Iterator[Check]], ...] = (
    streams.shapes,
    streams.order,
    streams.hidden_states,
    streams.embed,
    streams.logits,
    streams.hand_over,
    streams.final_norm,
    relations.sums,
    streams.second_names,
    inside.bare,
    inside.branches,
    heads.patterns,
    heads.attentions,
    heads.one_head,
    reads.reads,
    causes.causes,
)


def checks_of(found: ArchitectureMap, model: nn.Module, seed: int = 0) -> Iterator[Check]:
    """Every check of a map on a model.

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
        for check in CHECKS:
            yield from check(run)
    except Exception as error:  # a wrong map's tensors fail in sums, products and hooks as each of them does
        said = str(error).partition("\n")[0]
        yield Check("fit", (), False, f"what the map names does not fit together: {said}")


def _not_finite(run: Context) -> Check | None:
    """With an infinity in the stream, each check would fail for a reason that is not its own."""
    for key in ((selector.point, selector.layer) for selector in run.selectors):
        if key not in run.values or not is_stream(key[0]):
            continue
        bad = ~run.values[key].flatten(2).isfinite().all(-1)  # [batch, pos]
        if bool(bad.any()):
            said = in_words(tensor_name(key), int(bad.any(0).nonzero()[0]), run.values[key].dtype, run.model)
            return Check("finite", () if key[1] is None else (key[1],), False, said)
    return None
