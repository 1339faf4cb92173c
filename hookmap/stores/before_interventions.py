"""A second capture folder inside the first: the same rows as they were right before interventions.

The two grow side by side, each with its own ledger, so a kill may leave one a batch ahead of the other. A run that goes
on does again what either lacks, and each takes what it lacks.
"""

from collections.abc import Set
from pathlib import Path
from typing import Any

from hookmap.activations import Activation, Sample, Sink
from hookmap.stores.folder import FolderWriter
from hookmap.stores.manifest import MANIFEST, Manifest

BEFORE = "before"
"""the name of that folder"""


class Lacking:
    """A sink that passes on only the samples that its folder lacks: a batch always runs as a whole."""

    def __init__(self, writer: Sink, held: Set[int]) -> None:
        self._writer, self._held = writer, held

    def write(self, activation: Activation) -> None:
        if activation.sample not in self._held:
            self._writer.write(activation)

    def finish(self, sample: Sample) -> None:
        if sample.sample not in self._held:
            self._writer.finish(sample)

    def abandon(self) -> None:
        self._writer.abandon()


def before_writer(store: Any, manifest: Manifest) -> FolderWriter:
    """The writer of the folder inside `store`: new, or resumed where an earlier run began it. Raises StoreError."""
    folder = Path(store) / BEFORE
    manifest = manifest.model_copy(update={"settings": {**manifest.settings, "before": "these rows"}})
    return (FolderWriter.resume if (folder / MANIFEST).exists() else FolderWriter.create)(folder, manifest)
