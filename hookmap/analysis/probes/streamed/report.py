"""The report of a streamed probe, and its folder: JSON and the probes themselves."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from hookmap.analysis.probes.report import REPORT
from hookmap.documents import Frozen


class Place(Frozen):
    """The probe of one tensor. Its scores are of texts that it never saw, but for `choice`."""

    point: str
    layer: int | None = None
    call: int | None = Field(default=None, description="which run of a layer that runs several times")
    score: float | None = Field(description="accuracy of classes, R² of numbers; None where nothing could be learnt")
    low: float | None = Field(description="95 % interval, with each question counted once")
    high: float | None
    control: float | None = Field(description="the same of the controls' labels, learnt beside; the mean over them")
    selectivity: float | None = Field(description="score - control")
    random_directions: float | None = Field(
        description="the score of a probe that sees as many random directions of the tensor as there are outputs"
    )
    choice: float | None = Field(description="the score on the texts that choose the tensor")
    balanced_accuracy: float | None = Field(default=None, description="of classes: mean recall")
    log_loss: float | None = Field(default=None, description="of classes, in nats")
    correlation: float | None = Field(default=None, description="of numbers: Pearson's")
    not_finite: int = Field(description="rows that hold an infinity or nan: left out")

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.point, self.layer) if self.call is None else (self.point, self.layer, self.call)


class Seen(Frozen):
    """How much there is of each part."""

    texts: int
    questions: int
    rows: int = Field(description="texts, or tokens, that have a label")


class StreamReport(Frozen):
    """The results of a streamed probing."""

    format: Literal["hookmap-streamed-probes"] = "hookmap-streamed-probes"
    format_version: Literal[1] = 1
    model: str | None
    source: str
    label: str
    kind: Literal["classes", "regression"]
    measure: Literal["accuracy", "r2"]
    per: Literal["text", "token"]
    pool: str | None = Field(description="of labels of texts: which rows")
    classes: tuple[Any, ...]
    shuffles: int = Field(description="labels of the controls that are learnt beside the real ones")
    passes: int
    batch_rows: int
    learning_rate: float
    decay: float
    skip: int
    seed: int
    seconds: float
    train: Seen
    choice: Seen
    test: Seen
    why_left_out: dict[str, int] = Field(description="reason -> texts")
    strangers: int = Field(description="ids of the table of labels that no text has")
    simplest: float | None = Field(description="accuracy of the commonest class; 0, the R² of the mean")
    tokens_alone: float | None = Field(
        description="the score of a probe that sees the tokens' ids alone: of a text how often it has each"
    )
    best: Place = Field(description="the place whose score on `choice` is the best")
    confusion: tuple[tuple[int, ...], ...] = Field(description="of the best place: [true class][class told], of test")
    places: tuple[Place, ...]


def save_report(report: StreamReport, folder: Path) -> Path:
    """Write report.json. Raises StoreError."""
    from hookmap.stores.durable_files import write_file, writing

    path, data = folder / REPORT, report.model_dump_json(indent=2).encode() + b"\n"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, data)
    return path
