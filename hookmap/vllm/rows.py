"""Which rows of a step's tensors are whose: what a runner of vLLM knows of the step that it is about to run.

vLLM runs the tokens of many requests as one list: prompts or pieces of them, single new tokens, and after a preemption
tokens that it has run before. A runner's adapter says which rows are which request's, and from which position on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch

from hookmap.errors import CaptureError
from hookmap.vllm.draws import prepare

SUPPORTED = ("0.32",)
"""versions of vLLM whose runner the adapters were written and tested for"""


class Segment(NamedTuple):
    """The consecutive rows of one request in one step."""

    request: str
    """vLLM's own id"""
    first: int
    """the first row, in the step's tensors"""
    stop: int
    """one behind the last row"""
    position: int
    """which token of the request the first row is of, 0-based"""


class StepRows(Protocol):
    """What the capture needs of a runner."""

    name: ClassVar[str]
    """of the runner, as vLLM says it"""

    def watch(self, begin: Callable[[torch.Tensor | None], None], end: Callable[[], None]) -> None:
        """Call `begin` before each step of requests, with the positions that the model is fed, and `end` behind it.

        Steps of no request, by which vLLM measures memory or compiles, may be shown without segments.
        """

    def segments(self) -> list[Segment]:
        """The rows of the step that is about to run, ascending."""

    def arguments(self, request: str) -> Mapping[str, Any] | None:
        """`SamplingParams.extra_args` of a request."""

    def prompt_tokens(self, request: str) -> int:
        """Tokens of its prompt."""

    def token_ids(self, segment: Segment) -> list[int]:
        """The tokens that these rows are of."""

    def known(self, request: str) -> bool:
        """Whether the runner still has this request."""


class RunnerV1:
    """`vllm.v1.worker.gpu_model_runner.GPUModelRunner` and its subclasses."""

    name: ClassVar[str] = "V1"

    def __init__(self, runner: Any) -> None:
        """Raises CaptureError where the runner lacks what is read here."""
        _hold(runner, "query_start_loc", "input_batch", "requests", "_model_forward", "model")
        self._runner = runner

    def watch(self, begin: Callable[[torch.Tensor | None], None], end: Callable[[], None]) -> None:
        """See `StepRows`."""
        runner, forward = self._runner, self._runner._model_forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            if runner.device.type == "cpu" and runner.input_batch.generators:
                prepare(runner, {each.request: each.position + each.stop - each.first for each in self.segments()})
            begin(kwargs.get("positions"))
            output = forward(*args, **kwargs)
            end()
            return output

        runner._model_forward = watched

    def segments(self) -> list[Segment]:
        """See `StepRows`."""
        batch = self._runner.input_batch
        names = batch.req_ids
        starts = self._runner.query_start_loc.np[: len(names) + 1].tolist()
        positions = batch.num_computed_tokens_cpu[: len(names)].tolist()
        return [*map(Segment, names, starts, starts[1:], positions)]

    def arguments(self, request: str) -> Mapping[str, Any] | None:
        """See `StepRows`."""
        parameters = self._runner.requests[request].sampling_params
        return None if parameters is None else parameters.extra_args

    def prompt_tokens(self, request: str) -> int:
        """See `StepRows`."""
        return int(self._runner.requests[request].num_prompt_tokens)

    def token_ids(self, segment: Segment) -> list[int]:
        """See `StepRows`."""
        batch = self._runner.input_batch
        row = batch.token_ids_cpu[batch.req_id_to_index[segment.request]]
        found: list[int] = row[segment.position : segment.position + segment.stop - segment.first].tolist()
        return found

    def known(self, request: str) -> bool:
        """See `StepRows`."""
        return request in self._runner.requests


class _Request(NamedTuple):
    """What a V2 runner is told of a request, and does not keep."""

    arguments: Mapping[str, Any] | None
    prompt_tokens: int


