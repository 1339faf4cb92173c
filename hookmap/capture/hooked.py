"""A model that can be captured from: its module, tokenizer and map, and what a run of it needs."""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from torch import nn

from hookmap.capture.batches import Batches, batches, generation_batches, harvest_batches
from hookmap.capture.engines import Engine, nnsight_engine
from hookmap.capture.engines.hooks import HooksEngine
from hookmap.capture.estimate import Estimate, estimate
from hookmap.capture.interventions.documents import read_interventions
from hookmap.capture.interventions.plan import Plan, plan
from hookmap.capture.interventions.proofs import Proofs
from hookmap.capture.options import Progress
from hookmap.capture.padding import Pads, whole_batch_limit
from hookmap.capture.prepare import BATCH_SIZE, BATCH_TOKENS, Prepared, prepare
from hookmap.capture.result import Capture
from hookmap.capture.rows import Positions, RowSelection, matching_tokens, row_selection
from hookmap.capture.run import reads_attention, vocabulary_of
from hookmap.errors import CaptureError
from hookmap.loading.chat_template import Chat, Templating
from hookmap.loading.generation import check_count, check_names, logits_parameter
from hookmap.loading.modules import generating_root
from hookmap.loading.prompts import NO_TOKENIZER, Prompt, encode, records
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName
from hookmap.maps.selectors import Selector

Points = str | Iterable[str] | Mapping[str, Any]
"""names, or layers of its own for each: {"resid_post": [3, 8], "z": "all"}"""
Layers = str | int | Iterable[int]
EngineName = Literal["auto", "hooks", "nnsight"]


