"""Two processes of vLLM that share each layer's tensors: their parts are the whole."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import vllm_families
from support.on_vllm import SETTINGS, TWO_PROCESSES, prompts
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.errors import InterventionError
from hookmap.vllm.discover import discover

REFUSED = {"attn_result", "mlp_pre", "mlp_pre_linear", "mixer_norm_scale", "mlp_norm_scale", "final_norm_scale"}
"""points of transformers' model that no module of vLLM's shows by itself"""
SPLIT = {"q": 2, "q_rot": 2, "z": 2, "mlp_post": 2}
"""of how many parts a point is on two ranks: the one head of keys and values is on both"""


@pytest.mark.slow
@TWO_PROCESSES
def test_the_parts_of_two_ranks_are_what_transformers_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import LLM, SamplingParams

    folder = vllm_families.save("llama", tmp_path / "llama")
    expected = vllm_families.by_transformers(folder)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]), prepend=":")
    engine = LLM(
        str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128,
        disable_log_stats=True, tensor_parallel_size=2, distributed_executor_backend="mp",
        worker_extension_cls="support.vllm_rank.Watching",
    )  # fmt: skip
    try:
        watched = engine.collective_rpc("watch")
        once = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
        engine.generate({"prompt_token_ids": vllm_families.token_ids().tolist()}, once, use_tqdm=False)
        engine.collective_rpc("write", args=(str(tmp_path),))
        found = discover(engine.llm_engine.vllm_config)
    finally:
        engine.llm_engine.engine_core.shutdown()
    places = found.places
    assert watched == [len(places)] * 2
    refused = expected.keys() - places.keys()
    assert {key[0] for key in refused} == REFUSED
    assert all("vLLM" in str(found.map.unavailable(*key)) for key in refused)
    ranks = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2)]
    distances = {}
    for key, place in places.items():
        rows = place.whole([rank[".".join(map(str, key))] for rank in ranks])
        distances[key] = vllm_families.distance(rows, expected[key])
    assert {key: far for key, far in distances.items() if not far < 1e-5} == {}
    assert {key[0]: places[key].parts for key in places if places[key].parts > 1} == SPLIT


@pytest.mark.slow
@TWO_PROCESSES
def test_a_capture_on_two_ranks_is_whole_and_its_stream_is_written_on_both(tmp_path: Path) -> None:
    folder = vllm_families.save("llama", tmp_path / "llama")
    tiny_tokenizer().save_pretrained(folder)
    expected = vllm_families.by_transformers(folder)
    ids, asked = vllm_families.token_ids().tolist(), prompts(3, 9)
    steer = {"do": "steer", "point": "resid_mid", "layers": [1], "vector": [0.5] * 64, "strength": 4}
    own = hookmap.open(folder, dtype="float32", check=False)
    steered = own.generate(asked, steer, {"points": "resid_post"}, max_new_tokens=6, batch_size=1)
    plain = own.generate(asked, max_new_tokens=6, batch_size=1)
    with hookmap.open_on_vllm(
        folder, eager=True, tensor_parallel_size=2, distributed_executor_backend="mp", **SETTINGS
    ) as model:
        run = model.capture([ids], ["resid_mid", "resid_post", *SPLIT, "k"], max_new_tokens=0)
        distances = {key: vllm_families.distance(run.read(0, *key), expected[key]) for key in run.keys}
        assert {key: far for key, far in distances.items() if not far < 1e-5} == {}
        found = model.generate(asked, steer, {"points": "resid_post"}, max_new_tokens=6)
        assert found.tokens == steered.tokens != plain.tokens
        for key in found.keys:
            for sample in range(len(asked)):
                assert vllm_families.distance(found.store.read(sample, *key), steered.store.read(sample, *key)) < 1e-4
        with pytest.raises(InterventionError, match="each rank of tensor parallelism holds a part of it"):
            model.generate(asked, {"do": "scale", "point": "z", "layers": [1], "factor": 2.0}, max_new_tokens=1)
