"""Maximally activating examples of a capture that is stored: the model does not run again."""

from collections.abc import Callable
from typing import Any

from hookmap.analysis.examples.collecting import Collector
from hookmap.analysis.examples.features import Features, refuse_featureless
from hookmap.analysis.examples.result import Examples, Settings
from hookmap.analysis.reductions.run import held, replay
from hookmap.capture.options import Layers, Points
from hookmap.capture.rows import without_features
from hookmap.errors import SelectionError
from hookmap.stores.interface import Store
from hookmap.stores.manifest import versions


def examples_of_store(
    source: Store,
    points: Points,
    layers: Layers,
    features: Features,
    settings: Settings,
    text: Callable[[int], str],
    about: dict[str, Any],
) -> Examples:
    """The examples that a run over the same texts would have given. Raises SelectionError and StoreError."""
    keys = held(source, points, layers)
    refuse_featureless(without_features(key[0] for key in keys))
    if not len(source):
        raise SelectionError("this capture has no finished sample. Finish it first: hookmap capture … --resume -o DIR")
    if some := next((sample for sample in source.samples if sample.positions is not None), None):
        raise SelectionError(
            f"sample {some.sample} of this capture lacks rows of some of its tokens, and examples show what stands "
            "around each: capture all positions."
        )
    found = Examples(features, settings, keys, {**about, "versions": versions()})
    found.text = text
    replay(source, keys, Collector(found, source.sample))
    found.complete = True
    return found
