"""Two processes of vLLM that share each layer's tensors: their parts are the whole."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import vllm_families

from hookmap.vllm.discover import discover

REFUSED = {"attn_result", "mlp_pre", "mlp_pre_linear", "mixer_norm_scale", "mlp_norm_scale", "final_norm_scale"}
"""points of transformers' model that no module of vLLM's shows by itself"""
SPLIT = {"q": 2, "q_rot": 2, "z": 2, "mlp_post": 2}
"""of how many parts a point is on two ranks: the one head of keys and values is on both"""


@pytest.mark.slow
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
