"""A model to capture from: its module, tokenizer, map and engines."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self, Unpack

from torch import nn

from hookmap.capture.batches import Batches, Generating, Harvesting
from hookmap.capture.engines import Engine, nnsight_engine
from hookmap.capture.engines.hooks import HooksEngine
from hookmap.capture.estimate import Estimate, estimate
from hookmap.capture.features import Dictionary, dictionaries_of, in_forward_order, placed, without_features
from hookmap.capture.interventions.documents import Intervention, read_interventions
from hookmap.capture.interventions.plan import EditPlan, plan_edits
from hookmap.capture.interventions.proofs import Proofs
from hookmap.capture.options import (
    BATCH_SIZE,
    CaptureOptions,
    EngineName,
    EstimateOptions,
    Layers,
    Points,
    RowOptions,
    RunOptions,
    TemplateOptions,
    of_kind,
    options_of,
    takes,
    with_defaults,
)
from hookmap.capture.padding import Pads, whole_batch_limit
from hookmap.capture.places import Places
from hookmap.capture.prepare import Prepared, manifest_of, run_of
from hookmap.capture.request import Request
from hookmap.capture.result import Capture
from hookmap.capture.rows import RowSelection, matching_tokens, row_selection
from hookmap.capture.run import reads_attention, vocabulary_of
from hookmap.errors import CaptureError
from hookmap.loading.chat_template import Chat, Templating
from hookmap.loading.encoder_decoder import is_encoder_decoder
from hookmap.loading.encoder_prompts import encode_apart
from hookmap.loading.generation import check_count, check_names, logits_parameter
from hookmap.loading.image_reader import ImageReader
from hookmap.loading.modules import model_root
from hookmap.loading.prompts import NO_TOKENIZER, Prompt, encode, records
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName
from hookmap.maps.selectors import Selector


class Hooked:
    """A model as captures and analyses need it. `HookedModel`, which `hookmap.open` returns, adds the analyses."""

    map: ArchitectureMap
    """where each point is in this model"""
    model: nn.Module
    """the module itself: no copy, no hooks on it"""
    tokenizer: Any
    """the tokenizer; None where a module was opened without one"""
    root: nn.Module
    """the transformers model: the module, or the one inside its wrappers (PEFT)"""
    hooks: HooksEngine
    """the engine that uses plain hooks"""
    has_weights = True
    """whether the weights are on this machine"""
    kinds: tuple[type[Generating], type[Harvesting]] = (Generating, Harvesting)
    """how it runs: generating, or reading given texts"""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        architecture_map: ArchitectureMap,
        name: str | None = None,
        why_no_tokenizer: str = NO_TOKENIZER,
        nnsight_model: Any = None,
        processor: Callable[[], Any] | None = None,
    ) -> None:
        """Use `hookmap.open`, which also checks the map against the model.

        `name`: hub id or path; `processor`: loads what makes inputs of texts and images.
        """
        self.map = architecture_map
        self._why_no_tokenizer = why_no_tokenizer
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.root = model_root(model, self.has_weights)
        self._nnsight_model = nnsight_model
        self.hooks = HooksEngine(model, self.root)
        self._nnsight: Engine | None = None
        self.reader = ImageReader(processor, self.root)
        """makes prompts with images"""
        self._standing: tuple[Hooked, tuple[Intervention, ...]] | None = None
        """of a view: the model that it is of, and its interventions"""

    @takes(CaptureOptions)
    def capture(
        self,
        prompts: Any,
        points: Points = "all",
        layers: Layers = "all",
        max_new_tokens: int = 64,
        **options: Unpack[CaptureOptions],
    ) -> Capture:
        """Generate from `prompts` and store `points` of `layers`, for every token that the model reads.

        With max_new_tokens=0 nothing is generated: one forward pass over the given texts (a harvest), which ends at
        the last layer that the points need, in batches of about one length.

        prompts: a string, chat messages or token ids, or a list of such; or a table or data set, with prompt_column.
        points, layers: see `hookmap.maps.selectors.select`; in any order; points={"resid_post": [3], "z": [8]} gives
        each point its own layers. A layer that runs several times in one forward pass has a tensor of each run; see
        `calls`. With `pattern`, the model runs with eager attention.

        Pads are in no result, and prompts of different lengths share a batch only where this model was shown to give
        the same rows with pads (`pads`). A batch that is too large for a GPU's memory is halved.

        Raises SelectionError, TokenizerError, StoreError, InterventionError, and CaptureError where a run did not see
        what it should or would not fit into memory.
        """
        given: dict[str, Any] = {**options}
        store, resume = given.pop("store", None), given.pop("resume", False)
        return self.prepare(prompts, points, layers, max_new_tokens, **given).capture(store, resume)

    @takes(RunOptions)
    def prepare(
        self,
        prompts: Any,
        points: Points = "all",
        layers: Layers = "all",
        max_new_tokens: int = 64,
        **options: Any,
    ) -> Prepared:
        """Validate and plan a capture without running it; used by distributed runners. Raises what `capture` does."""
        given = of_kind(RunOptions, options)
        generation = {name: value for name, value in options.items() if name not in given}
        check_names(generation, ["points", "layers", "max_new_tokens", *options_of(CaptureOptions)])
        chosen = with_defaults(RunOptions, given)
        draws = generation.pop("num_return_sequences", None)
        learned = dictionaries_of(chosen["dictionaries"], chosen)
        asked = without_features(points) if learned else points
        request = self._request(prompts, asked, layers, max_new_tokens, chosen)
        featured = None
        if learned:
            read = [(each, self._read_by(each, chosen["calls"])) for each in learned]
            featured = placed(request.selectors, read)
            every = in_forward_order((*request.selectors, *(each for _, found in read for each in found)))
            request = replace(request, selectors=every)
        request = request.drawn(1 if draws is None else draws, chosen["do_sample"])
        engine, why = self._engine_of(chosen["engine"])
        plan = self._plan(chosen["interventions"], request, chosen["engine"])
        run = run_of(request, engine, self.tokenizer, plan, chosen, generation, self.kinds)
        groups, why_apart = self._batches(request, run.why_no_pads)
        expected = self._estimate(request, groups)
        of_model = self.map.architecture, self.document, self.name
        manifest = manifest_of(request, run, *of_model, plan, chosen["before"], featured)
        if chosen["before"]:
            expected = expected.twice()
        return Prepared(run, groups, manifest, self.map, expected, why, why_apart, featured)

    def _read_by(self, dictionary: Dictionary, calls: Any) -> tuple[Selector, ...]:
        """Where the rows are that a dictionary reads. Raises SelectionError."""
        point, layer = dictionary.reads[:2]
        return self.selectors({point: "all" if layer is None else layer}, calls=calls)

    @takes(CaptureOptions)
    def generate(
        self,
        prompts: Any,
        interventions: Any = (),
        capture: Mapping[str, Any] | None = None,
        max_new_tokens: int = 64,
        **options: Any,
    ) -> Capture:
        """Generate from `prompts` with interventions, and store what `capture` names: {"points": …, "layers": …, …}.

        Without `capture` the result has texts and tokens only. `capture` holds the arguments of `Hooked.capture` that
        select rows, `options` all its other arguments.
        """
        if not isinstance(capture, Mapping | None):
            raise CaptureError(f'capture: expected what it keeps, {{"points": …, "layers": …}}, got {capture!r:.80}.')
        chosen = {"points": (), **(capture or {})}
        return self.capture(prompts, max_new_tokens=max_new_tokens, interventions=interventions, **chosen, **options)

    def matching(self, chosen: RowSelection) -> frozenset[int]:
        """The token ids that positions="text=…" selects. Raises SelectionError."""
        return matching_tokens(chosen, self.tokenizer, self.vocabulary)

    @property
    def vocabulary(self) -> int:
        """The size of the model's vocabulary."""
        return vocabulary_of(self.hooks)

    @cached_property
    def pads(self) -> Pads:
        """Whether padding changes this model's rows: tested when a capture has prompts of different lengths."""
        return Pads(self.hooks, self.map, self.tokenizer)

    @property
    def why_no_pads(self) -> str | None:
        """Why prompts of different lengths must not share a batch of a generation; None where they may."""
        return self.pads.why_not(harvest=False)

    @cached_property
    def document(self) -> dict[str, Any]:
        """The map as plain JSON data, written once: every manifest takes a copy."""
        return self.map.to_document()

    @cached_property
    def places(self) -> Places:
        """The axes of this model's tensors that are named by their place."""
        return Places(self.hooks)

    def selectors(self, points: Any = "all", layers: Any = "all", calls: Any = "all") -> tuple[Selector, ...]:
        """As the map's `selectors`; a tensor that is named by its place knows its axes, for which the model may run.

        Raises SelectionError.
        """
        return self.places.measured(self.map.selectors(points, layers, calls))

    @cached_property
    def proofs(self) -> Proofs:
        """Proofs that writes to this model's points have their effect."""
        return Proofs(self.hooks, self.map, self.places.measured)

    @takes(EstimateOptions)
    def estimate(
        self,
        prompts: Any,
        points: Points = "all",
        layers: Layers = "all",
        max_new_tokens: int = 64,
        **options: Unpack[EstimateOptions],
    ) -> Estimate:
        """The largest size that a capture with the same arguments can have. Runs nothing of it.

        Where prompts differ in length, the model is asked once whether they may share a batch: see `pads`.
        """
        chosen = with_defaults(EstimateOptions, options)
        request = self._request(prompts, points, layers, max_new_tokens, chosen)
        return self._estimate(request, self._batches(request)[0])

    def _request(
        self, prompts: Any, points: Points, layers: Layers, max_new_tokens: int, options: Mapping[str, Any]
    ) -> Request:
        how = Templating(**of_kind(TemplateOptions, options), generates=bool(max_new_tokens))
        encoded = self.encode_as(records(prompts, options["prompt_column"]), how)
        selection = row_selection(**of_kind(RowOptions, options))
        selectors = self.selectors(points, layers, options["calls"]) if points != () else ()
        batch_size, batch_tokens = options["batch_size"], options["batch_tokens"]
        check_count("max_new_tokens", max_new_tokens, least=0)
        check_count("batch_size", BATCH_SIZE if batch_size is None else batch_size)
        check_count("batch_tokens", batch_tokens)
        return Request(encoded, how, selectors, selection, max_new_tokens, batch_size, batch_tokens)

    def edited(self, interventions: Any) -> Self:
        """A view of this model with interventions that stay: whatever runs on it, runs with them.

        They are written before those of a run itself, at the same place. The weights are shared and stay as they are;
        a view has views, too. interventions: as in capture. Raises SelectionError and InterventionError.
        """
        found = read_interventions(interventions)
        plan_edits(self, found, (), 1, Templating())  # raises here and not in each run
        self.pads, self.proofs  # noqa: B018  # found once, for all views
        view = copy.copy(self)
        view._standing = (self, found)
        return view

    @property
    def standing(self) -> bool:
        """Whether this is a view, with interventions that stay."""
        return self._standing is not None

    def _plan(self, interventions: Any, request: Request, engine: EngineName) -> EditPlan | None:
        plan: EditPlan | None
        if isinstance(interventions, EditPlan):
            plan = interventions
        else:
            found, new = read_interventions(interventions), request.max_new_tokens
            plan = plan_edits(self, found, request.prompts, new, request.templating, engine) if found else None
        if self._standing is None:
            return plan
        model, edits = self._standing
        standing = model._plan(edits, request, engine)
        return plan if standing is None else standing if plan is None else standing.then(plan)

    def _batches(self, request: Request, why_no_pads: str | None = None) -> Batches:
        """The batches of a run. `why_no_pads`: why the run itself must not have pads."""

        def why() -> str | None:
            return why_no_pads or self._why_apart(request)

        def why_not_joined(prompts: Sequence[Prompt]) -> str | None:
            return self.pads.why_not(harvest=not request.max_new_tokens, pattern=pattern, examples=prompts)

        pattern = reads_attention(request.selectors)
        return request.batches(why, why_not_joined)

    def _why_apart(self, request: Request) -> str | None:
        """Why prompts of different lengths must not share a batch; None where they may."""
        limit = whole_batch_limit(self.root.config)
        if limit is not None and max(request.lengths) + request.max_new_tokens > limit:
            return f"beyond {limit} tokens its rotary positions change for a whole batch"
        return self.pads.why_not(harvest=not request.max_new_tokens, pattern=reads_attention(request.selectors))

    def _estimate(self, request: Request, groups: Sequence[Sequence[int]]) -> Estimate:
        if request.selectors:
            request.selection.refuse_beyond(request.lengths, request.read_after)
            request.selection.refuse_no_image(prompt.image_positions for prompt in request.prompts)
        return estimate(
            self.map,
            request.selectors,
            request.lengths,
            request.max_new_tokens,
            next(self.root.parameters()).itemsize,
            groups,
            max(
                (self._d_mlp(s) for s in request.selectors if "d_mlp" in PointName.of(s.point).definition.axes),
                default=None,
            ),
            request.selection,
            every_logit=logits_parameter(self.root) is None,
            d_expert=max((self._d_expert(s) for s in request.selectors), default=0) or None,
        )

    def engine(self, name: EngineName = "auto") -> tuple[str, str]:
        """The engine that a capture uses, and why."""
        engine, why = self._engine_of(name)
        return engine.name, why

    def _engine_of(self, name: str) -> tuple[Engine, str]:
        """The engine that runs, and why. Raises CaptureError for an unknown name."""
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
        """The input width of a down projection, whose weights are [d_mlp, d_model] or transposed."""
        (down,) = self.map.selectors(PointName.of(selector.point).numbered("mlp_post"), selector.layer, calls=0)
        parameters = self.model.get_submodule(down.module).parameters()
        return max((p.numel() for p in parameters), default=0) // self.map.d_model

    def _d_expert(self, selector: Selector) -> int:
        """Of a point of experts: the width in one; the weights are [experts, d_model, d_expert] or transposed."""
        owner, _, name = (selector.terms[-1].experts or "").rpartition(".")
        weights = getattr(self.model.get_submodule(owner), name, None) if name else None
        return 0 if weights is None else weights.numel() // (weights.shape[0] * self.map.d_model)

    def encode(
        self,
        prompts: Any,
        chat: Chat = "auto",
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Prompt, ...]:
        """Encode prompts as a harvest reads them; see `capture`. Raises TokenizerError."""
        how = Templating(chat, add_generation_prompt, continue_final_message, chat_template_kwargs)
        return self.encode_as(prompts, how)

    def encode_as(self, prompts: Any, how: Templating) -> tuple[Prompt, ...]:
        """The same, with all of how they go through the chat template."""
        if is_encoder_decoder(self.root):
            return encode_apart(prompts, self.root, self.tokenizer, how, why_none=self._why_no_tokenizer)
        return encode(prompts, self.tokenizer, how, why_none=self._why_no_tokenizer, reader=self.reader)

    def __repr__(self) -> str:
        edited = "" if self._standing is None else f", edited: {', '.join(_names(self))}"
        sizes = f"{self.map.num_layers} layers, d_model {self.map.d_model}"
        return f"<{type(self).__name__} {self.map.architecture}, {sizes}{edited}>"


def _names(view: Hooked) -> Iterator[str]:
    """What each intervention of a view does, where."""
    if view._standing is not None:
        model, edits = view._standing
        yield from _names(model)
        yield from (f"{each.do} {each.point}" for each in edits)
