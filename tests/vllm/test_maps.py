"""Maps of vLLM's own modules, found without weights, and against transformers' numbers in vLLM's engine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import vllm_families

import hookmap
from hookmap.errors import DiscoveryError
from hookmap.vllm.backend import choose
from hookmap.vllm.discover import discover
from hookmap.vllm.places import ModelPlaces, Place
from hookmap.vllm.plain_parts import PlainScans, plain_parts
from hookmap.vllm.twin import config_of_twin, running

CLOSE = 1e-5
"""of a row, in float32"""


def config_of(folder: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=128, **options)
    return arguments.create_engine_config()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_families.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def places(llama: Path) -> ModelPlaces:
    return discover(config_of(llama))


def of(places: ModelPlaces, *key: Any) -> str:
    """Where a point is read and written."""
    place = places.places[key]
    return " + ".join(map(str, place.terms)) + ("" if place.why_not_written is None else ", not written")


def test_a_stream_in_two_tensors_is_the_sum_of_both(places: ModelPlaces) -> None:
    assert of(places, "resid_pre", 1) == "model.layers.1.input[1] + model.layers.1.input[2]"
    assert of(places, "resid_post", 1) == "model.layers.1.output[0] + model.layers.1.output[1]"


def test_the_first_block_is_given_one_tensor(places: ModelPlaces) -> None:
    assert of(places, "resid_pre", 0) == "model.layers.0.input[1]"


def test_the_middle_of_the_stream_is_where_the_norm_reads_it_and_the_map_names_what_the_norm_shows(
    places: ModelPlaces,
) -> None:
    norm = "model.layers.1.post_attention_layernorm"
    assert of(places, "resid_mid", 1) == f"{norm}.input[0] + {norm}.input[1]"
    [selector] = places.map.selectors({"resid_mid": [1]})
    assert [*map(str, selector.terms)] == [f"{norm}.output[1]"]


def test_queries_keys_and_values_are_parts_of_one_projection(places: ModelPlaces) -> None:
    terms = [places.places[point, 2].terms[0] for point in ("q", "k", "v")]
    assert {str(term) for term in terms} == {"model.layers.2.self_attn.qkv_proj.output[0]"}
    assert [(term.heads.start, term.heads.stop, term.heads.d_head) for term in terms if term.heads] == [
        (0, 64, 32), (64, 96, 32), (96, 128, 32),
    ]  # fmt: skip


def test_rotated_queries_are_read_and_written_where_attention_is_given_them(places: ModelPlaces) -> None:
    for point, index, width in (("q_rot", 0, 64), ("k_rot", 1, 32)):
        term = places.places[point, 2].terms[0]  # all layers share the rotary embedding's module
        assert (str(term), term.operation) == (f"model.layers.2.self_attn.attn.input[{index}]", None)
        assert term.heads is not None and (term.heads.start, term.heads.stop, term.heads.d_head) == (0, width, 32)
        assert of(places, point, 2) == str(term)


@pytest.mark.parametrize("point", ["attn_scores", "pattern", "mlp_pre", "mlp_pre_linear", "mixer_norm_scale"])
def test_what_only_kernels_hold_is_refused_with_that_reason(places: ModelPlaces, point: str) -> None:
    assert "vLLM's kernels compute it, or hold it in one tensor with another" in str(places.map.unavailable(point, 1))
    assert (point, 1) not in places.places


def test_logits_of_all_positions_are_nowhere_and_the_head_has_a_name(places: ModelPlaces) -> None:
    assert "samples" in str(places.map.unavailable("logits"))
    assert (places.map.lm_head_path, places.map.final_norm_path) == ("lm_head", "model.norm")


def test_every_point_of_the_map_has_a_place_on_each_layer(places: ModelPlaces) -> None:
    keys = {selector.key for selector in places.map.selectors(places.map.points)}
    assert keys == {*places.places}
    assert ("z", 0) in keys


def test_a_map_of_vllm_is_written_and_read_as_any_other(places: ModelPlaces, tmp_path: Path) -> None:
    places.map.save(tmp_path / "map.json")
    again = hookmap.load_map(tmp_path / "map.json")
    assert [str(s) for s in again.selectors(again.points)] == [str(s) for s in places.map.selectors(places.map.points)]


def test_discovery_leaves_the_modules_that_vllm_shares_alone(llama: Path) -> None:
    """vLLM uses a rotary embedding again in its next model: one on the meta device would be there, too."""
    from vllm.model_executor.layers import rotary_embedding

    before = dict(rotary_embedding._ROPE_DICT)
    discover(config_of(llama))
    assert before == rotary_embedding._ROPE_DICT


def on_ranks(config: Any, ranks: int) -> Any:
    from vllm.config import ParallelConfig

    config.parallel_config = ParallelConfig(tensor_parallel_size=ranks, distributed_executor_backend="mp")
    return config


def test_the_map_is_of_the_whole_model_and_places_are_of_a_rank(llama: Path, places: ModelPlaces) -> None:
    shared = discover(on_ranks(config_of(llama), 2))
    assert shared.map.kinds == places.map.kinds
    sizes = {p: (shared.places[p, 1].width, shared.places[p, 1].parts, shared.places[p, 1].copies) for p in PARTS}
    assert sizes == {"resid_mid": (64, 1, 2), "q": (32, 2, 1), "k": (32, 1, 2), "z": (32, 2, 1), "mlp_post": (48, 2, 1)}


PARTS = ("resid_mid", "q", "k", "z", "mlp_post")


def test_the_parts_of_ranks_make_the_whole_in_their_order() -> None:
    place = Place((), width=3, parts=2, copies=2)
    parts = [torch.full((5, 1, 3), float(rank)) for rank in range(4)]
    assert torch.equal(place.whole(parts), torch.cat([parts[0], parts[2]], dim=1))
    assert place.whole(parts).shape == (5, 2, 3)


def kinds_of(model_type: str, folder: Path) -> list[tuple[str, str, str]]:
    """Of each kind of block: its layers' numbers, the order of its branches, and what they are."""
    kinds = discover(config_of(vllm_families.save(model_type, folder))).map.kinds
    return [(",".join(map(str, kind.layers)), kind.branch_order, kind.name.split("#")[0]) for kind in kinds]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("bloom", [("0,1,2", "sequential", "attention+dense")]),  # it asks for the numbers of its heads' slopes
        ("falcon", [("0,1,2", "parallel", "attention+dense")]),
        ("falcon_h1", [("0,1,2", "sequential", "attention+dense")]),
        ("mamba2", [("0", "mixer_only", "recurrent"), ("1,2", "mixer_only", "recurrent")]),
        ("deepseek_v2", [("0", "sequential", "attention+dense"), ("1,2", "sequential", "attention+moe")]),
        (
            "qwen3_next",
            [
                ("0", "sequential", "recurrent+moe"),
                ("1", "sequential", "attention+moe"),
                ("2", "sequential", "recurrent+moe"),
            ],
        ),
    ],
)
def test_kinds_of_blocks_are_told_from_stand_ins_for_kernels(model_type: str, kinds: Any, tmp_path: Path) -> None:
    assert kinds_of(model_type, tmp_path) == kinds


