"""Run GSM8K, or resume it after a kill: samples that inspect's log has finished are not run again."""

import json
from pathlib import Path
from typing import Any

from hookmap.errors import CaptureError, StoreError
from hookmap.evaluation.gsm8k.problems import DEMO
from hookmap.evaluation.gsm8k.results import BATCHES, LOGS, write, write_results
from hookmap.evaluation.gsm8k.task import MODES, PROMPTS, gsm8k
from hookmap.evaluation.inspect_provider import MAX_TOKENS, HookmapAPI, remove_captures
from hookmap.stores.durable_files import temporary, writing

SETTINGS, INSPECTS = "settings.json", "inspect:"
_SCORER_OF = {"gsm8k": "strict", "bare": "strict", "inspect_evals": "inspect_evals"}


def evaluate(
    folder: str | Path,
    model: str = "demo",
    *,
    source: str = DEMO,
    samples: int | None = None,
    skip: int = 0,
    mode: str = "no-tools",
    prompt: str | None = None,
    parallel: int = 8,
    points: Any = (),
    layers: Any = "all",
    calls: Any = "all",
    max_tokens: int = MAX_TOKENS,
    temperature: float | None = None,
    seed: int | None = None,
    opening: dict[str, Any] | None = None,
    display: str = "none",
) -> dict[str, Any]:
    """Evaluate, write the results folder, and return its summary. The same call again goes on where it stopped.

    model: a hub id, a folder, `demo`, or one of inspect's own (`inspect:openai/…`). Of those only a model of `hookmap
    serve` (`inspect:openai-api/hookmap/NAME`) takes points: they are kept there, a session for each generation.
    opening: options of hookmap.open. parallel: samples at once, the size of a batch. prompt: a key of PROMPTS.
    Raises StoreError where the folder is of another run, CaptureError where samples failed.
    """
    if mode not in MODES or (prompt is not None and prompt not in PROMPTS):
        raise CaptureError(f"expected a mode of {', '.join(MODES)} and a prompt of {', '.join(PROMPTS)}.")
    prompt = prompt or ("bare" if source == DEMO else "gsm8k")
    settings: dict[str, Any] = {"model": model, "source": str(source), "samples": samples, "skip": skip, "mode": mode}
    settings |= {"prompt": prompt, "scorer": _SCORER_OF[prompt], "points": points, "layers": layers}
    of_calls = {} if calls == "all" else {"calls": calls}  # what was begun before there were calls goes on
    settings |= of_calls
    settings |= {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "opening": opening or {}}
    target = Path(folder)
    _same_run(target, settings)
    own = not model.startswith(INSPECTS)
    arguments = {"points": points, "layers": layers, **of_calls, "captures": str(target / BATCHES)}
    log = finished_log(
        gsm8k(str(source), samples, skip, mode, prompt, seed),
        target,
        f"hookmap/{model}" if own else model.removeprefix(INSPECTS),
        {**arguments, **(opening or {})} if own else {},
        parallel=parallel,
        display=display,
        max_tokens=max_tokens,
        temperature=temperature,
        extra_body={"hookmap": _recording(points, layers) | of_calls} if points and not own else None,
        log_model_api=not own,  # where the sessions are named
    )
    summary = write_results(target, log, settings)
    remove_captures(target / BATCHES)
    return summary


def finished_log(
    task: Any, folder: Path, model: str, arguments: dict[str, Any], *, parallel: int, display: str, **config: Any
) -> Any:
    """Run or resume the task in `folder`. Returns inspect's EvalLog. Raises CaptureError if samples failed.

    arguments: of the model. config: of the generation; None means the model's own.
    """
    from inspect_ai import eval_set
    from inspect_ai.log import read_eval_log
    from inspect_ai.model import GenerateConfig, get_model

    # A batch's size is in the config, by which inspect does not tell runs apart: it may be another after a kill.
    opened = get_model(model, config=GenerateConfig(max_connections=parallel), **arguments)
    if isinstance(opened.api, HookmapAPI):
        _ = opened.api.hooked  # what is wrong with the model or the points is said before anything runs
    done, logs = eval_set(
        task,
        log_dir=str(folder / LOGS),
        model=opened,
        retry_attempts=1,
        retry_wait=0,
        log_buffer=1,  # a sample that is finished is in the log
        max_samples=parallel,
        display=display,
        score_display=False,
        max_connections=parallel,
        **{name: value for name, value in config.items() if value is not None},
    )
    if not done:
        why = "; ".join(str(log.error.message) for log in logs if log.error is not None) or "see inspect's log"
        raise CaptureError(f"not all samples were answered: {why}\nThe same command again goes on: -o {folder}")
    return read_eval_log(logs[0].location)


def _recording(points: Any, layers: Any) -> dict[str, Any]:
    """What the server is asked to keep."""
    listed = [layers] if isinstance(layers, int) else layers
    return {"points": points, "layers": listed, "return": "store"}


def _same_run(folder: Path, settings: dict[str, Any]) -> None:
    """Keep the run's settings, or hold them against those that something has run with already."""
    file = folder / SETTINGS
    wanted = json.loads(json.dumps(settings, default=str))
    if file.is_file() and (folder / LOGS).is_dir():
        there = json.loads(file.read_text(encoding="utf-8"))
        if lines := [f"  - {k}: there {there.get(k)!r}, now {v!r}" for k, v in wanted.items() if there.get(k) != v]:
            raise StoreError(f"{folder} holds another evaluation:\n" + "\n".join(lines) + "\nGive another folder: -o")
        return
    if folder.is_dir() and any(path not in (file, temporary(file)) for path in folder.iterdir()):
        raise StoreError(f"{folder} is not empty, and holds no evaluation. Give another folder: -o")
    if folder.is_file():
        raise StoreError(f"{folder} is a file: expected a new folder. Give another one: -o")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps(wanted, indent=2) + "\n")
