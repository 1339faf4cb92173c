"""The entry point `vllm.general_plugins`: in every process of vLLM, it does nothing unless hookmap is asked for.

It is asked for by vLLM's own `additional_config={"hookmap": {...}}`, on the command line `--additional-config`.
"""

import functools
import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hookmap.errors import CaptureError
from hookmap.vllm.spec import NAME

WORKER = "hookmap.vllm.worker.HookmapWorker"
DEFAULT_TAPS = ("resid_pre", "resid_mid", "resid_post", "mixer_out", "mlp_out")
"""points that a compiled model has taps for, where it has the points"""


class ServingSettings(BaseModel):
    """What `vllm serve` may keep for requests with a `hookmap` field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sessions: str | None = Field(default=None, min_length=1, description="the folder of the sessions; null: none")
    max_bytes: int = Field(default=20 * 2**30, ge=1, description="of all sessions; the oldest go first")
    max_sessions: int = Field(default=10_000, ge=1, description="the oldest go first")
    max_age: float = Field(default=7 * 24 * 3600.0, gt=0, description="seconds that a session stays")
    request_bytes: int = Field(default=2 * 2**30, ge=1, description="of activations that a request may keep")
    inline_bytes: int = Field(default=16 * 2**20, ge=1, description="of activations that an answer may carry")


Layers = Annotated[
    Literal["all"] | list[int],
    BeforeValidator(lambda given: [given] if isinstance(given, int) and not isinstance(given, bool) else given),
]
"""the layers of a point: "all", one, or several"""


class EngineSettings(BaseModel):
    """What `additional_config["hookmap"]` may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    taps: dict[str, Layers] | None = Field(
        default=None,
        description="points that a compiled model can capture and write, with their layers; the stream and what the "
        "branches add, of all layers, unless given",
    )
    functions: list[str] = Field(
        default=[], description='functions that interventions may name, "package.module:function": workers import them'
    )
    untaken_bytes: int = Field(
        default=2**32, ge=0, description="of requests that have ended and whose rows nobody takes; the oldest go first"
    )
    serving: ServingSettings = ServingSettings()
    version: str = Field(default="", description="of hookmap: compiled code is not shared between versions")


def register() -> None:
    """Make vLLM use hookmap's worker where its config asks for hookmap. May be called any number of times."""
    from vllm.config import CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    made = EngineArgs.create_engine_config
    if getattr(made, "_hookmap", False):
        return

    @functools.wraps(made)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if NAME in (self.additional_config or {}):
            settings = settings_of(self.additional_config)
            if self.worker_cls not in ("auto", WORKER):
                raise CaptureError(f"worker_cls={self.worker_cls!r}: hookmap brings a worker of its own. Leave it out.")
            self.worker_cls = WORKER
            os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # read when the config is made, below
            self.additional_config = {**self.additional_config, NAME: settings.model_dump()}
            refuse_changed(self, current_platform.is_cpu())
            self.async_scheduling = False
            if not current_platform.is_cpu():  # a graph that is replayed calls no Python
                self.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        config = made(self, *args, **kwargs)
        if NAME in (self.additional_config or {}):
            refuse_unserved(config)
        return config

    create_engine_config._hookmap = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def refuse_changed(arguments: Any, on_cpu: bool) -> None:
    """Raises CaptureError for what a user asks of vLLM and hookmap switches off. `arguments`: an EngineArgs."""
    if arguments.async_scheduling:
        raise CaptureError(
            "async_scheduling: a step would begin before the tokens of the last one are known, and captures know whose "
            "each row is when it begins. Leave it out; it is off."
        )
    graphs = arguments.compilation_config.cudagraph_mode
    asked = {
        "cudagraph_mode": graphs is not None and graphs.name != "NONE",
        "cudagraph_capture_sizes": arguments.cudagraph_capture_sizes is not None,
        "max_cudagraph_capture_size": arguments.max_cudagraph_capture_size is not None,
    }
    if not on_cpu and (named := [name for name, given in asked.items() if given]):
        raise CaptureError(f"{', '.join(named)}: a replayed graph runs no tap, so graphs are off. Leave it out.")


def refuse_unserved(config: Any) -> None:
    """Raises CaptureError for ways to run whose rows are not the tokens', or that were never seen to run."""
    parallel = config.parallel_config
    if config.model_config.runner_type != "generate":
        raise CaptureError(
            f"runner={config.model_config.runner_type!r}: captures run on models that generate. Leave runner "
            "and convert out, or open the model with hookmap.open."
        )
    if config.speculative_config is not None:
        raise CaptureError("speculative decoding takes tokens back, whose rows are no sample's: leave it out.")
    if config.kv_transfer_config is not None:
        raise CaptureError(
            "kv_transfer_config, kv_offloading_size: what keeps keys and values outside of the engine may know "
            "requests by their tokens alone, and give what an edited one has computed to others. Leave it out."
        )
    pieces = {
        "prefill_context_parallel_size": (
            parallel.prefill_context_parallel_size > 1,
            "each process has a part of a prompt's tokens",
        ),
        "enable_dbo, ubatch_size": (parallel.use_ubatching, "the halves of a step run side by side"),
        "kv_sharing_fast_prefill": (
            config.cache_config.kv_sharing_fast_prefill,
            "the last layers compute the last token of a prompt alone",
        ),
    }
    for name, (used, why) in pieces.items():
        if used:
            raise CaptureError(f"{name}: {why}, and captures read whole steps. Leave it out.")
    if (engines := parallel.data_parallel_size) > 1 and config.model_config.is_moe:
        raise CaptureError(
            f"data_parallel_size={engines}: the engines of a model with experts run in step and exchange tokens, "
            "which vLLM 0.32 does not do on a CPU, and which was not tried elsewhere. Share the model by "
            "tensor_parallel_size or pipeline_parallel_size; or run a capture for each part of the prompts, in folders "
            "of their own, and join these: hookmap store merge."
        )


def settings_of(additional: Any) -> EngineSettings:
    """What a config of vLLM says of hookmap. Raises CaptureError."""
    from hookmap._version import __version__

    try:
        found = EngineSettings.model_validate(additional[NAME])
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise CaptureError(f"additional_config[{NAME!r}]: {told}") from error
    return found.model_copy(update={"version": __version__})
