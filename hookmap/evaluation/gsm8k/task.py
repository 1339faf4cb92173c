"""GSM8K as an inspect_ai task, with or without a calculator, and with three scorers."""

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import CORRECT, INCORRECT, Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import Solver, TaskState, prompt_template, use_tools
from inspect_ai.tool import Tool, ToolError, tool

from hookmap.evaluation.gsm8k.answers import SCORERS, numbers, same
from hookmap.evaluation.gsm8k.calculator import calculate
from hookmap.evaluation.gsm8k.draws import generating
from hookmap.evaluation.gsm8k.problems import DEMO, read_questions

MODES = ("no-tools", "with-tools")
PROMPTS = {
    "gsm8k": "{prompt}\n\nThink step by step. End with a line `#### x`, where x is the answer as a number.",
    "inspect_evals": "{prompt}\n\nThink step by step. End with a line `ANSWER: x`, where x is the answer as a number.",
    "bare": "{prompt}",
}


@tool(name="calculator")
def calculator() -> Tool:
    """A calculator that the model may call."""

    async def execute(expression: str) -> str:
        """Work out arithmetic.

        Args:
            expression: Numbers, + - * / and brackets, such as 3 * (4 + 1).
        """
        try:
            return calculate(expression)
        except ValueError as error:
            raise ToolError(str(error)) from error

    return execute


def _scorer(name: str) -> Scorer:
    read = SCORERS[name]

    async def score(state: TaskState, target: Target) -> Score:
        found = read(state.output.completion)
        right = any(same(found, wanted) for wanted in numbers(target.text)[-1:])
        return Score(value=CORRECT if right else INCORRECT, answer=None if found is None else str(found))

    return score


@scorer(metrics=[accuracy(), stderr()], name="strict")
def strict_scorer() -> Scorer:
    """Compares the number after `####`."""
    return _scorer("strict")


@scorer(metrics=[accuracy(), stderr()], name="flexible")
def flexible_scorer() -> Scorer:
    """Compares the last number."""
    return _scorer("flexible")


@scorer(metrics=[accuracy(), stderr()], name="inspect_evals")
def inspect_evals_scorer() -> Scorer:
    """Compares the number after `ANSWER:`."""
    return _scorer("inspect_evals")


@task(name="gsm8k")
def gsm8k(
    source: str = DEMO,
    samples: int | None = None,
    skip: int = 0,
    mode: str = "no-tools",
    prompt: str = "gsm8k",
    seed: int | None = None,
) -> Task:
    """The task. source, samples, skip: see `read_questions`. mode: one of MODES. prompt: a key of PROMPTS.

    seed: seed of sampling; each question draws from a generator of its own.
    """
    questions = [
        Sample(id=q.id, input=q.question, target=q.target, metadata={"worked_answer": q.answer})
        for q in read_questions(source, samples, skip)
    ]
    tools: list[Solver] = [use_tools(calculator())] if mode == "with-tools" else []
    return Task(
        dataset=MemoryDataset(questions, name="gsm8k"),
        solver=[prompt_template(PROMPTS[prompt]), *tools, generating(seed)],
        scorer=[strict_scorer(), flexible_scorer(), inspect_evals_scorer()],
        metadata={"mode": mode, "prompt": prompt},
    )