def test_a_product_with_a_packed_weight_is_a_product_with_a_plain_one(llama: Path) -> None:
    config = config_of_twin(config_of(llama), 1)
    with running(config), torch.device("meta"):
        from vllm.model_executor.layers.linear import ReplicatedLinear

        layer = ReplicatedLinear(8, 4, bias=False)
        layer.weight = torch.nn.Parameter(torch.empty(4, 2, dtype=torch.int32), requires_grad=False)
        plain_parts(torch.nn.Sequential(layer))
        assert layer(torch.empty(1, 7, 8))[0].shape == (1, 7, 4)


def test_an_operator_of_vllm_that_is_not_known_is_refused() -> None:
    import vllm.model_executor.layers.fused_moe.runner.moe_runner  # noqa: F401 - it registers the operator

    x = torch.empty(7, 4, device="meta")
    with PlainScans(), pytest.raises(DiscoveryError, match=r"vllm\.moe_forward.*is not known"):
        torch.ops.vllm.moe_forward(x, x, None, None, "model.layers.0", 0)


@pytest.mark.slow
def test_what_its_own_modules_do_not_show_is_looked_for_in_those_of_transformers(tmp_path: Path) -> None:
    folder = vllm_families.save("nemotron", tmp_path)  # vLLM's own asks for autocast, which is not on the meta device
    backend = choose(lambda implementation: config_of(folder, model_impl=implementation))
    assert backend.model_impl == "transformers"
    assert "its modules in vLLM cannot be read" in backend.why
    assert not backend.places.places["resid_pre", 1].terms[0].flat
    assert "transformers' modules inside vLLM" in backend.places.map.discovered_by


