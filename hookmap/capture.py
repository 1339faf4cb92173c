"""Prompts + selectors + engine -> rows of activations in a store, and the run that reads them back.

One batch is one `generate`: the text, the tokens and every tensor come out of the same forward passes.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from hookmap import generation as gen
from hookmap import skeleton
from hookmap.activations import Key, Sample, Sink
from hookmap.architecture_map import ArchitectureMap
from hookmap.engines.nnsight import NNsightEngine, lock_of
from hookmap.engines.observation import BatchLayout, Observer
from hookmap.errors import CaptureError, SelectionError, TokenizerError
from hookmap.points import POINTS, parse_point
from hookmap.prompts import Prompt, decode
from hookmap.selectors import Selector
from hookmap.stores import open_store
from hookmap.stores.folder import FolderWriter, write_store
from hookmap.stores.interface import Store, place_of
from hookmap.stores.manifest import Manifest, manifest_of_run
from hookmap.stores.memory import MemoryStore


@dataclass(frozen=True)
class Progress:
    """Where a run is."""

    samples_done: int
    samples: int
    tokens_done: int
    """generated so far in the current batch, for each prompt"""
    tokens: int
    """generated at most for each prompt"""


class Capture:
    """A run: its texts, its tokens, and a tensor for each point and layer, read from memory or from its folder."""

    def __init__(
        self, store: Store, selectors: Sequence[Selector], architecture_map: ArchitectureMap, manifest: Manifest
    ) -> None:
        self.store = store
        self.selectors = tuple(selectors)
        self.map = architecture_map
        self.manifest = manifest

    @property
    def samples(self) -> Sequence[Sample]:
        """One for each prompt, in their order."""
        return self.store.samples

    @property
    def texts(self) -> list[str]:
        """What was generated for each prompt, without the prompt and without special tokens."""
        return self.store.texts

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        """The token ids of each prompt and what was generated after it."""
        return self.store.tokens

    @property
    def keys(self) -> tuple[Key, ...]:
        """The (point, layer) pairs captured, in forward order."""
        return self.store.keys

    def steps(self, sample: int = 0) -> tuple[int, ...]:
        """For each row of a sample, the step that made it: 0 for the prompt's rows, n for the n-th generated token."""
        found = self.store.sample(sample)
        return (0,) * found.prompt_tokens + tuple(range(1, found.rows - found.prompt_tokens + 1))

    def __getitem__(self, where: str | tuple[str, int | None]) -> torch.Tensor | list[torch.Tensor]:
        """`run["resid_mid", 8]`: [batch, pos, d] where all samples have as many rows, else a list of [pos, d].

        `run["pattern", 8]` is [batch, heads, query, key], or a list of [heads, query, key].
        `run["blocks.8.hook_resid_mid"]` and `run["logits"]` are understood too, and negative layers count from the
        end. Raises SelectionError where it was not captured.
        """
        key = self._key(where)
        found = self.store[key]
        if "key" not in POINTS[key[0].partition(".")[0]].axes:
            return found
        if isinstance(found, list):
            return [rows[..., : len(rows)].movedim(1, 0) for rows in found]
        return found[..., : found.shape[1]].movedim(2, 1)

    def read(
        self, sample: int, point: str, layer: int | None = None, tokens: slice | Sequence[int] | None = None
    ) -> torch.Tensor:
        """Rows of one sample, [pos, d], without reading the others; of `pattern` [query, heads, key], zeros behind."""
        return self.store.read(sample, *self._key((point, layer)), tokens)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the run to a new capture folder, for `hookmap.open_store`. Raises StoreError."""
        write_store(self.store, path, self.manifest)
        return Path(path)

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        rows = sum(sample.rows for sample in self.samples)
        return f"<Capture of {len(self)} samples, {rows} rows of {len(self.keys)} tensors>"

    def _key(self, where: str | tuple[str, int | None]) -> Key:
        point, layer = place_of(where)
        parsed = parse_point(point)
        if isinstance(parsed, str):
            raise SelectionError(parsed)
        layer = parsed.layer if layer is None else layer
        if layer is not None and -self.map.num_layers <= layer < 0:
            layer += self.map.num_layers
        return parsed.point, layer


def capture(
    engine: NNsightEngine,
    architecture_map: ArchitectureMap,
    tokenizer: Any,
    name: str | None,
    prompts: tuple[Prompt, ...],
    selectors: Sequence[Selector],
    *,
    max_new_tokens: int,
    do_sample: bool,
    seed: int | None,
    stop: tuple[str, ...],
    batch_size: int,
    store: str | os.PathLike[str] | None,
    resume: bool,
    progress: Callable[[Progress], None] | None,
    generation: Mapping[str, Any],
) -> Capture:
    """See `HookedModel.capture`."""
    gen.check_count("batch_size", batch_size)
    gen.check_seed(seed)
    gen.check_stop(stop)
    if resume and store is None:
        raise CaptureError("resume=True needs the folder to go on with: give store=FOLDER.")
    _check_vocabulary(engine, prompts)
    config = gen.settings(
        engine.root, tokenizer, max_new_tokens=max_new_tokens, do_sample=do_sample, options=generation
    )
    manifest = manifest_of_run(
        [(selector.point, selector.layer) for selector in selectors],
        model=name,
        architecture=architecture_map.architecture,
        architecture_map=architecture_map.model_dump(mode="json"),
        settings=_settings(config, prompts, seed, stop, batch_size),
    )
    may_pad = gen.takes(engine.root, "attention_mask")
    groups = tuple(batches([len(prompt.token_ids) for prompt in prompts], batch_size, may_pad))
    run = _Run(engine, tokenizer, tuple(selectors), prompts, config, stop, seed, progress)
    if store is None:
        memory = MemoryStore(manifest.keys)
        run.all(groups, memory)
        return Capture(memory, selectors, architecture_map, manifest)
    with (FolderWriter.resume if resume else FolderWriter.create)(store, manifest) as writer:
        run.all(groups, writer, writer.finished)
    return Capture(open_store(store), selectors, architecture_map, manifest)


def batches(lengths: Sequence[int], size: int, may_pad: bool = True) -> Iterator[tuple[int, ...]]:
    """Numbers of the prompts that run together: neighbours; of one length, where the model has no attention mask."""
    groups: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(0 if may_pad else length, []).append(number)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield tuple(group[start : start + size])


@dataclass
class _Run:
    engine: NNsightEngine
    tokenizer: Any
    selectors: tuple[Selector, ...]
    prompts: tuple[Prompt, ...]
    config: GenerationConfig
    stop: tuple[str, ...]
    seed: int | None
    progress: Callable[[Progress], None] | None
    done: int = 0

    def all(self, groups: Sequence[Sequence[int]], sink: Sink, finished: frozenset[int] = frozenset()) -> None:
        """Each batch that is not finished yet; a batch is finished whole or not at all."""
        for numbers in groups:
            if not finished.issuperset(numbers):
                self.batch(numbers, sink)
            self.done += len(numbers)
            self._show(0)

    def batch(self, numbers: Sequence[int], sink: Sink) -> None:
        """Generate from these prompts together, and hand their rows to the sink."""
        prompts = [self.prompts[number] for number in numbers]
        layout = BatchLayout(tuple(numbers), tuple(len(prompt.token_ids) for prompt in prompts))
        longest = max(len(prompt.token_ids) for prompt in self.prompts)
        observer = Observer(self.selectors, layout, sink.write, keys=longest + self.config.max_new_tokens - 1)

        def tell(columns: int, finished: list[bool]) -> None:
            observer.sampled(columns, finished)
            self._show(columns - layout.width)

        finished = gen.Finished(self.config, self.stop, self.tokenizer, tell)
        # The seed is the first prompt's own, so that a resumed run draws what the whole run would have drawn.
        seed = None if self.seed is None else self.seed + numbers[0]
        # All of it under the lock: the training flags and torch's generators are every thread's.
        with (
            lock_of(self.engine.module),
            gen.seeded(seed, self.engine.device, draws=bool(self.config.do_sample)),
            gen.evaluating(self.engine.module),
            self._attention(),
        ):
            sequences = self._generate(observer, self._inputs(prompts, layout, finished))
        counts = observer.finish(sequences.shape[1])
        for row, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
            new = sequences[row, layout.width : layout.width + counts[row]].tolist()
            known = len(prompt.token_ids)
            text = decode(new, self.tokenizer)
            sink.finish(Sample(number, prompt.text, text, (*prompt.token_ids, *new), known, known + len(new) - 1))

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        """Eager attention while its weights are captured: the faster implementations never have them as a tensor."""
        if not any("key" in POINTS[s.point.partition(".")[0]].axes for s in self.selectors):
            yield
            return
        with skeleton.eager(self.engine.module):
            yield

    def _inputs(self, prompts: Sequence[Prompt], layout: BatchLayout, finished: gen.Finished) -> dict[str, Any]:
        pad, device = self.config.pad_token_id, self.engine.device
        pads = [layout.pads(row) for row in range(len(prompts))]
        ids = [[pad] * count + list(prompt.token_ids) for count, prompt in zip(pads, prompts, strict=True)]
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor([[0] * n + [1] * (layout.width - n) for n in pads], device=device),
            "generation_config": self.config,
            "stopping_criteria": [finished],
        }
        # transformers computes only the last logits of a prompt, unless told.
        if any(s.point == "logits" for s in self.selectors) and gen.takes(self.engine.root, "logits_to_keep"):
            inputs["logits_to_keep"] = 0
        return inputs

    def _generate(self, observer: Observer, inputs: dict[str, Any]) -> torch.Tensor:
        try:
            return self.engine.generate(observer, inputs)
        except torch.OutOfMemoryError as error:
            raise CaptureError(
                f"out of memory on {self.engine.device} with {inputs['input_ids'].shape[0]} prompts at once: "
                f"give a smaller batch_size, fewer max_new_tokens, or store=FOLDER. ({error})"
            ) from error
        except ValueError as error:  # settings that transformers looks at only now, such as temperature=0
            raise CaptureError(f"transformers does not generate with these settings: {error}") from error
        except IndexError as error:
            longest = inputs["input_ids"].shape[1] + self.config.max_new_tokens
            limit = getattr(self.engine.root.config, "max_position_embeddings", None)
            if limit is None or longest <= limit:
                raise
            raise CaptureError(
                f"{longest} tokens (prompt and max_new_tokens) do not fit into the {limit} positions of "
                f"{type(self.engine.root).__name__}: shorten the prompt, or give a smaller max_new_tokens."
            ) from error

    def _show(self, tokens_done: int) -> None:
        if self.progress is not None:
            self.progress(Progress(self.done, len(self.prompts), tokens_done, self.config.max_new_tokens))


def _check_vocabulary(engine: NNsightEngine, prompts: Sequence[Prompt]) -> None:
    size = engine.vocabulary
    for number, prompt in enumerate(prompts):
        if wrong := [token for token in prompt.token_ids if not 0 <= token < size]:
            raise TokenizerError(
                f"prompt {number} has token ids {wrong[:5]}, and the model's vocabulary is 0 to {size - 1}. "
                "The tokenizer is another model's."
            )


def _settings(
    config: GenerationConfig, prompts: Sequence[Prompt], seed: int | None, stop: tuple[str, ...], batch_size: int
) -> dict[str, Any]:
    """What decides the samples, as JSON: a run with other settings cannot go on with a folder."""
    generation = {k: v for k, v in config.to_diff_dict().items() if k != "transformers_version"}
    ids = json.dumps([prompt.token_ids for prompt in prompts]).encode()
    return {
        "generation": json.loads(json.dumps(generation, default=str)),
        "seed": seed,
        "stop": list(stop),
        "batch_size": batch_size,
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(ids).hexdigest(),
    }
