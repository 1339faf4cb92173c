"""What cannot be served is refused by name, when the model is opened or before."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.on_vllm import SETTINGS

import hookmap
from hookmap.errors import CaptureError, HookmapError
from hookmap.vllm import opening as testing
from hookmap.vllm.plugin import WORKER, refuse_unserved, register, settings_of
from hookmap.vllm.rows import RunnerV1, RunnerV2, Segment, check_positions, rows_of


class OtherRunner:
    pass


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0.0", "0.32"])
def test_another_version_is_refused_by_name(version: str) -> None:
    with pytest.raises(CaptureError, match=f"vLLM {version}: .*known of vLLM 0.32 only"):
        rows_of(OtherRunner(), version)


def test_another_runner_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"OtherRunner is a model runner .* VLLM_USE_V2_MODEL_RUNNER=0"):
        rows_of(OtherRunner(), "0.32.0+cpu")
    with pytest.raises(CaptureError, match="has no query_start_loc, input_batch, requests, _model_forward, model"):
        RunnerV1(OtherRunner())
    with pytest.raises(CaptureError, match="has no execute_model, model_state, model"):
        RunnerV2(OtherRunner())
    diffusing = SimpleNamespace(
        execute_model=None, model=OtherRunner(), model_state=SimpleNamespace(num_new_sampled_tokens_per_step=0)
    )
    with pytest.raises(CaptureError, match="OtherRunner draws tokens in blocks, 0 new ones in a step"):
        RunnerV2(diffusing)


def test_the_runner_is_the_one_that_is_asked_for(on_vllm: Any) -> None:
    asked = {"0": "V1", "1": "V2"}[os.environ["VLLM_USE_V2_MODEL_RUNNER"]]
    _, said = on_vllm.engine("vllm")
    assert said.startswith(f"vLLM 0.32.0, model runner {asked} (")


def test_positions_that_differ_are_an_error() -> None:
    segments = [Segment("a", 0, 3, 4), Segment("b", 3, 4, 9)]
    check_positions(segments, torch.tensor([4, 5, 6, 9]))
    check_positions(segments, torch.tensor([4, 5, 6, 9, 0, 0]))
    check_positions(segments, torch.tensor([[4, 5, 6, 9]] * 3))
    for wrong in ([4, 5, 6, 8], [4, 5, 6], [0, 1, 2, 9]):
        with pytest.raises(CaptureError, match="are not those that its runner tells of"):
            check_positions(segments, torch.tensor(wrong))


def test_positions_that_differ_fail_the_requests_and_not_the_engine(
    on_vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = worker_of(on_vllm)._session._rows
    own = rows.segments

    def shifted() -> list[Segment]:
        return [Segment(s.request, s.first, s.stop, s.position - 1) if s.position else s for s in own()]

    monkeypatch.setattr(rows, "segments", shifted)
    with pytest.raises(CaptureError, match="not those that its runner tells of"):
        on_vllm.capture([[1, 2, 3]], "resid_post", max_new_tokens=3)
    monkeypatch.undo()
    assert on_vllm.capture([[1, 2, 3]], "resid_post", max_new_tokens=3).samples[0].rows == 5


def test_a_tap_that_a_step_does_not_reach_fails_the_requests_and_not_the_engine(on_vllm: Any) -> None:
    on_vllm.capture([[1, 2, 3]], "mlp_out", [1], max_new_tokens=2)
    layer = worker_of(on_vllm).model_runner.get_model().get_submodule("model.layers.1.mlp")
    hooks = dict(layer._forward_hooks)
    layer._forward_hooks.clear()
    with pytest.raises(CaptureError, match=r"a step of vLLM did not reach mlp_out\.1"):
        on_vllm.capture([[1, 2, 3]], "mlp_out", [1], max_new_tokens=2)
    layer._forward_hooks.update(hooks)
    assert on_vllm.capture([[1, 2, 3]], "mlp_out", [1], max_new_tokens=2).samples[0].rows == 4


def test_the_self_test_sees_rows_of_other_tokens(on_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    testing.self_test(on_vllm, on_vllm.engine_of_vllm)
    session = worker_of(on_vllm)._session
    put = session.slabs.put

    def moved(key: Any, slots: Any, shares: list[torch.Tensor]) -> None:
        put(key, slots, [each.roll(1, 0) for each in shares])

    monkeypatch.setattr(session.slabs, "put", moved)
    with pytest.raises(CaptureError, match="are others while tokens are generated"):
        testing.self_test(on_vllm, on_vllm.engine_of_vllm)


def test_the_plugin_does_nothing_unless_asked(checkpoint: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    register()
    once = EngineArgs.create_engine_config
    register()
    assert EngineArgs.create_engine_config is once
    plain = EngineArgs(str(checkpoint), enforce_eager=True, **SETTINGS).create_engine_config()
    assert "hookmap" not in plain.parallel_config.worker_cls and plain.additional_config == {}
    asked = EngineArgs(str(checkpoint), enforce_eager=True, additional_config={"hookmap": {}}, **SETTINGS)
    assert asked.create_engine_config().parallel_config.worker_cls == WORKER
    wrong = EngineArgs(str(checkpoint), additional_config={"hookmap": {"tap": 1}}, **SETTINGS)
    with pytest.raises(CaptureError, match="tap: Extra inputs are not permitted"):
        wrong.create_engine_config()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nonsense": 1}, r"vLLM does not open .*: TypeError: .*unexpected keyword argument 'nonsense'"),
        ({"max_model_len": "many"}, r"(?s)vLLM does not open .*max_model_len.*valid integer"),
        ({"taps": 5}, "taps: expected names, got 5"),
        ({"taps": {"resid_post": 1.5}}, "taps.resid_post"),
        ({"functions": [5]}, "functions: expected names, got 5"),
        ({"additional_config": {"hookmap": {}}}, "additional_config: expected a mapping without 'hookmap'"),
        ({"additional_config": "hookmap"}, "additional_config: expected a mapping without 'hookmap'"),
        ({"worker_cls": "mine.Worker"}, "worker_cls='mine.Worker': hookmap brings a worker"),
        ({"async_scheduling": True}, "async_scheduling: a step would begin before"),
        ({"override_generation_config": {"top_k": 1}}, "override_generation_config: each request has all its settings"),
        ({"enable_lora": True}, "enable_lora: no request here names an adapter"),
        ({"runner": "pooling"}, "runner='pooling': captures run on models that generate"),
        ({"max_model_len": 4, "eager": True}, "max_model_len=4: expected at least 8"),
        ({"shared": True, "processes": False}, "shared=True: vLLM's engine is in processes of its own"),
    ],
)
def test_settings_are_refused_with_their_own_reason(checkpoint: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(HookmapError, match=said) as refused:
        hookmap.open_on_vllm(checkpoint, **{**SETTINGS, **settings})
    assert "can be read" not in str(refused.value)


def test_layers_of_taps_are_a_number_or_several(checkpoint: Path) -> None:
    read = settings_of({"hookmap": {"taps": {"resid_post": 1, "resid_mid": [0, 2], "mlp_out": "all"}}})
    assert read.taps == {"resid_post": [1], "resid_mid": [0, 2], "mlp_out": "all"}


def test_ways_to_run_whose_rows_are_no_samples_are_refused() -> None:
    def config(speculative: Any = None, engines: int = 1, experts: bool = False, **others: Any) -> Any:
        parallel = {"prefill_context_parallel_size": 1, "use_ubatching": False, **others}
        return SimpleNamespace(
            speculative_config=speculative,
            kv_transfer_config=others.get("transfer"),
            parallel_config=SimpleNamespace(data_parallel_size=engines, **parallel),
            cache_config=SimpleNamespace(kv_sharing_fast_prefill=others.get("fast", False)),
            model_config=SimpleNamespace(is_moe=experts, runner_type="generate"),
        )

    refuse_unserved(config(engines=2))
    refuse_unserved(config(experts=True))
    for other, said in (
        ({"speculative": object()}, "speculative decoding"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size: each process"),
        ({"use_ubatching": True}, "enable_dbo, ubatch_size: the halves"),
        ({"transfer": object()}, "kv_transfer_config, .*: what keeps keys and values outside"),
        ({"fast": True}, "kv_sharing_fast_prefill: the last layers"),
        ({"engines": 2, "experts": True}, "data_parallel_size=2: .*experts .*hookmap store merge"),
    ):
        with pytest.raises(CaptureError, match=said):
            refuse_unserved(config(**other))


@pytest.mark.slow
def test_data_parallel_of_experts_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    from support import vllm_families

    folder = vllm_families.save("mixtral", tmp_path / "mixtral")
    with pytest.raises(CaptureError, match="data_parallel_size=2: the engines of a model with experts"):
        hookmap.open_on_vllm(folder, eager=True, data_parallel_size=2, **SETTINGS)
    with pytest.raises(CaptureError, match=r"data_parallel_size=2: .*Leave processes out"):
        hookmap.open_on_vllm(folder, eager=True, data_parallel_size=2, processes=False, **SETTINGS)


@pytest.mark.slow
def test_a_model_that_vllm_loads_and_does_not_run_is_refused_with_its_reason(tmp_path: Path) -> None:
    from support import vllm_families

    folder = vllm_families.save("qwen3_next", tmp_path / "model")
    # In a process of its own: vLLM keeps the parallel groups of a model that was opened before.
    code = f"import hookmap; hookmap.open_on_vllm({str(folder)!r}, eager=True, **{SETTINGS!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    told = run.stderr.strip().splitlines()[-1]
    assert "hookmap.errors.ModelError: vLLM opens" in told
    assert "does not run it: AssertionError: CPU GDN attention requires BF16" in told


@pytest.mark.slow
def test_a_script_that_opens_a_model_at_its_top_is_told_how(checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import hookmap\nhookmap.open_on_vllm({str(checkpoint)!r}, eager=True, **{SETTINGS!r})\n")
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600, env=environment)
    said = [line for line in run.stderr.splitlines() if "__name__" in line]
    assert len(said) == 2 and said[0].startswith(
        "hookmap.errors.ModelError: vLLM's engine runs in a process of its own"
    )
    assert run.stderr.rstrip().endswith(said[1])


def worker_of(model: Any) -> Any:
    """The worker of a model whose engine is in this process."""
    return model.engine_of_vllm._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
