"""`HookedModel.examples`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from hookmap.analysis.dictionaries.loading import as_dictionary
from hookmap.analysis.examples.collecting import Collector
from hookmap.analysis.examples.features import features_of
from hookmap.analysis.examples.files import EXAMPLES
from hookmap.analysis.examples.result import Examples, Settings
from hookmap.analysis.gathering import refuse_other_rows
from hookmap.analysis.kept import Kept
from hookmap.analysis.tokens import token_text
from hookmap.capture.options import Layers, Points
from hookmap.capture.prepare import say_apart
from hookmap.capture.rows import NUMBERS
from hookmap.errors import SelectionError
from hookmap.loading.generation import check_count
from hookmap.maps.points import PointName
from hookmap.stores.manifest import versions

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked


def examples(
    hm: Hooked,
    prompts: Any,
    points: Points | None = None,
    layers: Layers = "all",
    max_new_tokens: int = 0,
    *,
    features: int | Sequence[int] | str | None = None,
    norms: bool = False,
    directions: Any = None,
    dictionary: Any = None,
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
    """See `HookedModel.examples`."""
    learned = None if dictionary is None else as_dictionary(dictionary)
    chosen = features_of(features, norms, directions, learned)
    positive = learned is not None if positive is None else positive
    settings = _settings(k, random, context, skip, positive, examples_seed)
    if points is None:
        points = {learned.reads[0]: "all" if learned.reads[1] is None else learned.reads[1]} if learned else "mlp_post"
    if options.get("dictionaries"):
        raise SelectionError("dictionaries: examples of features are of one at a time, dictionary=…")
    refuse_other_rows(options, "examples look at every row")
    prepared = hm.prepare(prompts, points, layers, max_new_tokens, **options)
    run = prepared.run
    if numbers := dict.fromkeys(s.point for s in run.selectors if PointName.of(s.point).base in NUMBERS or s.has_keys):
        raise SelectionError(f"{', '.join(numbers)}: a row of it has no features to look for.")
    say_apart(prepared.apart)
    about: dict[str, Any] = {"model": prepared.manifest.model, "architecture": prepared.manifest.architecture}
    about |= {"settings": prepared.manifest.settings, "versions": versions()}
    found = Examples(chosen, settings, tuple(selector.key for selector in run.selectors), about)
    found.text = cache(lambda token: token_text(hm, token))
    kept = Kept(found, EXAMPLES, store, resume)
    kept.result.text = found.text
    there = kept.result.samples.copy()
    known = None
    if not run.max_new_tokens:
        known = {n: run.expected(n) for n in range(len(run.prompts)) if n not in there}.__getitem__
    prepared.into(Collector(kept.result, known, kept.now_and_then), there)
    return kept.end(len(run.prompts))


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