class RunnerV2:
    """`vllm.v1.worker.gpu.model_runner.GPUModelRunner` and its subclasses.

    It sorts its requests anew for each step, and forgets those that are preempted: they come back as new ones.
    """

    name: ClassVar[str] = "V2"

    def __init__(self, runner: Any) -> None:
        """Raises CaptureError where the runner lacks what is read here."""
        _hold(runner, "execute_model", "model_state", "model")
        if (new := runner.model_state.num_new_sampled_tokens_per_step) != 1:
            raise CaptureError(
                f"{type(runner.model).__name__} draws tokens in blocks, {new} new ones in a step, and some of them "
                "again: their rows are no sample's."
            )
        self._runner = runner
        self._batch: Any = None
        self._requests: dict[str, _Request] = {}

    def watch(self, begin: Callable[[torch.Tensor | None], None], end: Callable[[], None]) -> None:
        """See `StepRows`."""
        runner, state = self._runner, self._runner.model_state
        execute, prepare_inputs = runner.execute_model, state.prepare_inputs

        def prepared(batch: Any, states: Any) -> Any:
            inputs = prepare_inputs(batch, states)
            if batch.req_ids[0] in self._requests:  # and not vLLM's own, of a step without requests
                self._batch = batch
                begin(inputs.get("positions", batch.positions))
            return inputs

        def executed(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            for name in scheduled.finished_req_ids:
                self._requests.pop(name, None)
            for new in scheduled.scheduled_new_reqs:
                parameters = new.sampling_params
                arguments = None if parameters is None else parameters.extra_args
                self._requests[new.req_id] = _Request(arguments, new.prompt_len)
            output = execute(scheduled, *args, **kwargs)
            end()
            return output

        runner.execute_model, state.prepare_inputs = executed, prepared

    def segments(self) -> list[Segment]:
        """See `StepRows`."""
        batch = self._batch
        starts = batch.query_start_loc_np[: len(batch.req_ids) + 1].tolist()
        return [*map(Segment, batch.req_ids, starts, starts[1:], batch.num_computed_tokens_np.tolist())]

    def arguments(self, request: str) -> Mapping[str, Any] | None:
        """See `StepRows`."""
        return self._requests[request].arguments

    def prompt_tokens(self, request: str) -> int:
        """See `StepRows`."""
        return self._requests[request].prompt_tokens

    def token_ids(self, segment: Segment) -> list[int]:
        """See `StepRows`."""
        found: list[int] = self._batch.input_ids[segment.first : segment.stop].tolist()
        return found

    def known(self, request: str) -> bool:
        """See `StepRows`."""
        return request in self._requests


_RUNNERS: dict[str, type[RunnerV1 | RunnerV2]] = {
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": RunnerV1,
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner": RunnerV2,
}


def _hold(runner: Any, *needed: str) -> None:
    """Raises CaptureError where a runner has not all of these."""
    if lacking := [name for name in needed if not hasattr(runner, name)]:
        raise CaptureError(
            f"{type(runner).__module__}.{type(runner).__name__} has no {', '.join(lacking)}: the rows of its steps "
            f"cannot be told. Expected vLLM {' or '.join(SUPPORTED)}."
        )


def rows_of(runner: Any, version: str) -> StepRows:
    """The adapter for a worker's runner. Raises CaptureError for one that no adapter is known for."""
    kind = type(runner)
    if version.split("+")[0].rpartition(".")[0] not in SUPPORTED:
        raise CaptureError(
            f"vLLM {version}: which rows of a step are whose is known of vLLM {', '.join(SUPPORTED)} only. "
            f"Install one of those: pip install 'vllm=={SUPPORTED[-1]}.*'"
        )
    names = [f"{each.__module__}.{each.__qualname__}" for each in kind.__mro__]
    if (adapter := next((_RUNNERS[name] for name in names if name in _RUNNERS), None)) is not None:
        return adapter(runner)
    raise CaptureError(
        f"{names[0]} is a model runner that hookmap does not read rows of. Run vLLM with its V1 runner: "
        "VLLM_USE_V2_MODEL_RUNNER=0"
    )


def check_positions(segments: Sequence[Segment], positions: torch.Tensor) -> None:
    """Raises CaptureError where the positions that the model is fed are not those of the segments.

    `positions`: [tokens] of the step, or [axes, tokens] where positions have several (multimodal rotary embeddings).
    """
    fed = (positions if positions.ndim == 1 else positions[0]).cpu().numpy()
    first, stop, position = map(np.array, list(zip(*segments, strict=True))[1:])
    count = stop - first
    rows = np.repeat(stop - np.cumsum(count), count) + np.arange(count.sum())
    if len(fed) <= rows[-1] or not np.array_equal(fed[rows], rows + np.repeat(position - first, count)):
        raise CaptureError(
            "the positions that vLLM feeds the model are not those that its runner tells of: the rows of this step "
            "cannot be told. Please report this with the version of vLLM and the model."
        )