class Hooked:
    """What captures and analyses need of a model. `hookmap.open` makes the `HookedModel` that adds the analyses."""

    map: ArchitectureMap
    """where each point is in this model"""
    model: nn.Module
    """the module itself: no copy, no hooks on it"""
    tokenizer: Any
    """its tokenizer, or None where none was given with a module"""
    root: nn.Module
    """the transformers model: the module, or the one inside its wrappers (PEFT), whose `generate` runs around it"""
    hooks: HooksEngine
    """the engine of plain hooks"""
    has_weights = True
    """whether the weights are here"""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        architecture_map: ArchitectureMap,
        name: str | None = None,
        why_no_tokenizer: str = NO_TOKENIZER,
        nnsight_model: Any = None,
    ) -> None:
        """For callers there is `hookmap.open`, which also holds the map against the model. `name`: hub id or path."""
        self.map = architecture_map
        self._why_no_tokenizer = why_no_tokenizer
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.root = generating_root(model, self.has_weights)
        self._nnsight_model = nnsight_model
        self.hooks = HooksEngine(model, self.root)
        self._nnsight: Engine | None = None

    def capture(
        self,
        prompts: Any,
        points: Points = "all",
        layers: Layers = "all",
        max_new_tokens: int = 64,
        *,
        positions: Positions = "all",
        every: int = 1,
        mean: bool = False,
        features: int | Iterable[int] | None = None,
        features_seed: int = 0,
        keep_dtype: Any = None,
        overflow: str = "warn",
        do_sample: bool = False,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        chat: Chat = "auto",
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        prompt_column: str | None = None,
        batch_size: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        engine: EngineName = "auto",
        store: str | os.PathLike[str] | None = None,
        resume: bool = False,
        interventions: Any = (),
        before: bool = False,
        progress: Callable[[Progress], None] | None = None,
        **generation: Any,
    ) -> Capture:
        """Generate from `prompts` and keep `points` of `layers`, for every token that the model reads.

        With max_new_tokens=0 nothing is generated: one forward pass over the given texts (a harvest), as far into the
        model as the points need, batched by length.

        prompts: a string, chat messages or token ids, or a list of such; or a table or data set, with prompt_column.
        points, layers: see `hookmap.maps.selectors.select`; in any order; points={"resid_post": [3], "z": [8]} gives
        each point layers of its own. With `pattern`, the run is with eager attention.
        positions: of which tokens rows are kept: "all", "prompt", "generated", "last", "last_prompt", a span "4:20",
        positions (negative ones count from the end of the prompt), or "text=…": tokens whose text contains it.
        every: only positions that it divides. mean: one row a sample, the mean over its positions.
        features: indices into each row's last axis, or how many to draw with features_seed. keep_dtype: of the rows;
        the model's own unless given. overflow: where a finite number is infinite in it, "warn" stores the infinity,
        warns, and counts it in the manifest; "refuse" raises CaptureError, and of that batch nothing is kept.
        do_sample, seed: greedy unless asked. With a seed the run repeats, and the generators' states stay as they were.
        stop: strings that end a row. chat: "auto" sends messages through the chat template and reads strings as they
        are; True makes each string a user's message; False refuses messages. An assistant's last message stays as it is
        in a harvest and goes on in a generation, and behind any other the assistant's turn begins, unless
        add_generation_prompt or continue_final_message say else. chat_template_kwargs: {"enable_thinking": False}, …
        batch_size: prompts that run together, left-padded; 8 unless given. Of a harvest, batch_tokens: tokens that run
        together, pads included. The pads are in no result, and prompts of different lengths share a batch only where
        this model was shown to see no pads (`pads`). A batch that is too large for a GPU is halved.
        engine: "hooks" (PyTorch's own, the leanest), "nnsight", or "auto": hooks, unless x came as an nnsight model.
        store: a folder to stream to, with memory flat, or None for memory. resume: go on with that folder after an
        interruption; finished samples are not done again.
        interventions: what is written while it runs: interventions, documents of them, or a file; the rows kept are
        those after them. before: keep them as they were right before, too, as `.before` of what is returned;
        with a store also in the folder `before` in it, a capture of its own.
        progress: called after each step. generation: fields of transformers' GenerationConfig, such as temperature.

        Raises SelectionError, TokenizerError, StoreError, InterventionError, and CaptureError where a run did not see
        what it should or would not fit into memory.
        """
        prepared = self.prepare(
            prompts,
            points,
            layers,
            max_new_tokens,
            positions=positions,
            every=every,
            mean=mean,
            features=features,
            features_seed=features_seed,
            keep_dtype=keep_dtype,
            overflow=overflow,
            do_sample=do_sample,
            seed=seed,
            stop=stop,
            chat=chat,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
            prompt_column=prompt_column,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            engine=engine,
            interventions=interventions,
            before=before,
            progress=progress,
            **generation,
        )
        return prepared.capture(store, resume)

    def prepare(
        self,
        prompts: Any,
        points: Points = "all",
        layers: Layers = "all",
        max_new_tokens: int = 64,
        *,
        positions: Positions = "all",
        every: int = 1,
        mean: bool = False,
        features: int | Iterable[int] | None = None,
        features_seed: int = 0,
        keep_dtype: Any = None,
        overflow: str = "warn",
        do_sample: bool = False,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        chat: Chat = "auto",
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        prompt_column: str | None = None,
        batch_size: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        engine: EngineName = "auto",
        interventions: Any = (),
        before: bool = False,
        progress: Callable[[Progress], None] | None = None,
        **generation: Any,
    ) -> Prepared:
        """What `capture` of the same arguments would run, decided and checked: for who runs its batches elsewhere."""
        check_names(generation, inspect.signature(Hooked.prepare).parameters)
        how = Templating(
            chat, add_generation_prompt, continue_final_message, chat_template_kwargs, generates=bool(max_new_tokens)
        )
        encoded = self._encode(records(prompts, prompt_column), how)
        chosen = row_selection(
            positions,
            every=every,
            mean=mean,
            features=features,
            features_seed=features_seed,
            dtype=keep_dtype,
            overflow=overflow,
        )
        selectors = self.map.selectors(points, layers) if points != () else ()
        runs, why = self._engine_of(engine)
        _check_counts(max_new_tokens, batch_size, batch_tokens)
        planned = self._plan(interventions, encoded, max_new_tokens, how)
        return prepare(
            runs,
            why,
            self.map,
            self.tokenizer,
            self.name,
            encoded,
            selectors,
            chosen,
            lambda why: self._batches(encoded, selectors, max_new_tokens, batch_size, batch_tokens, why),
            lambda groups: self._size(encoded, selectors, max_new_tokens, chosen, groups),
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            progress=progress,
            generation=generation,
            plan=planned,
            before=before,
        )

    def generate(
        self,
        prompts: Any,
        interventions: Any = (),
        capture: Mapping[str, Any] | None = None,
        max_new_tokens: int = 64,
        **options: Any,
    ) -> Capture:
        """Generate from `prompts` with interventions, and keep what `capture` names: {"points": …, "layers": …, …}.

        Without a `capture` the run has texts and tokens only. `capture` takes what says which rows are kept, `options`
        everything else that `Hooked.capture` takes, which see.
        """
        if not isinstance(capture, Mapping | None):
            raise CaptureError(f'capture: expected what it keeps, {{"points": …, "layers": …}}, got {capture!r:.80}.')
        chosen = {"points": (), **(capture or {})}
        return self.capture(prompts, max_new_tokens=max_new_tokens, interventions=interventions, **chosen, **options)

    def matching(self, chosen: RowSelection) -> frozenset[int]:
        """The token ids that positions="text=…" means. Raises SelectionError."""
        return matching_tokens(chosen, self.tokenizer, self.vocabulary)

    @property
    def vocabulary(self) -> int:
        """How many token ids the model can be fed."""
        return vocabulary_of(self.hooks)

    @cached_property
    def pads(self) -> Pads:
        """What was shown about padding this model's batches: captures ask it where prompts differ in length."""
        return Pads(self.hooks, self.map, self.tokenizer)

    @property
    def why_no_pads(self) -> str | None:
        """Why prompts of different lengths must not share a generation; None where it was shown that they may."""
        return self.pads.why_not(harvest=False)

    @cached_property
    def proofs(self) -> Proofs:
        """What was shown about writing the points of this model."""
        return Proofs(self.hooks, self.map)

    def _plan(self, interventions: Any, prompts: Sequence[Prompt], max_new_tokens: int, how: Templating) -> Plan | None:
        if isinstance(interventions, Plan):
            return interventions
        found = read_interventions(interventions)
        if not found:
            return None
        check_count("max_new_tokens", max_new_tokens, least=0)
        return plan(self, found, prompts, max_new_tokens, how)

    def estimate(
        self,
        prompts: Any,
        points: Points = "all",
        layers: Layers = "all",
        max_new_tokens: int = 64,
        *,
        positions: Positions = "all",
        every: int = 1,
        mean: bool = False,
        features: int | Iterable[int] | None = None,
        features_seed: int = 0,
        keep_dtype: Any = None,
        overflow: str = "warn",
        chat: Chat = "auto",
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        prompt_column: str | None = None,
        batch_size: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> Estimate:
        """How large the capture of the same arguments gets at most. Runs nothing of it.

        Where prompts differ in length, the model is asked once whether they may share a batch: see `pads`.
        """
        chosen = row_selection(
            positions,
            every=every,
            mean=mean,
            features=features,
            features_seed=features_seed,
            dtype=keep_dtype,
            overflow=overflow,
        )
        selectors = self.map.selectors(points, layers)
        how = Templating(
            chat, add_generation_prompt, continue_final_message, chat_template_kwargs, generates=bool(max_new_tokens)
        )
        encoded = self._encode(records(prompts, prompt_column), how)
        _check_counts(max_new_tokens, batch_size, batch_tokens)
        groups, _ = self._batches(encoded, selectors, max_new_tokens, batch_size, batch_tokens)
        return self._size(encoded, selectors, max_new_tokens, chosen, groups)

    def _batches(
        self,
        prompts: Sequence[Prompt],
        selectors: Sequence[Selector],
        max_new_tokens: int,
        batch_size: int | None,
        batch_tokens: int,
        why_apart: str | None = None,
    ) -> Batches:
        """The batches of a run. `why_apart`: what of the run itself forbids pads."""
        lengths = [len(prompt.token_ids) for prompt in prompts]

        def make(may_pad: bool) -> Iterator[tuple[int, ...]]:
            if max_new_tokens:
                return generation_batches(lengths, batch_size or BATCH_SIZE, may_pad)
            return harvest_batches(lengths, batch_tokens, batch_size, may_pad)

        def why() -> str | None:
            return why_apart or self._why_apart(max(lengths) + max_new_tokens, not max_new_tokens, selectors)

        return batches(lengths, make, why)

    def _why_apart(self, longest: int, harvest: bool, selectors: Sequence[Selector]) -> str | None:
        """Why prompts of different lengths must not share a batch. `longest`: tokens of the longest, in the end."""
        limit = whole_batch_limit(self.root.config)
        if limit is not None and longest > limit:
            return f"beyond {limit} tokens its rotary positions change for a whole batch"
        return self.pads.why_not(harvest=harvest, pattern=reads_attention(selectors))

    def _size(
        self,
        prompts: Sequence[Prompt],
        selectors: Sequence[Selector],
        max_new_tokens: int,
        chosen: RowSelection,
        groups: Sequence[Sequence[int]],
    ) -> Estimate:
        lengths = [len(prompt.token_ids) for prompt in prompts]
        if selectors:
            chosen.refuse_beyond(lengths, max(0, max_new_tokens - 1))
        itemsize = next(self.root.parameters()).itemsize
        d_mlp = max((self._d_mlp(s) for s in selectors if PointName.of(s.point).base == "mlp_post"), default=None)
        every_logit = logits_parameter(self.root) is None
        return estimate(self.map, selectors, lengths, max_new_tokens, itemsize, groups, d_mlp, chosen, every_logit)

    def engine(self, name: EngineName = "auto") -> tuple[str, str]:
        """Which engine a capture takes, and why."""
        engine, why = self._engine_of(name)
        return engine.name, why

    def _engine_of(self, name: str) -> tuple[Engine, str]:
        """The engine that runs, and why that one. Raises CaptureError for a name that is none."""
        if name not in ("auto", "hooks", "nnsight"):
            raise CaptureError(f"engine: expected auto, hooks or nnsight, got {name!r}.")
        why = "as asked"
        if name == "auto":
            given = self._nnsight_model is not None
            name = "nnsight" if given else "hooks"
            why = "the model came as an nnsight model, whose edits apply" if given else "the leanest"
        if name == "hooks":
            return self.hooks, why
        if self._nnsight is None:
            self._nnsight = nnsight_engine(self.model, self.root, self._nnsight_model)
        return self._nnsight, why

    def _d_mlp(self, selector: Selector) -> int:
        """What a down projection reads: its weights are [d_mlp, d_model], or the other way round."""
        parameters = self.model.get_submodule(selector.module).parameters()
        return max((p.numel() for p in parameters), default=0) // self.map.d_model

    def encode(
        self,
        prompts: Any,
        chat: Chat = "auto",
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Prompt, ...]:
        """Prompts as the model reads them when nothing is generated; see `capture`. Raises TokenizerError."""
        how = Templating(chat, add_generation_prompt, continue_final_message, chat_template_kwargs)
        return self._encode(prompts, how)

    def _encode(self, prompts: Any, how: Templating) -> tuple[Prompt, ...]:
        return encode(prompts, self.tokenizer, how, why_none=self._why_no_tokenizer)

    def __repr__(self) -> str:
        return f"<Hooked {self.map.architecture}, {self.map.num_layers} layers, d_model {self.map.d_model}>"


def _check_counts(max_new_tokens: Any, batch_size: Any, batch_tokens: Any) -> None:
    """Raises CaptureError."""
    check_count("max_new_tokens", max_new_tokens, least=0)
    check_count("batch_size", BATCH_SIZE if batch_size is None else batch_size)
    check_count("batch_tokens", batch_tokens)
