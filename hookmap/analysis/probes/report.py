"""What a probing found, as a document, and the folder that keeps it: JSON, pictures, the probes themselves."""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hookmap.analysis.probes.pooling import FAR
from hookmap.errors import CaptureError, StoreError

REPORT, PROBES = "report.json", "probes.safetensors"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Score(_Document):
    """How well out-of-fold scores tell the label."""

    auroc: float | None = Field(description="0.5 is chance, 1 is perfect")
    low: float | None = Field(description="95 % interval, each question counting once")
    high: float | None


class Tested(Score):
    """A score beside those of shuffled labels, which went through all the same."""

    shuffled: float | None = Field(default=None, description="mean AUROC of the shuffles")
    selectivity: float | None = Field(default=None, description="auroc - shuffled")
    p: float | None = Field(default=None, description="the share of shuffles that are as good, this one among them")


class Place(_Document):
    """One tensor, and one position where each is probed by itself."""

    point: str
    layer: int | None = None
    position: int | None = Field(default=None, description="counted from the end of the prompt: -1 is its last token")


class OfPlace(Place, Tested):
    """The probe of one place, cross-validated; p is corrected for all places: the best place of a shuffle counts."""

    why: str | None = Field(default=None, description="why it cannot be probed")

    largest_share: float | None = Field(
        default=None, description="of means: the longest row's share of the sum of the rows' lengths, mean over samples"
    )
    largest_ratio: float | None = Field(
        default=None,
        description="of means: how many times as long as the median row the longest is, median over samples",
    )


class CalibrationBin(_Document):
    """Samples to which the probe gave about the same probability."""

    samples: int
    probability: float = Field(description="mean of what the probe said")
    positives: float = Field(description="the share that is positive")


class Chosen(Tested):
    """The probe whose place was chosen within the training part of each fold: the honest one number."""

    places: tuple[Place, ...] = Field(description="the choice of each fold")
    recall_at_1_percent: float | None = Field(description="recall where at most 1 % of the negatives pass")
    brier: float = Field(description="mean squared error of the probabilities")
    calibration_error: float
    calibration: tuple[CalibrationBin, ...]


class OfControl(Score):
    """What is known without looking inside the model."""

    name: str
    sees_answer: bool = Field(description="it looks at the answer, which a probe of the prompt's rows does not")
    why: str | None = Field(default=None, description="why it cannot be told")


class Report(_Document):
    """Everything about one probing."""

    format_version: Literal[2] = 2
    store: str
    model: str | None
    label: str
    method: str
    pool: str
    positions: str | None = Field(default=None, description="that the pool is of; all unless given")
    folds: int
    shuffles: int = Field(description="of the labels, each fitted and chosen as the labels themselves")
    seconds: float = Field(description="that fits of the labels and of all shuffles took")
    seed: int
    samples: int
    positives: int
    questions: int
    left_out: int = Field(description="samples")
    why_left_out: dict[str, int] = Field(description="reason -> samples")
    strangers: int = Field(description="ids of the table of labels that no sample has")
    chosen: Chosen
    best: Place = Field(description="the best mean of inner AUROCs: where a probe for use is taken from")
    controls: tuple[OfControl, ...]
    places: tuple[OfPlace, ...]

    @property
    def sink(self) -> str | None:
        """The warning that one row rules the means; None where none does."""
        far = [place for place in self.places if (place.largest_ratio or 0) > FAR]
        if not far:
            return None
        worst = max(far, key=lambda place: place.largest_ratio or 0)
        name = worst.point if worst.layer is None else f"{worst.point} {worst.layer}"
        return (
            f"one row rules the means of {len(far)} of {len(self.places)} tensors: of {name} it is "
            f"{worst.largest_ratio:.0f} times as long as the median row and {worst.largest_share:.0%} of the sum of "
            "all, an attention sink. Leave it out: positions='1:' (--positions 1:)"
        )

    @property
    def best_control(self) -> OfControl | None:
        """The control with the highest AUROC, of those that see no more than the probe does."""
        early = self.pool in ("last_prompt", "mean_prompt")
        told = [c for c in self.controls if c.auroc is not None and not (early and c.sees_answer)]
        return max(told, key=lambda control: control.auroc or 0.0, default=None)


def number(value: float) -> float | None:
    """JSON has no not-a-number."""
    return None if math.isnan(value) else float(value)


def save_report(report: Report, folder: Path) -> list[Path]:
    """Writes report.json and, where pictures can be drawn, them as PNG and HTML. Raises StoreError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / REPORT]
        written[0].write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write {folder}: {error.strerror or error}.") from error
    try:
        from hookmap.analysis.charts import save_picture

        for name, chart in _charts(report).items():
            written += [save_picture(chart, folder / f"{name}{ending}") for ending in (".png", ".html")]
    except CaptureError:  # without the packages that draw: the numbers are all in the JSON
        pass
    return written


def _charts(report: Report) -> dict[str, Any]:
    """AUROC by layer; where each position is probed, a heat map for each point."""
    from hookmap.analysis.charts import bands, heat_map

    title = f"{report.label}: {report.method}, {report.pool}"
    if report.pool != "each":
        rows = [place.model_dump() for place in report.places if place.layer is not None and place.auroc is not None]
        lines = {c.name: c.auroc for c in report.controls if c.auroc is not None}
        return {"auroc": bands(rows, lines, value="auroc", title=title)} if rows else {}
    points = dict.fromkeys(place.point for place in report.places if place.layer is not None)
    return {f"auroc-{point}": heat_map(_grid(report, point), title=f"{title} · {point}") for point in points}


def _grid(report: Report, point: str) -> Any:
    import torch

    from hookmap.analysis.grid import Grid

    mine = [place for place in report.places if place.point == point]
    layers = sorted({place.layer for place in mine if place.layer is not None})
    positions = sorted({place.position for place in mine if place.position is not None})
    values = torch.full((len(layers), len(positions)), float("nan"))
    for place in mine:
        if place.layer is not None and place.position is not None and place.auroc is not None:
            values[layers.index(place.layer), positions.index(place.position)] = place.auroc
    return Grid(values, tuple(layers), tuple(positions), tuple(map(str, positions)), "AUROC", point)
