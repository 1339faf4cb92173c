"""The report of a probing, and its folder: JSON, charts and the probes themselves."""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from hookmap.analysis.probes.pooling import FAR
from hookmap.documents import Frozen
from hookmap.errors import CaptureError
from hookmap.stores.durable_files import writing
from hookmap.wording import in_call

REPORT, PROBES = "report.json", "probes.safetensors"


class Score(Frozen):
    """How well out-of-fold scores predict the label."""

    auroc: float | None = Field(description="0.5 is chance, 1 is perfect")
    low: float | None = Field(description="95 % interval, with each question counted once")
    high: float | None


class Tested(Score):
    """A score, compared with those of shuffled labels that went through the same procedure."""

    shuffled: float | None = Field(default=None, description="mean AUROC of the shuffles")
    selectivity: float | None = Field(default=None, description="auroc - shuffled")
    p: float | None = Field(
        default=None, description="share of shuffles that are as good, counting the result itself as one"
    )


class Candidate(Frozen):
    """One tensor; with pool=each, one position of it."""

    point: str
    layer: int | None = None
    call: int | None = Field(default=None, description="which run of a layer that runs several times")
    position: int | None = Field(default=None, description="counted from the end of the prompt: -1 is its last token")


class CandidateScore(Candidate, Tested):
    """The cross-validated probe of one candidate; p is corrected for their number, by the best of each shuffle."""

    why: str | None = Field(default=None, description="why it cannot be probed")

    largest_share: float | None = Field(
        default=None, description="of means: the largest row norm's share of the sum of norms, mean over samples"
    )
    largest_ratio: float | None = Field(
        default=None,
        description="of means: the largest row norm divided by the median one, median over samples",
    )


class CalibrationBin(Frozen):
    """Samples with about the same predicted probability."""

    samples: int
    probability: float = Field(description="mean prediction")
    positives: float = Field(description="share of positive samples")


class Chosen(Tested):
    """The probe that is chosen within the training part of each fold: an unbiased score."""

    places: tuple[Candidate, ...] = Field(description="the choice of each fold")
    recall_at_1_percent: float | None = Field(description="recall where at most 1 % of the negatives pass")
    brier: float = Field(description="mean squared error of the probabilities")
    calibration_error: float
    calibration: tuple[CalibrationBin, ...]


class ControlScore(Score):
    """A prediction that does not look inside the model."""

    name: str
    sees_answer: bool = Field(description="it uses the answer, which a probe of the prompt's rows does not")
    why: str | None = Field(default=None, description="why it has no score")


class Report(Frozen):
    """The results of one probing."""

    format_version: Literal[2] = 2
    store: str
    model: str | None
    label: str
    method: str
    pool: str
    positions: str | None = Field(default=None, description="that the pool is restricted to; all unless given")
    folds: int
    shuffles: int = Field(description="of the labels; each goes through the same fits and choice")
    seconds: float = Field(description="spent on fits for the labels and all shuffles")
    seed: int
    samples: int
    positives: int
    questions: int
    left_out: int = Field(description="samples")
    why_left_out: dict[str, int] = Field(description="reason -> samples")
    strangers: int = Field(description="ids in the table of labels that no sample has")
    chosen: Chosen
    best: Candidate = Field(description="the candidate with the best mean of inner AUROCs; its probe is the one to use")
    controls: tuple[ControlScore, ...]
    places: tuple[CandidateScore, ...]

    @property
    def sink(self) -> str | None:
        """A warning where one row dominates the means; None where none does."""
        far = [place for place in self.places if (place.largest_ratio or 0) > FAR]
        if not far:
            return None
        worst = max(far, key=lambda place: place.largest_ratio or 0)
        name = worst.point if worst.layer is None else f"{worst.point} {worst.layer}{in_call(worst.call)}"
        return (
            f"one row rules the means of {len(far)} of {len(self.places)} tensors: of {name} it is "
            f"{worst.largest_ratio:.0f} times as long as the median row and {worst.largest_share:.0%} of the sum of "
            "all, an attention sink. Leave it out: positions='1:' (--positions 1:)"
        )

    @property
    def best_control(self) -> ControlScore | None:
        """The control with the highest AUROC, of those that use no more than the probe does."""
        early = self.pool in ("last_prompt", "mean_prompt")
        told = [c for c in self.controls if c.auroc is not None and not (early and c.sees_answer)]
        return max(told, key=lambda control: control.auroc or 0.0, default=None)


def number(value: float) -> float | None:
    """The value; None for nan, which JSON does not have."""
    return None if math.isnan(value) else float(value)


def save_report(report: Report, folder: Path) -> list[Path]:
    """Write report.json and, where Altair is installed, charts as PNG and HTML. Raises StoreError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / REPORT]
        written[0].write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    try:
        from hookmap.analysis.charts import save_picture

        for name, chart in _charts(report).items():
            written += [save_picture(chart, folder / f"{name}{ending}") for ending in (".png", ".html")]
    except CaptureError:  # without the packages for charts: the JSON has all numbers
        pass
    return written


def _charts(report: Report) -> dict[str, Any]:
    """A chart of AUROC by layer; with pool=each, a heat map for each point."""
    from hookmap.analysis.charts import bands, heat_map

    title = f"{report.label}: {report.method}, {report.pool}"
    if report.pool != "each":
        rows = [
            {**place.model_dump(), "point": place.point + in_call(place.call)}
            for place in report.places
            if place.layer is not None and place.auroc is not None
        ]
        lines = {c.name: c.auroc for c in report.controls if c.auroc is not None}
        return {"auroc": bands(rows, lines, value="auroc", title=title)} if rows else {}
    points = dict.fromkeys((place.point, place.call) for place in report.places if place.layer is not None)
    return {
        f"auroc-{point}{'' if call is None else f'-call{call}'}": heat_map(
            _grid(report, point, call), title=f"{title} · {point}{in_call(call)}"
        )
        for point, call in points
    }


def _grid(report: Report, point: str, call: int | None) -> Any:
    import torch

    from hookmap.analysis.grid import Grid

    mine = [place for place in report.places if (place.point, place.call) == (point, call)]
    layers = sorted({place.layer for place in mine if place.layer is not None})
    positions = sorted({place.position for place in mine if place.position is not None})
    values = torch.full((len(layers), len(positions)), float("nan"))
    for place in mine:
        if place.layer is not None and place.position is not None and place.auroc is not None:
            values[layers.index(place.layer), positions.index(place.position)] = place.auroc
    return Grid(values, tuple(layers), tuple(positions), tuple(map(str, positions)), "AUROC", point)
