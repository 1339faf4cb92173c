"""`HookedModel.train_dictionary`: rows from a model that runs, or from a store, to a dictionary and its files.

Rows fill a buffer, which is shuffled and learnt as a whole: no row is on disk. Between two buffers a run is its weights
and a list of what was read, and that is what is written now and then: a run that was killed goes on from there, and
gives the numbers of one that nothing disturbed.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from hookmap.activations import Activation, Key, Sample, call_of
from hookmap.analysis.dictionaries.dictionary import About, Dictionary
from hookmap.analysis.dictionaries.loading import CONFIG
from hookmap.analysis.dictionaries.saving import save_dictionary
from hookmap.analysis.dictionaries.trainer import KINDS, Learning, Progressed, Trainer, blocks
from hookmap.analysis.gathering import Gathering, refuse_other_rows
from hookmap.analysis.kept import Kept
from hookmap.analysis.kept import Kind as KeptKind
from hookmap.capture.prepare import Prepared, say_apart
from hookmap.capture.rows import NUMBERS
from hookmap.documents import Frozen
from hookmap.errors import SelectionError, StoreError
from hookmap.maps.points import FEATURES, PointName
from hookmap.stores.interface import Store
from hookmap.stores.ledger import tensor_name
from hookmap.stores.location import local
from hookmap.stores.manifest import versions
from hookmap.stores.number_set import NumberSet
from hookmap.stores.reader import CaptureStore

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

log = logging.getLogger("hookmap")

FORMAT: Final = "hookmap-dictionary-training"
BUFFER_ROWS = 2**16
Tell = Callable[[Progressed], None]


@dataclass
class Training:
    """A training, finished or not."""

    learning: Learning
    about: About
    source: Mapping[str, Any]
    """what the rows are of, as plain data"""
    trainer: Trainer | None = None
    """None before the first rows"""
    log: list[Progressed] = field(default_factory=list)
    """an entry for each buffer of rows"""
    passes: int = 0
    """finished ones over all texts"""
    samples: NumberSet = field(default_factory=NumberSet)
    """those learnt in the running pass"""
    batches: int = 0
    """of a store, the same in batches"""
    complete: bool = False

    @property
    def dictionary(self) -> Dictionary:
        """What was learnt so far. Raises SelectionError before the first rows."""
        if self.trainer is None:
            raise SelectionError("nothing was learnt yet.")
        return self.trainer.dictionary(self.about)

    def identity(self) -> dict[str, Any]:
        """What a run has to have in common with it to go on with it."""
        return {**asdict(self.learning), **self.source}

    def learn(self, rows: torch.Tensor, tell: Tell | None) -> None:
        """Learn a buffer of rows."""
        good = rows.isfinite().all(1)
        if not bool(good.all()):
            log.warning("%d rows are not finite: they are left out.", int((~good).sum()))
            rows = rows[good]
        if not len(rows):
            return
        if self.trainer is None:
            self.trainer = Trainer(self.learning, rows)
        self.log.append(self.trainer.learn(rows))
        if tell is not None:
            tell(self.log[-1])

    def __repr__(self) -> str:
        rows = self.trainer.seen if self.trainer else 0
        last = f", explains {self.log[-1].explained_variance:.1%} with L0 {self.log[-1].l0:.1f}" if self.log else ""
        return f"<Training of {self.learning.features} features: {rows} of {self.learning.rows} rows{last}>"


class _Document(Frozen):
    """The metadata of the file."""

    format: Literal["hookmap-dictionary-training"] = FORMAT
    format_version: Literal[1] = 1
    learning: dict[str, Any]
    about: dict[str, Any]
    source: dict[str, Any]
    log: list[dict[str, float]]
    passes: int
    batches: int
    samples: tuple[tuple[int, int], ...]
    complete: bool


def _written(training: Training) -> tuple[_Document, dict[str, torch.Tensor]]:
    document = _Document(
        learning=asdict(training.learning),
        about=asdict(training.about),
        source=dict(training.source),
        log=[asdict(each) for each in training.log],
        passes=training.passes,
        batches=training.batches,
        samples=tuple(training.samples.ranges()),
        complete=training.complete,
    )
    state = {} if training.trainer is None else training.trainer.state
    return document, {name: each.clone() for name, each in state.items()}


def _read(document: _Document, state: dict[str, torch.Tensor]) -> Training:
    learning = Learning(**document.learning)
    trainer = Trainer(learning, state=state) if state else None
    told = [Progressed(**each) for each in document.log]  # type: ignore[arg-type]
    return Training(
        learning, About(**document.about), document.source, trainer, told, document.passes,
        NumberSet.of_ranges(document.samples), document.batches, document.complete,
    )  # fmt: skip


TRAINING = KeptKind(
    "training.safetensors", "trainings of dictionaries", "hookmap dictionary train", _Document, _written, _read
)


@dataclass(frozen=True)
class _Asked:
    """What a user gave, checked."""

    kind: Any
    features: int | None
    k: int
    passes: int
    batch: int
    rate: float | None
    buffer: int
    silent: int
    skip: int
    seed: int

    def __post_init__(self) -> None:
        """Raises SelectionError with all that is wrong."""
        wrong = [
            f"{name}: expected a whole number of at least {least}, got {value!r}"
            for name, least in (("k", 1), ("passes", 1), ("batch", 1), ("buffer", 1), ("silent", 1), ("skip", 0))
            if not _whole(value := getattr(self, name), least)
        ]
        if self.kind not in KINDS:
            wrong.append(f"kind: expected {' or '.join(KINDS)}, got {self.kind!r}")
        if self.features is not None and not _whole(self.features, 1):
            wrong.append(f"features: expected a whole number of at least 1, got {self.features!r}")
        if self.rate is not None and not (isinstance(self.rate, int | float) and 0 < self.rate < 1):
            wrong.append(f"learning_rate: expected a number from 0 to 1, got {self.rate!r}")
        if not wrong and self.features is not None and self.features < self.k:
            wrong.append(f"k: expected {self.features}, the number of features, at most, got {self.k}")
        if wrong:
            raise SelectionError("no training: " + "; ".join(wrong) + ".")

    def learning(self, rows: int, width: int) -> Learning:
        """`rows`: that one pass has; `width`: of a row. Raises SelectionError where there are none."""
        if rows < 2:
            raise SelectionError(f"no training: the texts have {rows} rows behind their first {self.skip} tokens.")
        features = 8 * width if self.features is None else self.features
        if features < self.k:
            raise SelectionError(f"no training: k is {self.k}, and there are {features} features.")
        rate = 2e-4 * (2**14 / features) ** 0.5 if self.rate is None else float(self.rate)
        return Learning(self.kind, features, self.k, rows * self.passes, self.batch, rate, self.silent, int(self.seed))


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def train_dictionary(
    hm: Hooked | None,
    texts: Any,
    point: str = "resid_post",
    layer: int | None = None,
    *,
    kind: str = "topk",
    features: int | None = None,
    k: int = 32,
    passes: int = 1,
    batch_rows: int = 1024,
    learning_rate: float | None = None,
    buffer_rows: int = BUFFER_ROWS,
    silent_rows: int = 10**6,
    skip: int = 1,
    training_seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    resume: bool = False,
    tell: Tell | None = None,
    **options: Any,
) -> Training:
    """See `HookedModel.train_dictionary`; `hm` may be None where texts is a store."""
    asked = _Asked(kind, features, k, passes, batch_rows, learning_rate, buffer_rows, silent_rows, skip, training_seed)
    if store is not None and (local(store) / CONFIG).exists():
        raise StoreError(f"{store} already holds a dictionary. Write to another folder: -o DIR")
    if isinstance(texts, Store) or isinstance(getattr(texts, "store", None), Store):
        given = texts if isinstance(texts, Store) else texts.store
        if options:
            raise SelectionError(f"{', '.join(options)}: a store has its rows already: leave these out.")
        training, feed = _of_store(given, point, layer, asked)
    elif hm is None:
        raise SelectionError("texts need a model that reads them: hookmap.open(MODEL).train_dictionary(texts, …)")
    else:
        training, feed = _of_model(hm, texts, point, layer, asked, options)
    kept = Kept(training, TRAINING, store, resume)
    training = kept.result
    while training.passes < passes:
        feed(training, tell, kept.now_and_then)
        training.passes, training.samples, training.batches = training.passes + 1, NumberSet(), 0
    training.complete = True
    if store is not None:
        save_dictionary(training.dictionary, store)
        (local(store) / TRAINING.file).unlink(missing_ok=True)  # what it was needed for is done
    return training


Feed = Callable[[Training, Tell | None, Callable[[], None]], None]
"""one pass: learns its rows, and calls the last argument where it could go on from"""


def _of_model(
    hm: Hooked, texts: Any, point: str, layer: int | None, asked: _Asked, options: dict[str, Any]
) -> tuple[Training, Feed]:
    refuse_other_rows(options, "a training reads every row of the texts", "dictionaries", "max_new_tokens")
    prepared = hm.prepare(texts, {point: "all" if layer is None else layer}, max_new_tokens=0, **options)
    if len(prepared.run.selectors) != 1:
        names = ", ".join(tensor_name(each.key) for each in prepared.run.selectors)
        raise SelectionError(f"a dictionary is of one tensor, and {point} is {names}: name the layer (and calls).")
    (selector,) = prepared.run.selectors
    if PointName.of(selector.point).base in NUMBERS or selector.has_keys:
        raise SelectionError(f"{tensor_name(selector.key)}: its rows are no vectors to be explained.")
    say_apart(prepared.apart)
    prompts = prepared.run.prompts
    rows = sum(max(0, len(prompt.token_ids) - asked.skip) for prompt in prompts)
    bos = getattr(hm.tokenizer, "bos_token_id", None)
    about = About(
        selector.key[0],
        selector.key[1],
        model=hm.name,
        prepend_bos=None if bos is None else all(prompt.token_ids[:1] == (bos,) for prompt in prompts),
        context=max(len(prompt.token_ids) for prompt in prompts),
        skip=asked.skip,
        program="hookmap",
        kind=asked.kind,
    )
    source = {**_source(selector.key, asked), "settings": prepared.manifest.settings}
    training = Training(asked.learning(rows, _width_of(hm, prepared)), about, source)

    def feed(training: Training, tell: Tell | None, after: Callable[[], None]) -> None:
        run, groups = prepared.run, list(prepared.groups)
        random.Random(f"{asked.seed} {training.passes}").shuffle(groups)
        known = {n: run.expected(n) for n in range(len(prompts)) if n not in training.samples}.__getitem__
        feeding = _Feeding(selector.key, training, asked, known, tell, after)
        replace(prepared, groups=tuple(groups)).into(feeding, training.samples.copy())
        feeding.flush()

    return training, feed


def _width_of(hm: Hooked, prepared: Prepared) -> int:
    """Numbers of a row of the one tensor that is read, by reading a text."""
    (selector,), shortest = prepared.run.selectors, min(prepared.run.prompts, key=lambda each: len(each.token_ids))
    point, layer = selector.key[:2]
    own = hm.capture(
        shortest, {point: "all" if layer is None else layer}, max_new_tokens=0, calls=call_of(selector.key) or 0
    )
    return own.read(0, *selector.key).flatten(1).shape[1]


def _source(key: Key, asked: _Asked) -> dict[str, Any]:
    return {
        "tensor": tensor_name(key),
        "passes": asked.passes,
        "buffer_rows": asked.buffer,
        "skip": asked.skip,
        "versions": versions(),
    }


class _Feeding(Gathering):
    """Takes the rows of batches, and has a buffer of them learnt when it is full."""

    def __init__(
        self,
        key: Key,
        training: Training,
        asked: _Asked,
        known: Callable[[int], Sample],
        tell: Tell | None,
        after: Callable[[], None],
    ) -> None:
        super().__init__((key,), training.samples, known, self._full)
        self._training, self._asked, self._tell, self._then = training, asked, tell, after
        self._batch: list[torch.Tensor] = []
        self._buffer: list[torch.Tensor] = []
        self._numbers: list[int] = []

    def take(self, key: Key, rows: torch.Tensor, pieces: list[Activation]) -> None:
        places = torch.cat([torch.arange(piece.start, piece.start + len(piece.tensor)) for piece in pieces])
        self._batch.append(rows.flatten(1)[(places >= self._asked.skip).to(rows.device)])

    def commit(self, samples: Mapping[int, Sample]) -> None:
        self._buffer += self._batch
        self._numbers += samples
        self.forget()

    def forget(self) -> None:
        self._batch = []

    def _full(self) -> None:
        if sum(map(len, self._buffer)) >= self._asked.buffer:
            self.flush()

    def flush(self) -> None:
        """Learn what is in the buffer."""
        if self._buffer:
            self._training.learn(torch.cat(self._buffer), self._tell)
        self._training.samples.update(self._numbers)
        self._buffer, self._numbers = [], []
        self._then()


def _of_store(store: Store, point: str, layer: int | None, asked: _Asked) -> tuple[Training, Feed]:
    if not isinstance(store, CaptureStore):
        raise SelectionError("a training reads a capture on disk: save this one, run.save(DIR), and open that.")
    keys = store.keys_of(point, layer)
    if len(keys) != 1:
        raise SelectionError(f"a dictionary is of one tensor, and {point} is {len(keys)} here: name the layer.")
    (key,) = keys
    if PointName.of(key[0]).base in (*NUMBERS, FEATURES) or "key" in PointName.of(key[0]).definition.axes:
        raise SelectionError(f"{tensor_name(key)}: its rows are no vectors to be explained.")
    if any(sample.positions == "mean" for sample in store.samples):
        raise SelectionError(f"{store.path} holds means over positions: a dictionary is trained on rows of tokens.")
    rows = sum(sum(place >= asked.skip for place in sample.row_positions) for sample in store.samples)
    width = store.manifest.specs[key].shape if key in store.manifest.specs else (0,)
    context = max((len(sample.token_ids) for sample in store.samples), default=None)
    about = About(
        *key[:2], model=store.manifest.model, context=context, skip=asked.skip, program="hookmap", kind=asked.kind
    )
    source = {**_source(key, asked), "settings": store.manifest.settings, "samples": len(store)}
    training = Training(asked.learning(rows, int(torch.Size(width).numel())), about, source)

    def feed(training: Training, tell: Tell | None, after: Callable[[], None]) -> None:
        dataset = store.dataset(
            key[0], key[1], batch_size=asked.batch, shuffle_rows=asked.buffer, seed=asked.seed, where=True
        )
        dataset.set_epoch(training.passes, training.batches)
        read = [training.batches]

        def pieces() -> Iterator[torch.Tensor]:
            for batch in dataset:
                read[0] += 1
                yield batch[tensor_name(key)].flatten(1)[batch["position"] >= asked.skip]

        for block in blocks(pieces(), asked.buffer):
            training.learn(block, tell)
            training.batches = read[0]
            after()

    return training, feed
