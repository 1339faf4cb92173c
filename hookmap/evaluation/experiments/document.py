"""The YAML file of an experiment."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from hookmap.capture.options import field_of
from hookmap.errors import DataError, SelectionError
from hookmap.loading.yaml_file import read_yaml

Stage = Literal["configure", "generate", "score", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)
BUNDLED = "demo"
"""the name of the example that comes with hookmap, given instead of a file"""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Prefix(_Part):
    """A text that is put before each question, and its name in the report."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name: letters, digits, _ and -")
    text: str = Field(description="the text before the question; it may be empty")


class Samples(_Part):
    """Which questions are asked."""

    data: str = Field(
        default="demo", description="demo, a file whose rows have a question and an answer, or hf://NAME:SPLIT"
    )
    number: int = Field(default=50, ge=2, description="number of questions; each is asked with every prefix")
    seed: int | None = Field(
        default=None,
        description="seed of a random choice of questions; without it, the first ones of the data are asked",
    )


class Sampling(_Part):
    """How answers are generated."""

    temperature: float = Field(default=0.0, ge=0, description="0 is greedy")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1, description="number of answers to each question with each prefix")
    max_tokens: int = Field(
        default=256, ge=1, description="the most tokens of an answer; the reward for efficiency is relative to it"
    )
    seed: int = Field(
        default=0, description="seed of the run; each prompt is sampled with a seed made of it and the prompt's id"
    )

    @model_validator(mode="after")
    def _greedy_draws_once(self) -> "Sampling":
        if not self.temperature and (self.n > 1 or self.top_p is not None or self.top_k is not None):
            raise ValueError("n, top_p and top_k need a temperature above 0: greedy answers are all the same")
        return self


class Captures(_Part):
    """Which activations of each answer are stored; the options are those of `hookmap capture`."""

    points: tuple[str, ...] | dict[str, int | tuple[int, ...] | Literal["all"] | None] | Literal["all"] = "all"
    layers: tuple[int, ...] | Literal["all"] = "all"
    calls: tuple[int, ...] | Literal["all", "last"] = field_of("calls")
    positions: str = Field(
        default="-1:", description="which tokens; `-1:` is the last token of the prompt and the answer"
    )
    every: int = field_of("every", ge=1)
    mean: bool = field_of("mean")
    keep_dtype: str | None = field_of("keep_dtype")
    overflow: Literal["warn", "refuse"] = field_of("overflow")

    @model_validator(mode="after")
    def _kept(self) -> "Captures":
        from hookmap.capture.rows import row_selection  # it imports torch, which the schema does not need

        try:
            row_selection(positions=self.positions, every=self.every, mean=self.mean, keep_dtype=self.keep_dtype)
        except SelectionError as error:
            raise ValueError(str(error)) from error
        return self


class Rewards(_Part):
    """The weight of each reward in the total. A reward with weight 0 is reported too."""

    correctness: float = 1.0
    format: float = 0.0
    efficiency: float = 0.0
    scorer: Literal["strict", "flexible", "inspect_evals"] = Field(
        default="strict",
        description="the rule that finds the number in an answer, and that says which form it should have",
    )


class Reporting(_Part):
    """What the report contains."""

    pools: tuple[Literal["last", "last_prompt", "mean", "mean_prompt", "mean_answer"], ...] = Field(
        default=("last_prompt", "mean_answer"),
        min_length=1,
        description="which rows of a sample a probe reads, as in `hookmap probe`",
    )
    positions: str | None = Field(
        default=None,
        description="which tokens the pools use, as in captures; `1:` leaves out the first token, often a sink",
    )
    method: Literal["logistic", "ridge", "mean_difference"] = "logistic"
    folds: int = Field(default=5, ge=3, description="number of folds; the questions are divided among them")
    seed: int = Field(default=0, ge=0, description="seed of the folds and of the permutations")
    memory: float = Field(default=2.0, gt=0, description="the most memory for the probes' matrices, in GB")


class Experiment(_Part):
    """An experiment file: it compares the model's answers to the same questions with different prefixes."""

    model: str = Field(default="demo", description="a hub id, a folder, or demo")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1, auto")
    prefixes: Annotated[tuple[Prefix, ...], Field(min_length=2)]
    neutral: str = Field(
        default="neutral", validate_default=True, description="the name of the prefix that all others are compared with"
    )
    place: Literal["user", "system"] = Field(
        default="user",
        description="where the prefix is put: before the question (user), or in the system message",
    )
    ask: Literal["gsm8k", "inspect_evals", "bare"] | None = Field(
        default=None,
        description="which form of answer the prompt asks for; for the demo data it is bare, otherwise gsm8k",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="variables for the model's chat template, such as enable_thinking"
    )
    samples: Samples = Samples()
    sampling: Sampling = Sampling()
    captures: Captures | None = Field(
        default=None, description="if it is left out, no activations are stored, and only answers are compared"
    )
    rewards: Rewards = Rewards()
    report: Reporting = Reporting()
    stages: tuple[Stage, ...] = Field(
        default=STAGES, min_length=1, description="the stages that a run without --stage performs"
    )
    batch_size: int = Field(default=16, ge=1)

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        if stages != STAGES[: len(stages)]:
            raise ValueError(f"expected the first of {', '.join(STAGES)}, in this order")
        return stages

    @field_validator("prefixes")
    @classmethod
    def _named_once(cls, prefixes: tuple[Prefix, ...]) -> tuple[Prefix, ...]:
        names = [prefix.name for prefix in prefixes]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the names of prefixes must differ; given twice: {', '.join(twice)}")
        return prefixes

    @field_validator("neutral")
    @classmethod
    def _is_a_prefix(cls, neutral: str, info: ValidationInfo) -> str:
        names = [prefix.name for prefix in info.data.get("prefixes", ())]
        if names and neutral not in names:
            raise ValueError(f"{neutral!r} is none of the prefixes {', '.join(names)}")
        return neutral

    @property
    def prompt(self) -> str:
        """The form of answer that the prompt asks for."""
        return self.ask or ("bare" if self.samples.data == "demo" else "gsm8k")


def load_experiment(path: str | Path) -> Experiment:
    """Read the file. Paths in it are relative to its folder. Raises DataError that lists every problem."""
    file = Path(__file__).parents[2] / "demo" / "emotions.yaml" if str(path) == BUNDLED else Path(path)
    try:
        document = read_yaml(file)
    except ValueError as error:
        raise DataError(str(error)) from error
    if not isinstance(document, dict):
        raise DataError(f"{file}: expected keys such as `prefixes:`, found {document!r}.")
    try:
        return _from(file.parent, Experiment.model_validate(document))
    except ValidationError as error:
        lines = [f"  - {'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        hint = "The form: docs/experiments.md, or hookmap experiment --schema"
        raise DataError(f"{file}:\n" + "\n".join(lines) + f"\n{hint}") from error


def _from(folder: Path, experiment: Experiment) -> Experiment:
    """Make the paths in the file absolute. A hub id looks like a path too, so only existing paths count as paths."""

    def there(name: str) -> str:
        return str((folder / name).resolve()) if name not in ("", "demo") and (folder / name).exists() else name

    samples = experiment.samples.model_copy(update={"data": there(experiment.samples.data)})
    return experiment.model_copy(update={"model": there(experiment.model), "samples": samples})


def schema() -> dict[str, Any]:
    """The JSON Schema of the file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Experiment.model_json_schema()}
