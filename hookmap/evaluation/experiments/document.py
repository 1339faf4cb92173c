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
"""instead of a file: the example that comes with hookmap"""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Prefix(_Part):
    """Some words, and what they are called in the report."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="letters, digits, _ and -")
    text: str = Field(description="what stands before the question; may be empty")


class Samples(_Part):
    """Which questions."""

    data: str = Field(default="demo", description="demo, a file of rows with question and answer, or hf://NAME:SPLIT")
    number: int = Field(default=50, ge=2, description="of questions; each is asked after every prefix")
    seed: int | None = Field(default=None, description="draws them from the data; without it the first are taken")


class Sampling(_Part):
    """How answers are generated."""

    temperature: float = Field(default=0.0, ge=0, description="0 is greedy")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1, description="answers to each question after each prefix")
    max_tokens: int = Field(default=256, ge=1, description="of an answer; efficiency counts against it")
    seed: int = Field(default=0, description="every prompt draws with a seed of its own, made of this and its name")

    @model_validator(mode="after")
    def _greedy_draws_once(self) -> "Sampling":
        if not self.temperature and (self.n > 1 or self.top_p is not None or self.top_k is not None):
            raise ValueError("n, top_p and top_k need a temperature above 0: greedy answers are all the same")
        return self


class Captures(_Part):
    """What is kept of every answer; as in `hookmap capture`."""

    points: tuple[str, ...] | dict[str, int | tuple[int, ...] | Literal["all"] | None] | Literal["all"] = "all"
    layers: tuple[int, ...] | Literal["all"] = "all"
    calls: tuple[int, ...] | Literal["all", "last"] = field_of("calls")
    positions: str = Field(default="-1:", description="of which tokens; -1: is the prompt's last one and the answer")
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
    """Weights of the sum; a reward of weight 0 is told, too."""

    correctness: float = 1.0
    format: float = 0.0
    efficiency: float = 0.0
    scorer: Literal["strict", "flexible", "inspect_evals"] = Field(
        default="strict", description="which rule reads the number of an answer, and what its form is"
    )


class Reporting(_Part):
    """What the report looks at."""

    pools: tuple[Literal["last", "last_prompt", "mean", "mean_prompt", "mean_answer"], ...] = Field(
        default=("last_prompt", "mean_answer"), min_length=1, description="which rows of a sample, as in hookmap probe"
    )
    positions: str | None = Field(
        default=None, description="that the pools are of, as in captures: 1: leaves the first token out, often a sink"
    )
    method: Literal["logistic", "ridge", "mean_difference"] = "logistic"
    folds: int = Field(default=5, ge=3, description="of questions")
    seed: int = Field(default=0, ge=0, description="of folds, permutations")
    memory: float = Field(default=2.0, gt=0, description="GB that the matrices of probes may take")


class Experiment(_Part):
    """An experiment with prefixes: the whole file."""

    model: str = Field(default="demo", description="a hub id, a folder, or demo")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1, auto")
    prefixes: Annotated[tuple[Prefix, ...], Field(min_length=2)]
    neutral: str = Field(
        default="neutral", validate_default=True, description="the prefix that all others are compared with"
    )
    place: Literal["user", "system"] = Field(
        default="user", description="where the prefix stands: before the question, or as the system's message"
    )
    ask: Literal["gsm8k", "inspect_evals", "bare"] | None = Field(
        default=None, description="what form of answer is asked for; of demo data bare, else gsm8k"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="what the model's chat template reads: enable_thinking, …"
    )
    samples: Samples = Samples()
    sampling: Sampling = Sampling()
    captures: Captures | None = Field(default=None, description="left out, nothing is kept, and answers are compared")
    rewards: Rewards = Rewards()
    report: Reporting = Reporting()
    stages: tuple[Stage, ...] = Field(
        default=STAGES, min_length=1, description="that a run without --stage goes through"
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
            raise ValueError(f"{', '.join(twice)} is there twice")
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
        """The form that is asked for."""
        return self.ask or ("bare" if self.samples.data == "demo" else "gsm8k")


def load_experiment(path: str | Path) -> Experiment:
    """Read the file; paths in it are relative to it. Raises DataError with everything that is wrong."""
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
    """Paths of the file, seen from its folder. A hub id looks like a path too: only what is there is taken for one."""

    def there(name: str) -> str:
        return str((folder / name).resolve()) if name not in ("", "demo") and (folder / name).exists() else name

    samples = experiment.samples.model_copy(update={"data": there(experiment.samples.data)})
    return experiment.model_copy(update={"model": there(experiment.model), "samples": samples})


def schema() -> dict[str, Any]:
    """The JSON Schema of the file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Experiment.model_json_schema()}
