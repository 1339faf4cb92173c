"""The stages configure, generate, score and report. Each writes its result whole, and is skipped if that exists."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hookmap.errors import CaptureError, SelectionError, StoreError
from hookmap.evaluation.experiments.document import STAGES, Experiment, Stage
from hookmap.evaluation.experiments.report import PROBES, Report, make_report
from hookmap.evaluation.gsm8k.results import write
from hookmap.stores.durable_files import writing

CONFIG, GENERATED, ANSWERS, REPORT, PAGE = (
    "config.json",
    "generated.json",
    "answers.jsonl",
    "report.json",
    "report.html",
)
_RESULT = dict(zip(STAGES, (CONFIG, GENERATED, ANSWERS, REPORT), strict=True))
_OWN: dict[Stage, tuple[str, ...]] = {"score": ("rewards", "report"), "report": ("report",)}
"""the parts of the file that may have changed if a stage is run again"""
Told = Callable[[str, int, int], None]
"""(what is counted, done, of how many)"""


def run(
    experiment: Experiment,
    folder: str | Path,
    stage: Stage | None = None,
    again: Stage | None = None,
    tell: Told | None = None,
) -> Report | None:
    """Run the stages of the file, or one of them; finished stages are skipped. Returns the report if it exists.

    again: score or report; this stage and the later ones run again, with changed settings of rewards or of the report.
    Raises StoreError if the folder belongs to another experiment or an earlier stage is missing, and what stages raise.
    """
    target = Path(folder)
    _hold_against(target, experiment, again)
    if again is not None:
        _forget(target, again)
        write(target / CONFIG, _config(experiment))
    for each in experiment.stages if stage is None else (stage,):
        if not (target / _RESULT[each]).is_file():
            _need(target, each)
            _STAGES[each](experiment, target, tell)
    return Report.model_validate_json((target / REPORT).read_bytes()) if (target / REPORT).is_file() else None


def _configure(experiment: Experiment, folder: Path, tell: Told | None) -> None:
    """Check questions, points and layers: all that can be checked without running the model."""
    if experiment.captures is not None:
        from hookmap.demo import MODEL_PATH
        from hookmap.discovery.discover import discover

        model = MODEL_PATH if experiment.model == "demo" else experiment.model
        chosen = experiment.captures
        found = discover(model).selectors(chosen.points, chosen.layers, chosen.calls)
        if all(selector.layer is None for selector in found):
            raise SelectionError("captures.points: name a point of a layer, such as resid_post.")
    if folder.is_dir() and any(folder.iterdir()):
        raise StoreError(f"{folder} is not empty, and holds no experiment. Give another folder: -o")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / CONFIG, _config(experiment))


def _generate(experiment: Experiment, folder: Path, tell: Told | None) -> None:
    from hookmap.evaluation.experiments.generating import generate

    made = generate(experiment, folder)
    write(folder / GENERATED, json.dumps(made, indent=2) + "\n")


def _score(experiment: Experiment, folder: Path, tell: Told | None) -> None:
    from hookmap.evaluation.experiments.scoring import score_answers

    made = json.loads((folder / GENERATED).read_text(encoding="utf-8"))
    score_answers(experiment, folder, made["log"])


def _report(experiment: Experiment, folder: Path, tell: Told | None) -> None:
    lines = (folder / ANSWERS).read_text(encoding="utf-8").splitlines()
    show = None if tell is None else lambda done, total: tell("probes", done, total)
    report = make_report(experiment, folder, [json.loads(line) for line in lines], show)
    _draw(report, folder)
    write(folder / REPORT, report.model_dump_json(indent=2) + "\n")


_STAGES: Mapping[Stage, Callable[[Experiment, Path, Told | None], None]] = {
    "configure": _configure,
    "generate": _generate,
    "score": _score,
    "report": _report,
}


def _draw(report: Report, folder: Path) -> None:
    """Write the page, and a PNG of each chart; without a drawing library only the page."""
    from hookmap.evaluation.experiments.page import page

    pictures: dict[str, str] = {}
    try:
        import vl_convert

        from hookmap.analysis.charts import save_picture
        from hookmap.evaluation.experiments.charts import charts

        for name, chart in charts(report).items():
            save_picture(chart, folder / f"{name}.png")
            pictures[name] = vl_convert.vegalite_to_svg(chart.to_dict())
    except (CaptureError, ImportError):
        pass
    write(folder / PAGE, page(report, pictures))


def _config(experiment: Experiment) -> str:
    from hookmap.evaluation.experiments.questions import requests

    asked = [[r.id, r.prefix.text, r.question.question, r.question.target] for r in requests(experiment)]
    document = {
        "format_version": 1,
        "experiment": experiment.model_dump(mode="json"),
        "requests": len(asked),
        "requests_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _hold_against(folder: Path, experiment: Experiment, again: Stage | None) -> None:
    """Compare with the folder's config. Raises StoreError with everything that changed."""
    if again is not None and again not in _OWN:
        raise StoreError(f"again: expected one of {', '.join(_OWN)}, got {again!r}: what was generated stays.")
    if not (folder / CONFIG).is_file():
        return
    there, now = json.loads((folder / CONFIG).read_text(encoding="utf-8")), json.loads(_config(experiment))
    free = (*(_OWN[again] if again else ()), "stages", "batch_size")
    changed = [line for line in _changes(there, now) if line[0].split(".")[1:2] not in [[name] for name in free]]
    if not changed:
        return
    lines = "\n".join(f"  - {name.removeprefix('experiment.')}: there {a!r}, now {b!r}" for name, a, b in changed)
    parts = {name.split(".")[1] for name, _, _ in changed if "." in name}
    hint = f"Give another folder: -o, or the file as it was (it is in {folder / CONFIG})."
    for stage in reversed(_OWN):
        if parts and parts <= set(_OWN[stage]):
            hint = f"What was generated can stay: --again {stage}"
            break
    raise StoreError(f"{folder} holds another experiment:\n{lines}\n{hint}")


def _changes(there: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, dict) and isinstance(now, dict):
        for key in {**there, **now}:
            yield from _changes(there.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif there != now:
        yield name, there, now


def _need(folder: Path, stage: Stage) -> None:
    for before in STAGES[: STAGES.index(stage)]:
        if not (folder / _RESULT[before]).is_file():
            raise StoreError(f"{folder}: {stage} comes after {before}, which is not done: --stage {before}")


def _forget(folder: Path, stage: Stage) -> None:
    """Remove the results of this stage and the later ones, the last first, so that a kill leaves a valid folder."""
    for each in reversed(STAGES[STAGES.index(stage) :]):
        (folder / _RESULT[each]).unlink(missing_ok=True)
    shutil.rmtree(folder / PROBES, ignore_errors=True)
