"""What a caller asks of a model on vLLM is done as on transformers, or refused by name. Nothing is ignored."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.on_vllm import SETTINGS, Plain, prompts
from support.tiny_tokenizer import tiny_tokenizer
from vllm.engine.arg_utils import EngineArgs

import hookmap
from hookmap.errors import CaptureError, ModelError, StoreError
from hookmap.services.server.run import check_points
from hookmap.services.server.settings import Settings
from hookmap.vllm.plugin import refuse_changed

LONGEST = SETTINGS["max_model_len"]


@pytest.mark.parametrize(("length", "new"), [(LONGEST - 4, 4), (LONGEST - 1, 1), (LONGEST - 1, 0)])
def test_what_just_fits_runs_to_its_end(on_vllm: Any, length: int, new: int) -> None:
    run = on_vllm.capture(prompts(2, length), "resid_post", [0], max_new_tokens=new)
    assert [len(tokens) for tokens in run.tokens] == [length + new] * 2


@pytest.mark.parametrize(
    ("length", "new", "said"),
    [
        (
            LONGEST - 3,
            4,
            f"prompt 1 and 1 more are too long: 93 tokens and max_new_tokens=4 .*max_model_len={LONGEST}",
        ),
        (LONGEST, 0, f"prompt 1 and 1 more are too long: 96 tokens and the one that .* max_model_len={LONGEST}"),
    ],
)
def test_answers_that_vllm_would_cut_are_refused(on_vllm: Any, length: int, new: int, said: str) -> None:
    with pytest.raises(CaptureError, match=said):
        on_vllm.capture([[1, 2], *prompts(2, length)], "resid_post", [0], max_new_tokens=new)


def test_batches_are_as_large_as_they_are_asked_to_be(on_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, most = on_vllm.engine_of_vllm, list[int]()
    step = engine.step

    def counted() -> Any:
        most.append(engine._llm.llm_engine.get_num_unfinished_requests())
        return step()

    monkeypatch.setattr(engine, "step", counted)
    for options, together in (
        ({"max_new_tokens": 3}, 6),
        ({"max_new_tokens": 3, "batch_size": 2}, 2),
        ({"max_new_tokens": 3, "batch_tokens": 20}, 6),
        ({"max_new_tokens": 0, "batch_tokens": 20}, 2),
        ({"max_new_tokens": 0, "batch_tokens": 5}, 1),
    ):
        most.clear()
        run = on_vllm.capture(prompts(6, 10), "resid_post", [0], **options)
        assert max(most) == together, options
        said = {name: run.manifest.settings.get(name) for name in ("batch_size", "batch_tokens")}
        asked = {"batch_size": options.get("batch_size"), "batch_tokens": options.get("batch_tokens")}
        assert said == (asked if not options["max_new_tokens"] else {**asked, "batch_tokens": None})


def test_samples_are_drawn_from_as_many_tokens_as_transformers_takes(on_vllm: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0, "seed": 5}
    bare, fifty, every = (
        on_vllm.generate(prompts(3, 5), **options, **more).tokens for more in ({}, {"top_k": 50}, {"top_k": 0})
    )
    assert bare == fifty != every


def test_the_least_tokens_forbid_the_ends_that_were_given_and_no_others(on_vllm: Any, plain: Plain) -> None:
    given = prompts(4, 10)
    ends: dict[str, Any] = {"eos_token_id": [7, 5000], "min_new_tokens": 5}  # 5000: no token of this model
    expected = [plain.generated(ids, 12, **ends) for ids in given]
    own = tiny_tokenizer().eos_token_id
    assert own != 7 and any(own in tokens[10:15] for tokens in expected)  # vLLM by itself forbids it, too
    assert list(on_vllm.generate(given, max_new_tokens=12, **ends).tokens) == expected


def test_stop_strings_before_the_least_tokens_are_refused(on_vllm: Any) -> None:
    with pytest.raises(CaptureError, match="min_new_tokens=2: vLLM would look for stop strings behind"):
        on_vllm.generate(prompts(1, 5), max_new_tokens=4, min_new_tokens=2, stop="w")


@pytest.mark.parametrize(
    "method",
    ["weights", "saliency", "attribution_patch", "edge_attribution", "faithfulness", "circuit_curve",
     "fit_jacobian_lens", "stack_head_results"],
)  # fmt: skip
def test_what_needs_the_models_own_modules_says_so(on_vllm: Any, method: str) -> None:
    with pytest.raises(ModelError, match=r"runs on vLLM, and this needs the model's own modules: hookmap.open"):
        getattr(on_vllm, method)("z", 0)


def test_a_server_says_that_its_own_points_were_not_compiled(
    on_vllm: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(on_vllm.engine_of_vllm, "tapped", frozenset({("z", 1)}))
    check_points(on_vllm, Settings(Path(), points=("z",), layers=(1,)))
    assert not caplog.messages
    check_points(on_vllm, Settings(Path()))
    assert "requests that name no points are refused, unless they keep none: resid_post.0" in caplog.text


def test_stop_strings_are_found_with_the_tokenizer_that_was_given(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*token*"))
    [prompt] = prompts(1, 10)
    with hookmap.open_on_vllm(folder, tokenizer=tiny_tokenizer(), eager=True, **SETTINGS) as hm:
        whole = hm.generate([prompt], max_new_tokens=8).samples[0].text
        stop = whole.split()[3]
        assert hm.generate([prompt], max_new_tokens=8, stop=stop).samples[0].text.split() == whole.split()[:4]
    with hookmap.open_on_vllm(folder, eager=True, **SETTINGS) as hm:
        assert len(hm.generate([prompt], max_new_tokens=8).tokens[0]) == 18
        with pytest.raises(CaptureError, match="vLLM has no tokenizer to find strings with"):
            hm.generate([prompt], max_new_tokens=8, stop=stop)


def test_a_run_goes_on_with_the_same_cache(checkpoint: Path, tmp_path: Path) -> None:
    def captured(resume: bool = False, **settings: Any) -> Any:
        with hookmap.open_on_vllm(checkpoint, eager=True, **SETTINGS, **settings) as hm:
            return hm.capture(prompts(1, 8), "resid_post", [0], max_new_tokens=2, store=tmp_path / "run", resume=resume)

    assert "vllm" not in captured().manifest.settings
    with pytest.raises(StoreError, match=r'settings.vllm: the capture has .*, this run has {"kv_cache_dtype": "fp8"}'):
        captured(resume=True, kv_cache_dtype="fp8")


def test_graphs_that_are_switched_off_are_not_asked_for(checkpoint: Path) -> None:
    for given, said in (
        ({"compilation_config": {"cudagraph_mode": "FULL"}}, "^cudagraph_mode: a replayed graph"),
        ({"cudagraph_capture_sizes": [1, 2]}, "^cudagraph_capture_sizes: a replayed graph"),
    ):
        arguments = EngineArgs(str(checkpoint), **given)
        refuse_changed(arguments, on_cpu=True)
        with pytest.raises(CaptureError, match=said):
            refuse_changed(arguments, on_cpu=False)
    refuse_changed(EngineArgs(str(checkpoint), compilation_config={"cudagraph_mode": "NONE"}), on_cpu=False)