def test_what_neither_shows_is_refused_with_both_reasons(llama: Path) -> None:
    class Unreadable:
        def __init__(self, implementation: str) -> None:
            self.implementation = implementation

        def __getattr__(self, name: str) -> Any:
            raise ValueError(f"no {self.implementation}")

    with pytest.raises(DiscoveryError, match="no auto") as refused:
        choose(Unreadable)
    assert "no transformers" in str(refused.value)


ENGINES = ("llama", "qwen3", "gpt2", "gemma2", "mixtral", "gpt_neox")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: vllm_families.save(name, root / name) for name in ENGINES}


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, Any]:
    """transformers' points of all of them: once vLLM's transformers back end has run here, it loads no more models."""
    return {name: vllm_families.by_transformers(folder) for name, folder in checkpoints.items()}


@pytest.fixture(params=ENGINES, scope="module")
def family(request: pytest.FixtureRequest, checkpoints: dict[str, Path], expected: Any) -> Iterator[tuple[Any, Any]]:
    engine = vllm_families.OnVllm(checkpoints[request.param])
    yield engine, expected[request.param]
    engine.close()


@pytest.mark.slow
def test_every_point_is_what_transformers_has_there(family: tuple[vllm_families.OnVllm, Any]) -> None:
    engine, expected = family
    places = discover(engine.worker.vllm_config)
    rows = engine.rows({key: place.terms for key, place in places.places.items()})
    distances = {key: vllm_families.distance(rows[key], expected[key]) for key in rows.keys() & expected.keys()}
    assert {key: far for key, far in distances.items() if not far < CLOSE} == {}
    assert {"resid_pre", "mixer_out", "mlp_out", "resid_post", "q", "k", "v", "z"} <= {key[0] for key in distances}
    if engine.model.config.model_type in ("llama", "qwen3", "mixtral"):
        assert {"q_rot", "k_rot"} <= {key[0] for key in distances}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bloom", "deepseek_v2"])
def test_the_map_is_right_where_vllm_computes_other_numbers(model_type: str, tmp_path: Path) -> None:
    folder = vllm_families.save(model_type, tmp_path / model_type)
    expected = vllm_families.by_transformers(folder)
    with vllm_families.repaired(model_type):
        engine = vllm_families.OnVllm(folder)
        try:
            places = discover(engine.worker.vllm_config)
            rows = engine.rows({key: place.terms for key, place in places.places.items()})
        finally:
            engine.close()
    distances = {key: vllm_families.distance(rows[key], expected[key]) for key in rows.keys() & expected.keys()}
    assert {key: far for key, far in distances.items() if not far < CLOSE} == {}
    assert {"mixer_out", "z", "mlp_post", "resid_post"} <= {key[0] for key in distances}


@pytest.mark.slow
def test_another_place_is_far_from_it(family: tuple[vllm_families.OnVllm, Any]) -> None:
    """What the test above compares can fail: one half of the stream, or the stream one layer on, is another tensor."""
    engine, expected = family
    places = discover(engine.worker.vllm_config)
    wrong = {("resid_pre", 1): places.places["resid_pre", 2].terms, ("z", 1): places.places["z", 2].terms}
    rows = engine.rows(wrong)
    assert all(vllm_families.distance(rows[key], expected[key]) > 0.1 for key in wrong)
    assert all(torch.isfinite(rows[key]).all() for key in wrong)
