"""Ask each question with each prefix in one inspect_ai task, and join the activations of all answers in one capture."""

from pathlib import Path
from typing import Any

from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as Asked
from inspect_ai.model import ChatMessage, ChatMessageSystem, ChatMessageUser

from hookmap.evaluation.experiments.document import Experiment
from hookmap.evaluation.experiments.questions import Request, requests
from hookmap.evaluation.gsm8k.draws import generating
from hookmap.evaluation.gsm8k.gathering import Taken, gather, is_gathered
from hookmap.evaluation.gsm8k.results import ACTIVATIONS, BATCHES, place_of
from hookmap.evaluation.gsm8k.run import finished_log
from hookmap.evaluation.gsm8k.task import PROMPTS
from hookmap.evaluation.inspect_provider import remove_captures


def messages(experiment: Experiment, request: Request) -> list[ChatMessage]:
    """The messages that the model is sent."""
    asked = PROMPTS[experiment.prompt].format(prompt=request.question.question)
    words = request.prefix.text
    if not words:
        return [ChatMessageUser(content=asked)]
    if experiment.place == "system":
        return [ChatMessageSystem(content=words), ChatMessageUser(content=asked)]
    return [ChatMessageUser(content=f"{words} {asked}")]


def task(experiment: Experiment, asked: list[Request]) -> Task:
    """The inspect_ai task. It has no scorers, because scoring is a stage of its own."""
    samples = [
        Asked(
            id=request.id,
            input=messages(experiment, request),
            target=request.question.target,
            metadata={"question": request.question.id, "prefix": request.prefix.name},
        )
        for request in asked
    ]
    seed = experiment.sampling.seed if experiment.sampling.temperature else None
    return Task(dataset=MemoryDataset(samples, name="prefixes"), solver=[generating(seed)], name="prefixes")


def generate(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Write all answers to inspect's log and their activations to one capture. Returns counts.

    A run that was killed goes on where it stopped.
    """
    asked, sampling, captures = requests(experiment), experiment.sampling, experiment.captures
    arguments: dict[str, Any] = {"dtype": experiment.dtype}
    if experiment.device is not None:
        arguments["device"] = experiment.device
    if experiment.chat_template_kwargs:
        arguments["chat_template_kwargs"] = experiment.chat_template_kwargs
    if captures is not None:
        keep = captures.model_dump(include={"positions", "every", "mean", "keep_dtype", "overflow"}, exclude_none=True)
        arguments |= {"points": _listed(captures.points), "layers": _listed(captures.layers), "keep": keep}
        arguments |= {} if captures.calls == "all" else {"calls": _listed(captures.calls)}
        arguments["captures"] = str(folder / BATCHES)
    log = finished_log(
        task(experiment, asked),
        folder,
        f"hookmap/{experiment.model}",
        arguments,
        parallel=experiment.batch_size,
        display="none",
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature or None,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        num_choices=sampling.n if sampling.n > 1 else None,
    )
    if captures is not None and not is_gathered(folder / ACTIVATIONS):
        gather(folder / BATCHES, folder / ACTIVATIONS, _taken(asked, log), {"experiment": "prefixes"})
    remove_captures(folder / BATCHES)
    return {"answers": sum(len(s.output.choices) for s in log.samples), "log": Path(log.location).name}


def _listed(chosen: Any) -> Any:
    if isinstance(chosen, dict):
        return {name: _listed(layers) for name, layers in chosen.items()}
    return list(chosen) if isinstance(chosen, tuple) else chosen


def _taken(asked: list[Request], log: Any) -> list[Taken]:
    by_id = {str(sample.id): place_of(sample) for sample in log.samples}
    found: list[Taken] = []
    for request in asked:
        where = by_id[request.id]
        assert where is not None  # points were asked for
        labels = {"question": request.question.id, "prefix": request.prefix.name}
        for draw, number in enumerate(where["samples"]):
            name, more = request.answer_id(draw), {**labels, "draw": draw}
            found.append(Taken(where["capture"], number, len(found), name, more))
    return found
