"""The methods of a model that take gradients: of a metric, and what is estimated from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from hookmap.analysis.attribution_patching import AttributionPatch, attribution_patch
from hookmap.analysis.circuits import Circuit
from hookmap.analysis.edge_attribution import EdgeScores, edge_attribution
from hookmap.analysis.faithfulness import CircuitCurve, Faithfulness, circuit_curve, faithfulness
from hookmap.analysis.gradients import GradientEstimate, Gradients, estimate_gradients, gradients
from hookmap.analysis.saliency import Method, Saliency, saliency
from hookmap.capture.hooked import Hooked
from hookmap.capture.options import GradientOptions, Layers, MeasureOptions, Points, TemplateOptions, takes


class ByGradients(Hooked):
    """See `HookedModel`."""

    @takes(GradientOptions)
    def gradients(
        self,
        prompts: Any,
        metric: Any,
        points: Points = "resid_post",
        layers: Layers = "all",
        **options: Unpack[GradientOptions],
    ) -> Gradients:
        """d metric / d point of each row, `g["resid_post", 8]` [batch, pos, d], beside the values, `g.values`.

        metric: as of `measure`; its answers are read by the model behind the prompts. points, layers: as in capture;
        a point that a module reads counts what that module makes of it, any other point all that follows. Where
        interventions write, the gradient is that of what they wrote.
        One forward and one backward pass for each batch, from the first point on; the parameters get no gradients. The
        memory is said before (`estimate_gradients`). bfloat16 and float16 round gradients, and a note says so.
        Raises SelectionError, and CaptureError where a point has no gradient or memory does not suffice.
        """
        return gradients(self, prompts, metric, points, layers, **options)

    @takes(GradientOptions)
    def estimate_gradients(
        self,
        prompts: Any,
        metric: Any,
        points: Points = "resid_post",
        layers: Layers = "all",
        **options: Unpack[GradientOptions],
    ) -> GradientEstimate:
        """The memory that `gradients` takes with the same arguments: measured on short texts, and extended."""
        return estimate_gradients(self, prompts, metric, points, layers, **options)

    @takes(TemplateOptions, attribution_patch)
    def attribution_patch(
        self,
        pairs: Any,
        metric: Any = "logit_difference",
        points: Points = ("z", "mlp_out"),
        layers: Layers = "all",
        **options: Any,
    ) -> AttributionPatch:
        """Attribution patching: what patching each cell would do to a metric, estimated by one backward pass.

        Of each pair, point, layer, position and head, `found["z", 8]` [pairs, pos, heads], the gradient times the
        difference that the patch makes there. A sample of the cells is patched truly; `found.check` compares both.

        pairs: as of `sweep`. metric: a name of `hookmap.metrics.NAMES`, one of its objects, or a function of
        (logits, at). points, layers, calls: as in capture. noising: put values of the corrupted prompt into
        the clean run, and not the other way. steps: with more than one, the gradient is the mean along the
        straight path between both prompts' embeddings (integrated gradients). check: how many cells are patched truly:
        half of them those of the largest estimates, the others drawn with `seed`. batch_size, batch_tokens: pairs and
        tokens that run together. progress: called with the number of pairs done and of all pairs.

        Raises DataError, SelectionError, TokenizerError, InterventionError where the prompts of a pair do not align,
        and what `gradients` raises.
        """
        return attribution_patch(self, pairs, metric, points, layers, **options)

    @takes(TemplateOptions, edge_attribution)
    def edge_attribution(self, pairs: Any, metric: Any = "logit_difference", **options: Any) -> EdgeScores:
        """Edge attribution patching (EAP): what patching each edge would do to a metric, by one backward pass.

        Edges lead from the embedding, each head and each MLP to each later head's queries, keys and values, each later
        MLP, and the logits: `found["mixer_out[3] head 2", "mlp_in[8]"]` [pairs], summed over positions. Norms are
        carried through exactly. A mixer without heads, and what a mixer does besides its heads, is a node by itself.
        A sample of the edges is patched truly; `found.check` compares both.

        steps: with more than one, the mean along the straight path between both prompts' embeddings (EAP-IG). For the
        other options see `attribution_patch`.
        Raises SelectionError with the reason where the stream is no plain sum of what the branches add, and what
        `attribution_patch` raises.
        """
        return edge_attribution(self, pairs, metric, **options)

    @takes(TemplateOptions, faithfulness)
    def faithfulness(
        self, pairs: Any, circuits: Circuit | Sequence[Circuit], metric: Any = "logit_difference", **options: Any
    ) -> Faithfulness:
        """How much of the metric circuits recover alone: 0 as corrupted, 1 as clean (`found.values`).

        The clean prompts run with every edge outside the circuit carrying the corrupted prompt's values. circuits: of
        `edge_attribution(…).circuit(…)`. pairs, metric: as of `attribution_patch`; progress: called with the number of
        circuits done and of all. Both ends, no edge and all edges, are checked against plain runs.
        Raises SelectionError with the reason where edges cannot be run apart, and CaptureError where the ends differ.
        """
        return faithfulness(self, pairs, circuits, metric, **options)

    @takes(TemplateOptions, circuit_curve)
    def circuit_curve(
        self, pairs: Any, scores: EdgeScores, metric: Any = "logit_difference", **options: Any
    ) -> CircuitCurve:
        """CPR and CMD, as the benchmark MIB defines them: faithfulness over the size of circuits of the best edges.

        scores: of `edge_attribution`; better of other pairs than these. shares: of the edges, the sizes. CPR is the
        area under the faithfulness of edges chosen by their signed scores, CMD the area between 1 and that of edges
        chosen by their size. Raises what `faithfulness` raises.
        """
        return circuit_curve(self, pairs, scores, metric, **options)

    @takes(MeasureOptions, saliency)
    def saliency(self, prompts: Any, metric: Any, method: Method = "integrated_gradients", **options: Any) -> Saliency:
        """How much a metric depends on each token of each prompt: `found.scores`, a list of [pos].

        method: "integrated_gradients" from `baseline`: the mean over the prompt's own tokens unless given, 0 for zeros,
        one prompt of as many tokens, or one for each. They sum to the metric's difference from the baseline's, and
        `found.gap` says how nearly. Or "gradient_x_activation", or "gradient_norm". metric: as of `measure`. point,
        layer: where, the token embeddings unless given. steps: of the straight path from the baseline.
        Raises SelectionError, InterventionError where the point is not written, and what `gradients` raises.
        """
        return saliency(self, prompts, metric, method, **options)
