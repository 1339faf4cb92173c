"""`HookedModel.examples`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from hookmap.analysis.dictionaries.loading import as_dictionary
from hookmap.analysis.examples.choices import INDICES, WEIGHTS, Choices, keys_of_choices
from hookmap.analysis.examples.collecting import Collector
from hookmap.analysis.examples.features import features_of, refuse_featureless
from hookmap.analysis.examples.files import EXAMPLES
from hookmap.analysis.examples.result import Examples, Settings
from hookmap.analysis.examples.stored import examples_of_store
from hookmap.analysis.gathering import refuse_other_rows
from hookmap.analysis.kept import Kept
from hookmap.analysis.tokens import token_text
from hookmap.capture.options import Layers, Points
from hookmap.capture.prepare import say_apart
from hookmap.capture.rows import NUMBERS
from hookmap.errors import SelectionError
from hookmap.loading.generation import check_count
from hookmap.maps.points import PointName
from hookmap.stores.interface import Store
from hookmap.stores.manifest import versions

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked


def examples(
    hm: Hooked | None,
    prompts: Any,
    points: Points | None = None,
    layers: Layers = "all",
    max_new_tokens: int = 0,
    *,
    features: int | Sequence[int] | str | None = None,
    norms: bool = False,
    directions: Any = None,
    dictionary: Any = None,
    choices: bool = False,
    k: int = 20,
    random: int = 20,
    context: tuple[int, int] = (24, 8),
    skip: int = 1,
    positive: bool | None = None,
    examples_seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **options: Any,
) -> Examples:
    """See `HookedModel.examples`; `hm` may be None where prompts is a store: then tokens are shown by their ids."""
    learned = None if dictionary is None else as_dictionary(dictionary)
    chosen = features_of(features, norms, directions, learned)
    stored = prompts if isinstance(prompts, Store) else getattr(prompts, "store", None)
    if choices and (norms or learned or chosen.directions or stored is not None or points is not None):
        raise SelectionError("choices are of a router that runs: leave points, norms, directions and dictionary out.")
    if positive is None:
        positive = learned is not None or choices
    settings = _settings(k, random, context, skip, positive, examples_seed)
    text = str if hm is None else cache(partial(token_text, hm))
    if isinstance(stored, Store):
        if options or max_new_tokens or store is not None or resume:
            raise SelectionError("a capture has its rows already: leave out what a run takes, and store=.")
        if points is None:
            points = "all"
        return examples_of_store(stored, points, layers, chosen, settings, text, _about(prompts))
    if hm is None:
        raise SelectionError("texts need a model that reads them: hookmap.open(MODEL).examples(texts, …)")
    if choices:
        points = (INDICES, WEIGHTS)
    elif points is None:
        points = {learned.reads[0]: "all" if learned.reads[1] is None else learned.reads[1]} if learned else "mlp_post"
    if options.get("dictionaries"):
        raise SelectionError("dictionaries: examples of features are of one at a time, dictionary=…")
    refuse_other_rows(options, "examples look at every row")
    prepared = hm.prepare(prompts, points, layers, max_new_tokens, **options)
    run = prepared.run
    if not choices:
        refuse_featureless(s.point for s in run.selectors if PointName.of(s.point).base in NUMBERS or s.has_keys)
    say_apart(prepared.apart)
    about: dict[str, Any] = {"model": prepared.manifest.model, "architecture": prepared.manifest.architecture}
    about |= {"settings": prepared.manifest.settings, "versions": versions()}
    keys = tuple(selector.key for selector in run.selectors)
    found = Examples(chosen, settings, keys_of_choices(keys) if choices else keys, about)
    found.text = text
    kept = Kept(found, EXAMPLES, store, resume)
    kept.result.text = text
    there = kept.result.samples.copy()
    known = None
    if not run.max_new_tokens:
        known = {n: run.expected(n) for n in range(len(run.prompts)) if n not in there}.__getitem__
    collector = Collector(kept.result, known, kept.now_and_then)
    experts = max(((kind.mlp.experts if kind.mlp else 0) or 0 for kind in prepared.map.kinds), default=0)
    prepared.into(Choices(collector, experts) if choices else collector, there)
    return kept.end(len(run.prompts))


def _about(source: Any) -> dict[str, Any]:
    """Of which run a capture is."""
    manifest = getattr(source, "manifest", None)
    return {name: getattr(manifest, name, None) for name in ("model", "architecture")}


def _settings(k: Any, random: Any, context: Any, skip: Any, positive: bool, seed: int) -> Settings:
    check_count("k", k)
    check_count("random", random, least=0)
    check_count("skip", skip, least=0)
    if not isinstance(context, tuple | list) or len(context) != 2:
        raise SelectionError(f"context: expected tokens before and after, such as (24, 8), got {context!r}.")
    for number in context:
        check_count("context", number, least=0)
    before, after = context
    return Settings(k, random, before, after, skip, bool(positive), int(seed))
