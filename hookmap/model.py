"""`hookmap.open`: a model with its tokenizer and its map, checked against each other; one copy of the weights."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Unpack

import torch
from torch import nn

from hookmap.analysis.attribution import Attribution, attribute
from hookmap.analysis.by_gradients import ByGradients
from hookmap.analysis.head_outputs import stack_head_results
from hookmap.analysis.heads import HeadScores, head_scores
from hookmap.analysis.lens import Lens, lens
from hookmap.analysis.metrics import losses, measure
from hookmap.analysis.over_texts import OverTexts
from hookmap.analysis.patching import sweep
from hookmap.analysis.steering import SteeringVector, make_vector
from hookmap.analysis.sweeps import Sweep
from hookmap.analysis.tokens import token_texts
from hookmap.analysis.weights import Weight, weights, weights_from
from hookmap.capture.engines.model_lock import lock_of
from hookmap.capture.options import (
    Layers,
    MeasureOptions,
    TemplateOptions,
    VectorOptions,
    takes,
)
from hookmap.capture.result import Capture
from hookmap.capture.stacks import Stack
from hookmap.discovery.library import given_map
from hookmap.discovery.map_of_model import understood
from hookmap.discovery.weights import Weights
from hookmap.errors import ModelError, SelectionError, TokenizerError
from hookmap.loading import configs
from hookmap.loading.checkpoints import load_model, load_processor, load_tokenizer
from hookmap.loading.config_fields import with_fields
from hookmap.loading.modules import model_root
from hookmap.loading.prompts import NO_TOKENIZER
from hookmap.maps.document import ArchitectureMap
from hookmap.verification.opening import hold


class HookedModel(ByGradients, OverTexts):
    """A causal language model to capture from and analyse. Made by `hookmap.open`."""

    @cached_property
    def _weights(self) -> Weights:
        """Which parameters the products beside points use; the model runs once."""
        with lock_of(self.model).exclusive():
            return weights_from(self.model)

    def weights(self, point: str, layer: int | None = None, call: int | None = None) -> tuple[Weight, ...]:
        """The parameters that write to a point, or read from it, as views with names and axes.

        `weights("z", 8)` is W_O as [heads, d_head, out], `weights("attn_in", 8)` the norm's weight, W_Q, W_K and W_V as
        [in, heads, d_head], `weights("mlp_in", 8)` W_in, W_gate and the router, `weights("mlp_out", 8)` W_out,
        `weights("embed")` W_E, `weights("logits")` W_U: in the orientation `x @ W`, by dataflow, whatever the model
        calls them. Experts whose weights are one parameter have an axis `experts` in front. What is written to a view
        is written to the model. Raises SelectionError where the point has no weights of its own.
        """
        return weights(self, self._weights, point, layer, call)

    @takes(TemplateOptions, sweep)
    def sweep(
        self, clean: Any, corrupted: Any = None, target: Any = None, against: Any = None, **options: Any
    ) -> Sweep:
        """Patch each cell of the clean run into the corrupted one, and measure how far the clean answer comes back.

        clean, corrupted: one prompt each, of the same number of tokens; target, against: the next tokens of the two,
        as texts or ids. Or `clean` alone: pairs, a file of them (`hookmap.load_pairs`) or a list of `hookmap.Pair`.
        metric: a name of `hookmap.metrics.NAMES`, one of `hookmap.metrics`, or a function of (logits, at); unless
        given, the difference of both answers' logits, or the probability of the only one.
        point: one or several. over: what is patched one by one: "positions", "heads", both, or "layers" alone; the
        rest of a layer is patched together. positions, heads: which; layers, calls: as in capture. A layer that runs
        several times is patched in each of `calls` in turn, from the same run or from those of `source_calls`.
        noising: patch corrupted values into the clean run instead.
        to: patch only the paths to these: "logits", or heads and branches, "q@9.6,q@9.9" or "mlp_in@4"; attention
        behind the patch is held as it was, and with through_mlps=False MLPs, too.
        batch_size: runs at a time. store: a file that values are written to as they come; resume: go on with it.
        progress: called with the number of runs done and of all.
        Raises SelectionError, TokenizerError, DataError, StoreError, CaptureError where a prompt's stream is not
        finite, and InterventionError where prompts do not pair or the metric of both is the same within its noise.
        """
        return sweep(self, clean, corrupted, target, against, **options)

    @takes(TemplateOptions, lens)
    def lens(self, source: Any, point: str = "resid_post", layers: Layers = "all", **options: Any) -> Lens:
        """The logit lens: the residual stream at each layer, through the final norm and the unembedding.

        source: one prompt, or a capture or store that holds the point; `sample` then chooses a sample of it.
        point: of the stream (resid_pre, resid_mid, resid_post) or a branch (mixer_out, mlp_out). layers, calls,
        positions: as in capture. top: likeliest tokens to keep. target: a token's text or id, whose probability and
        rank are told; the model's own prediction unless given. jacobian: a Jacobian lens that goes before the norm
        (`hookmap.load_jacobian_lens`, `hm.fit_jacobian_lens`), of its layers and the last.
        Raises SelectionError with the reason where the model's logits cannot be computed from its residual stream.
        """
        return lens(self, source, point, layers, **options)

    @takes(TemplateOptions, attribute)
    def attribute(self, prompt: Any, target: Any = None, against: Any = None, **options: Any) -> Attribution:
        """Direct logit attribution: what each branch of each layer adds to a logit, or to a difference of two.

        The parts sum to the logit.

        prompt: one prompt, or a capture or store that holds the points; `sample` then chooses a sample of it.
        target, against: tokens, as text or ids; target is the model's own prediction unless given.
        direction: in place of tokens, a vector [d_model] or a steering vector (of a probe, too). The parts sum to its
        product with the stream that leaves `layer`, the last unless given; no norm stands between.
        positions: as in capture. heads: split attention into its heads. neurons: layers whose MLPs are split into
        their neurons. experts: layers whose mixtures are split into their experts.
        Raises SelectionError with the reason where the residual stream is not a plain sum of branches.
        """
        return attribute(self, prompt, target, against, **options)

    @takes(TemplateOptions, head_scores)
    def head_scores(self, prompts: Any = None, layers: Layers = "all", **options: Any) -> HeadScores:
        """How much each attention head attends where induction, previous-token, duplicate-token and sink heads do.

        The heads read `samples` texts of `length` different random tokens (50, or all that the tokenizer has), each
        repeated once and drawn with `seed`; or `prompts`, as in capture. The model runs with eager attention.
        Layers without attention weights are in `.missing`, with the reason. See `hookmap.analysis.heads.HeadScores`.
        Raises SelectionError with the reasons where no layer has attention weights.
        """
        return head_scores(self, prompts, layers, **options)

    @takes(TemplateOptions)
    def to_str_tokens(self, prompt: Any, **options: Unpack[TemplateOptions]) -> list[str]:
        """The text of each token of one prompt, as a harvest reads it: a text, messages, or token ids.

        Raises SelectionError where it is not one, TokenizerError.
        """
        encoded = self.encode(prompt, **options)
        if len(encoded) != 1:
            raise SelectionError(f"to_str_tokens reads one prompt, got {len(encoded)}: call it for each.")
        (found,) = encoded
        return [*token_texts(self, found.token_ids, range(len(found.token_ids)), found.image_positions)]

    def stack_head_results(self, run: Capture, layers: Layers = "all") -> Stack:
        """What each attention head adds to the residual stream, from a capture of `z` and `mixer_out`.

        Gives (labels, values): `mixer_out[0] head 0`, …, and values [heads, batch, pos, d_model] of all layers
        captured, or of `layers`. The heads of a layer sum to its `mixer_out` but for the projection's bias: checked.
        Raises SelectionError with the reason where the mixer is not such a sum.
        """
        return stack_head_results(self, run, layers)

    @takes(MeasureOptions)
    def measure(
        self, prompts: Any, metric: Any, interventions: Any = (), **options: Unpack[MeasureOptions]
    ) -> torch.Tensor:
        """A metric of each prompt, float32 [prompts], by one forward pass over it.

        metric: one of `hookmap.metrics`, or a function of (logits, at) that gives a number: logits [pos, d_vocab] of
        one prompt, `at` its positions and tokens (`hookmap.metrics.Reading`). interventions: as in capture.
        Raises SelectionError where the metric does not fit the model or the prompts, and what capture raises.
        """
        return measure(self, prompts, metric, interventions, **options)

    @takes(MeasureOptions)
    def loss(self, texts: Any, interventions: Any = (), **options: Unpack[MeasureOptions]) -> list[torch.Tensor]:
        """The cross-entropy of each token of each text, in nats: a list of float32 [pos - 1], from the second token on.

        interventions: as in capture. Raises SelectionError for a text of one token, and what capture raises.
        """
        return losses(self, texts, interventions, **options)

    @takes(VectorOptions, make_vector)
    def steering_vector(
        self,
        positive: Sequence[Any],
        negative: Sequence[Any],
        point: str = "resid_post",
        layers: Layers = "all",
        **options: Any,
    ) -> SteeringVector:
        """For each layer, the direction from the activations of `negative` to those of `positive`.

        positive, negative: prompts, paired in order. method: "mean_difference" or "pca". positions: as in capture,
        several are averaged.
        Raises SelectionError where the prompts do not pair up, or their activations do not differ.
        """
        return make_vector(self, positive, negative, point, layers, **options)


def open(
    x: Any,
    *,
    map: ArchitectureMap | str | os.PathLike[str] | None = None,
    dtype: Any = "auto",
    device: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    config: Mapping[str, Any] | None = None,
    check: bool = True,
) -> HookedModel:
    """A model to capture from.

    x: a hub id, a local folder, a loaded torch module, or an nnsight model (its module and its stored edits are used).
    tokenizer: a tokenizer, or where to load it from; x's own where x has one, and needed for prompts that are text.
    processor: makes inputs of texts and images, or where to load it from; x's own where x has one. AutoProcessor loads
    it, when the first prompt with an image comes.
    map: a map, a map file or an architecture's name; unless given, discovery makes one of the loaded model.
    dtype: "auto" is the checkpoint's own. device: None is a GPU where there is one; both are for hub ids and folders.
    config: fields that replace those of its config.json, {"sliding_window": 64}; for hub ids and folders.
    check: hold the map against one forward pass on 18 random tokens, where no map of the architecture is
    proved for the installed transformers. bfloat16 and float16 are computed in float64 for it.
    Raises ModelError, TokenizerError, DiscoveryError, and MapMismatchError where the given map contradicts the model.
    """
    given = given_map(map)
    why_none = NO_TOKENIZER
    loads: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(os.fspath(tokenizer), **loads)
    at = os.fspath(x) if isinstance(x, str | os.PathLike) else None
    makes = _processor_of(at if processor is None else processor, loads)
    if tokenizer is None and processor is not None and at is None:
        tokenizer = makes().tokenizer  # type: ignore[misc]  # there is one
    if at is not None:
        source = at
        with_fields(configs.load_config(source, **loads), config)  # raises before weights are loaded
        if tokenizer is None:
            tokenizer, why_none = _tokenizer_or_reason(source, loads)
        module = load_model(source, dtype=dtype, device=device, config=config, **loads)
    else:
        if config:
            raise ModelError("config= is for hub ids and folders. Set it on the module: module.config.FIELD = VALUE")
        module = _module_of(x)
        if tokenizer is None and not isinstance(x, nn.Module):
            tokenizer = getattr(x, "tokenizer", None)
    root = model_root(module)
    with lock_of(module).exclusive():
        architecture_map, read = understood(module, root, given)
        if check:
            hold(architecture_map, module, given is not None)
    name = architecture_map.model_id if at is None else at
    nnsight_model = None if isinstance(x, str | os.PathLike | nn.Module) else x
    opened = HookedModel(module, tokenizer, architecture_map, name, why_none, nnsight_model, makes)
    if not read:  # only a whole pass shows whether a layer runs again
        opened.hooks.ends_early = False
    return opened


def _processor_of(given: Any, loads: dict[str, Any]) -> Callable[[], Any] | None:
    """Gives the processor: the one given, or one that is loaded from there. None where there is nothing to load."""
    if given is None:
        return None
    if isinstance(given, str | os.PathLike):
        return partial(load_processor, os.fspath(given), **loads)
    return lambda: given


def _module_of(x: Any) -> nn.Module:
    """The module itself, or the one inside an nnsight model, loaded."""
    if isinstance(x, nn.Module):
        return x
    inner = getattr(x, "_module", None)
    if isinstance(inner, nn.Module) and type(x).__module__.startswith("nnsight"):
        if any(p.is_meta for p in inner.parameters()) and hasattr(x, "dispatch"):
            x.dispatch()  # nnsight loads the weights only at the first run
        module: nn.Module = x._module
        return module
    raise ModelError(
        f"cannot open a {type(x).__name__}: expected a hub id, a local folder, a torch module or an nnsight model."
    )


def _tokenizer_or_reason(source: str, loads: dict[str, Any]) -> tuple[Any, str]:
    """The tokenizer, or None and the reason, which is raised once a prompt is text: token ids need no tokenizer."""
    try:
        return load_tokenizer(source, **loads), NO_TOKENIZER
    except TokenizerError as error:
        return None, str(error)
