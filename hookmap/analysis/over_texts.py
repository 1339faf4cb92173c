"""What a model gives over many texts without keeping rows: statistics, outlier features, examples."""

from collections.abc import Iterable
from typing import Any

from hookmap.analysis.dictionaries.training import Training, train_dictionary
from hookmap.analysis.examples.result import Examples
from hookmap.analysis.examples.run import examples
from hookmap.analysis.expert_outliers import LayerExperts, expert_outliers
from hookmap.analysis.jacobian_lens import JacobianLens, fit_jacobian_lens
from hookmap.analysis.outliers import OutlierFeatures, outliers
from hookmap.analysis.probes.streamed.run import StreamedProbes, train_probe
from hookmap.analysis.reductions.run import reduce
from hookmap.analysis.reductions.statistics import Statistics
from hookmap.analysis.reductions.wanted import DEFAULT
from hookmap.capture.hooked import Hooked
from hookmap.capture.options import (
    CaptureOptions,
    EstimateOptions,
    Layers,
    MeasureOptions,
    Points,
    RunOptions,
    TemplateOptions,
    takes,
)


class OverTexts(Hooked):
    """The part of `HookedModel` that sums up rows, or keeps the few that matter."""

    @takes(CaptureOptions, reduce)
    def reduce(
        self,
        prompts: Any,
        points: Points = "resid_post",
        layers: Layers = "all",
        reductions: str | Iterable[str] = DEFAULT,
        max_new_tokens: int = 0,
        **options: Any,
    ) -> Statistics:
        """Statistics of points of layers, summed up while the model runs: no row is kept, and memory stays flat.

        reductions: of count, mean, variance, std, skewness, kurtosis, min, max, covariance, quantiles, histogram,
        outlier and massive (of each feature), norm and cosine (of each row). by: groups of rows besides all of them:
        "sink" (the first token of each text apart; the default), "position", "token", "label:NAME". edges: of bins.
        direction: for cosine, a vector [d], one for each layer, or a steering vector.
        prompts, points, layers and the options: as in capture. store: a folder for the sums, written every minute and
        at the end; with resume, a killed run goes on from there. Rows with an infinity or nan are counted apart.
        Raises SelectionError, and what capture raises.
        """
        return reduce(self, prompts, points, layers, reductions, max_new_tokens, **options)

    @takes(EstimateOptions)
    def outliers(
        self, prompts: Any, points: Points = "resid_post", layers: Layers = "all", **options: Any
    ) -> OutlierFeatures:
        """Outlier features (Dettmers et al. 2022) and massive activations (Sun et al. 2024) of points, over texts.

        Definitions: see `hookmap.analysis.outliers`. The share of layers is of those that are read: read all.
        Raises SelectionError, and what `reduce` raises.
        """
        return outliers(self, prompts, points, layers, **options)

    @takes(MeasureOptions)
    def expert_outliers(self, prompts: Any, layers: Layers = "all", **options: Any) -> dict[int, LayerExperts]:
        """By layer, what each expert of a mixture writes to the stream at the most, and how often it is chosen.

        What it writes is its output times its weight. Experts behind the last one that was chosen have no entry.
        Raises SelectionError with the reason where no layer has experts, and what capture raises.
        """
        return expert_outliers(self, prompts, layers, **options)

    @takes(MeasureOptions, train_dictionary)
    def train_dictionary(
        self, texts: Any, point: str = "resid_post", layer: int | None = None, **options: Any
    ) -> Training:
        """Train a sparse autoencoder on a point's rows while the model reads texts: no row is written to disk.

        texts: as prompts of a capture; or a capture on disk (`hookmap.open_store`), whose rows are read.
        kind: "topk" (Gao et al. 2024) or "jumprelu" (Rajamanoharan et al. 2024). features: 8 for each number of a row
        unless given. k: active ones of a row, exactly or, of jumprelu, aimed at on average. passes: over the texts.
        batch_rows: of a step. learning_rate: 2e-4 for 16,384 features unless given, with the root of their number.
        buffer_rows: shuffled together. silent_rows: without which a feature counts as dead. skip: tokens at the start
        of each text that are left out (attention sinks). training_seed: of the weights and orders.
        store: a folder for the files, which SAELens reads, too, and while it runs for its state, written every minute;
        with resume, a killed run goes on from there. tell: called with a `Progressed` for each buffer.
        `.dictionary` of the result is the dictionary, `.log` how it went. Raises SelectionError, StoreError, and what
        capture raises.
        """
        return train_dictionary(self, texts, point, layer, **options)

    @takes(RunOptions, train_probe)
    def train_probe(
        self, texts: Any, label: str = "label", points: Points = "resid_post", layers: Layers = "all", **options: Any
    ) -> StreamedProbes:
        """Train linear probes of a label while the model reads texts, one of each tensor: no row is kept.

        texts: as prompts of a capture; or a capture (`hookmap.open_store`), whose rows are read. label: of each text,
        or a list with one for each of its tokens. labels: a table with `id` that has it, or a function of a `Sample`.
        kind: "classes" (softmax) or "regression" (least squares). pool: the rows that a text's label is of: "last",
        "mean", "max", … group: the label that names a text's question; whole questions are held out. skip: tokens at
        the start of each text that no mean and no label of tokens reads. shuffles: labels of controls, learnt beside.
        passes: over the texts. batch_rows, learning_rate: of a step of Adam. decay: of the weights. buffer_rows:
        shuffled together. training_seed: of the parts and orders. With dictionaries=, points="features" are theirs.
        store: a folder for report and probes, and while it runs for its state, written every minute; with resume, a
        killed run goes on from there.
        `.report` has the scores on texts that no probe saw, `.probes` the weights. Raises SelectionError, DataError,
        StoreError, and what capture raises.
        """
        return train_probe(self, texts, label, points, layers, **options)

    @takes(TemplateOptions, fit_jacobian_lens)
    def fit_jacobian_lens(self, texts: Any, layers: Layers = "all", **options: Any) -> JacobianLens:
        """Fit a Jacobian lens (Gurnee et al. 2026): how a layer's stream moves the last one's, a mean over texts.

        One forward pass over each text, and d_model / rows_at_once backward passes. skip: first tokens of each text
        that are left out, as its last is; shorter texts are left out whole. progress: called with the texts done and
        all. `hm.lens(prompt, jacobian=…)` reads with it. Raises SelectionError.
        """
        return fit_jacobian_lens(self, texts, layers, **options)

    @takes(CaptureOptions, examples)
    def examples(
        self,
        prompts: Any,
        points: Points | None = None,
        layers: Layers = "all",
        max_new_tokens: int = 0,
        **options: Any,
    ) -> Examples:
        """Maximally activating examples: for each feature the tokens of the largest values, and random ones, in a pass.

        features: which numbers of a row, all unless given. norms: in their place the L2 norm over a row's last axis, of
        `z` one of each head. directions: in their place products with vectors [d], by name. dictionary: in their place
        the features of a sparse autoencoder, at the point that it reads. choices: the weights of a router's experts at
        the tokens that have them. points: `mlp_post` unless given. prompts: also a capture (`hookmap.open_store`).
        k, random: examples of each feature. context: tokens shown before and after. skip: tokens at the start of each
        text that are no examples (attention sinks). positive: only values above 0 are; the default of dictionaries.
        prompts, points, layers and the options: as in capture. store, resume: as of `reduce`.
        `examples.of(("mlp_post", 8), 17).top` are those of a feature; `hookmap.analysis.examples.page.save_page` shows
        them. Raises SelectionError, and what capture raises.
        """
        return examples(self, prompts, points, layers, max_new_tokens, **options)
