"""Rows that an intervention takes from another prompt's run or from a stored capture. Each source is read once."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from pydantic import BaseModel

from hookmap.activations import Key, key_of
from hookmap.capture.interventions.documents import Source
from hookmap.capture.interventions.proofs import Proofs
from hookmap.capture.options import EngineName
from hookmap.capture.rows import RowSelection
from hookmap.errors import InterventionError
from hookmap.loading.chat_template import Templating
from hookmap.loading.prompts import Prompt
from hookmap.maps.calls import paired_runs
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.selectors import Selector
from hookmap.stores import open_store
from hookmap.stores.interface import Store


class Editable(Protocol):
    """What interventions need of an opened model."""

    @property
    def map(self) -> ArchitectureMap: ...
    @property
    def proofs(self) -> Proofs: ...

    def encode_as(self, prompts: Any, how: Templating) -> tuple[Prompt, ...]:
        """The prompts as the model reads them. Raises TokenizerError."""

    def selectors(self, points: Any, layers: Any, calls: Any) -> tuple[Selector, ...]:
        """See `Hooked.selectors`."""

    def matching(self, chosen: RowSelection) -> frozenset[int]:
        """The token ids that positions="text=…" means."""

    def capture(self, prompts: Any, points: Any, layers: Any, max_new_tokens: int, *, engine: EngineName) -> Any:
        """See `Hooked.capture`."""


class Sources:
    """Reads the sources of one plan."""

    def __init__(self, hm: "Editable", how: Templating, engine: EngineName) -> None:
        """`how`: whether prompts go through the chat template, as for the prompts of the run; `engine`: the run's."""
        self._hm, self._how, self._engine = hm, how, engine
        self._stores: dict[str, Store] = {}
        self._runs: dict[tuple[str, Key], Store] = {}

    def read(self, source: Source, key: Key, positions: RowSelection, matching: frozenset[int]) -> torch.Tensor:
        """The rows [n, ...] of a tensor at these positions, in the order asked for. They are on the CPU.

        Raises InterventionError, StoreError or SelectionError.
        """
        number = 0 if source.store is None else source.sample
        store = self._run(source, key) if source.store is None else self._store(source.store)
        sample = store.sample(number)
        rows = store.read(number, *key)
        if sample.positions == "mean":
            return rows
        held = sample.row_positions
        row_of = {position: row for row, position in enumerate(held)}
        wanted = positions.places(sample.token_ids, sample.prompt_tokens, matching, sample.image_positions or ())
        chosen = [row_of[position] for position in wanted if position in row_of]
        if positions.positions == "last":
            chosen = chosen[-1:]
        if not chosen or len(chosen) < len(positions.singles):
            asked = f"positions {', '.join(map(str, positions.singles))}" if positions.singles else "these positions"
            raise InterventionError(
                f"the source has no row at {'each of ' if chosen else ''}{asked}: it holds {_few(held)} of a prompt of "
                f"{sample.prompt_tokens} tokens."
            )
        return rows[chosen]

    def _store(self, path: str) -> Store:
        if path not in self._stores:
            store = open_store(path)
            architecture = store.manifest.architecture
            if architecture not in (None, self._hm.map.architecture):
                raise InterventionError(
                    f"{path} was captured from a {architecture}, and this is a {self._hm.map.architecture}."
                )
            self._stores[path] = store
        return self._stores[path]

    def _run(self, source: Source, wanted: Key) -> Store:
        key = (repr(source.prompt), wanted)
        if key not in self._runs:
            given: Any = source.prompt
            prompt = list(given) if isinstance(given, tuple) else given
            if isinstance(given, BaseModel):
                prompt = given.model_dump(mode="json", exclude_none=True)
            # All layers at once, because an intervention on several would read the prompt once for each.
            points, layers = [wanted[0]], "all"
            encoded = self._hm.encode_as(prompt, self._how)
            run = self._hm.capture(encoded, points, layers, max_new_tokens=0, engine=self._engine)
            self._runs |= {(key[0], held): run.store for held in run.keys}
        return self._runs[key]


def key_in_source(m: ArchitectureMap, selector: Selector, into: Any, out_of: Any) -> Key:
    """The tensor whose rows are written at this selector, one of the runs `into`: `out_of` has the run paired with it.

    Raises SelectionError where the runs do not pair.
    """
    point, layer = selector.point, selector.layer
    if layer is None:
        return selector.key
    run = paired_runs(m, layer, into, out_of)[selector.call or 0]
    return key_of(point, layer, None if selector.call is None else run)


def rows_of_heads(
    rows: torch.Tensor, selector: Selector, row: tuple[int, ...], heads: tuple[int, ...] | None
) -> torch.Tensor:
    """The heads of a source's rows. Raises InterventionError where the rows have another shape than `row`."""
    found = tuple(rows.shape[1:])
    if selector.has_keys:  # as many as each text has tokens
        found, row = (*found[:-1], 0), (*row[:-1], 0)
    if found != row and (heads is None or found[1:] != row[1:] or max(heads) >= found[0]):
        raise InterventionError(f"the source's rows of {selector.point} are {list(found)}: expected {list(row)}.")
    return rows if heads is None else rows[:, list(heads)]


def _few(positions: Sequence[int]) -> str:
    shown = ", ".join(map(str, positions[:8]))
    return f"positions {shown}{', …' if len(positions) > 8 else ''}"
