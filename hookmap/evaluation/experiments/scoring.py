"""Rewards as an inspect_ai scorer: writes a scored log for its viewer, and a line for each answer."""

from pathlib import Path
from typing import Any

from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState

from hookmap.evaluation.experiments.document import Experiment
from hookmap.evaluation.experiments.rewards import NAMES, TOTAL, rewarded
from hookmap.evaluation.gsm8k.results import METADATA, is_truncated, lines, write

ANSWERS, SCORED = "answers.jsonl", "scored"
_EACH = "answers"


@scorer(metrics={"*": [mean(), stderr()]}, name="rewards")
def rewards_scorer(most: int, weights: dict[str, Any]) -> Scorer:
    """The mean of each reward over the answers of a sample. most: the limit of tokens of an answer."""

    async def score(state: TaskState, target: Target) -> Score:
        tokens = (state.output.metadata or {})[METADATA]["tokens"]
        each = [
            rewarded(choice.message.text, target.text, count, most, weights)
            for choice, count in zip(state.output.choices, tokens, strict=True)
        ]
        means = {name: sum(one[name] for one in each) / len(each) for name in (*NAMES, TOTAL)}
        return Score(value=means, metadata={_EACH: each})

    return score


def score_answers(experiment: Experiment, folder: Path, log_name: str) -> int:
    """Write the scored log, then answers.jsonl, each whole. Returns how many answers there are."""
    from inspect_ai import score
    from inspect_ai.log import read_eval_log, write_eval_log

    from hookmap.evaluation.gsm8k.results import LOGS

    log = read_eval_log(str(folder / LOGS / log_name))
    rewards = rewards_scorer(experiment.sampling.max_tokens, experiment.rewards.model_dump())
    scored = score(log, rewards, action="overwrite", display="none", model="none")  # or inspect loads the model
    (folder / SCORED).mkdir(exist_ok=True)
    for old in (folder / SCORED).glob("*.eval"):
        old.unlink()
    write_eval_log(scored, str(folder / SCORED / log_name))
    rows = [row for sample in scored.samples or [] for row in _rows(sample)]
    write(folder / ANSWERS, lines(sorted(rows, key=lambda row: row["id"])))
    return len(rows)


def _rows(sample: Any) -> list[dict[str, Any]]:
    """A line for each answer of a sample."""
    rewards = sample.scores["rewards"].metadata[_EACH]
    tokens = sample.output.metadata[METADATA]["tokens"]
    return [
        {
            "id": f"{sample.id}.{draw}",
            **sample.metadata,
            "draw": draw,
            "target": str(sample.target),
            "text": choice.message.text,
            "tokens": tokens[draw],
            "truncated": is_truncated(choice),
            "rewards": rewards[draw],
            "correct": bool(rewards[draw]["correctness"]),
        }
        for draw, choice in enumerate(sample.output.choices)
    ]
