"""How points are written, and the proofs that refuse what would be written wrong."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from support import plain_hooks
from support.opened import EACH_STRUCTURE, opened
from support.raises import raises
from transformers import AutoModelForCausalLM, XLNetConfig
from transformers.modeling_outputs import BaseModelOutput

import hookmap
from hookmap.capture.engines.hooks import HooksEngine
from hookmap.capture.interventions.proofs import Proofs
from hookmap.capture.interventions.writable import BoundaryTensor, passed_on
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.templates import Heads
from hookmap.maps.terms import Term

ALWAYS = {
    "router_logits", "router_indices", "expert_post", "expert_out", "attn_result",
    "mixer_norm_scale", "mlp_norm_scale", "final_norm_scale",
}  # fmt: skip


_OUT = {"side": "output", "index": None}


def reason(proofs: Proofs, found: ArchitectureMap, point: str, layer: int = 0) -> str | None:
    return proofs.of(found.selectors([point], [layer])[0]).reason


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_every_point_is_proved_save_what_the_model_has_used_already(name: str) -> None:
    hm = opened(name)
    refused = {
        point for kind in hm.map.kinds for point in kind.points if reason(hm.proofs, hm.map, point, kind.layers[0])
    }
    assert refused <= ALWAYS
    assert {point for point in hm.map.model_points if reason(hm.proofs, hm.map, point)} <= ALWAYS


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "qwen3_moe"])
def test_the_proofs_hold_in_half_precision(name: str, dtype: torch.dtype) -> None:
    hm = hookmap.open(plain_hooks.build(name, dtype))
    refused = {point for point in hm.map.kinds[0].points if reason(hm.proofs, hm.map, point)}
    assert refused <= ALWAYS


def with_terms(found: ArchitectureMap, point: str, *terms: dict[str, Any]) -> ArchitectureMap:
    """The same map with this point of its first kind of block elsewhere."""
    kind = found.kinds[0]
    own = kind.points[point].terms[0]
    template = kind.points[point].model_copy(update={"terms": tuple(own.model_copy(update=term) for term in terms)})
    points = {**kind.points, point: template}
    return found.model_copy(update={"kinds": (kind.model_copy(update={"points": points}), *found.kinds[1:])})


def test_what_nothing_reads_any_more_is_refused() -> None:
    hm = opened("mixtral")
    assert "nothing reads it there any more" in str(reason(hm.proofs, hm.map, "router_logits"))
    assert reason(hm.proofs, hm.map, "router_weights") is None


def test_writing_only_what_the_norm_reads_is_found_out() -> None:
    """The silent bug: the norm is given a copy, so that the block goes on with the old stream beside it."""
    model = plain_hooks.build("llama")
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
    hm = hookmap.open(model, map=opened("llama").map)
    assert "reads other things of the block too" in str(reason(hm.proofs, hm.map, "resid_mid"))
    assert reason(hm.proofs, hm.map, "resid_post") is None is reason(hm.proofs, hm.map, "mlp_in")
    with raises(hookmap.InterventionError, "resid_mid of layer 1 is not written"):
        hm.generate([5, 6], [{"do": "scale", "point": "resid_mid", "layers": 1, "factor": 2.0}], None, 2)


@pytest.mark.parametrize(
    ("name", "point", "change", "why"),
    [
        ("gemma2", "mlp_out", {"module": "model.layers.{i}.mlp"}, "resid_post = resid_mid"),
        ("llama", "mixer_in", {"module": "model.layers.{i}", "side": "input", "index": 0}, "writes resid_pre too"),
        ("llama", "mlp_in", {"module": "model.layers.{i}.input_layernorm"}, "mixer_in too|resid_mid too"),
        ("granite", "mixer_out", {"scale": 1.0}, "resid_mid"),
        ("llama", "mlp_post", {"module": "model.layers.{i}.mlp.up_proj", **_OUT}, "writes mlp_pre_linear too"),
        ("gpt2", "resid_mid", {"module": "transformer.h.{i}.attn", "side": "output"}, "resid_post"),
        ("cohere", "mixer_in", {"module": "model.layers.{i}.input_layernorm", **_OUT}, "writes mlp_in too"),
        ("olmo2", "mixer_in", {"module": "model.layers.{i}", "side": "input", "index": 0}, "writes resid_pre too"),
    ],
)  # fmt: skip
def test_a_map_that_points_elsewhere_is_found_out(name: str, point: str, change: dict[str, Any], why: str) -> None:
    found, model = opened(name).map, opened(name).model
    wrong = with_terms(found, point, change)
    said = reason(Proofs(HooksEngine(model, model), wrong), wrong, point)
    assert said is not None
    assert any(part in said for part in why.split("|")), said


def test_a_module_that_is_not_there_is_a_reason_and_no_crash() -> None:
    found, model = opened("llama").map, opened("llama").model
    wrong = with_terms(found, "mlp_out", {"module": "model.layers.{i}.nothing", "side": "output"})
    assert "writing it failed when it was tried" in str(
        reason(Proofs(HooksEngine(model, model), wrong), wrong, "mlp_out")
    )


def test_a_branch_whose_module_adds_the_stream_itself_is_found_out() -> None:
    """XLNet's feed-forward adds its own input: another input of the whole would change the stream, too."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    hm = hookmap.open(AutoModelForCausalLM.from_config(XLNetConfig(**sizes)).eval())
    assert reason(hm.proofs, hm.map, "mlp_in") is None is reason(hm.proofs, hm.map, "resid_mid")
    wrong = with_terms(hm.map, "mlp_in", {"module": "transformer.layer.{i}.ff"})
    said = reason(Proofs(HooksEngine(hm.model, hm.model), wrong), wrong, "mlp_in")
    assert "resid_post changes even with mlp_out put back" in str(said)


def test_the_proofs_leave_the_model_as_it_was() -> None:
    model = plain_hooks.build("llama")
    model.train()
    hm = hookmap.open(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert reason(hm.proofs, hm.map, "resid_mid") is None
    assert model.training and all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


Pair = namedtuple("Pair", ["hidden", "rest"])


@dataclass(frozen=True)
class Both:
    hidden: torch.Tensor
    rest: int


OLD, NEW = torch.zeros(1), torch.ones(1)


@pytest.mark.parametrize(
    ("output", "index"),
    [
        ((OLD, 7), 0), ([OLD, 7], 0), (Pair(OLD, 7), 0), ({"hidden": OLD, "rest": 7}, "hidden"),
        (OrderedDict(hidden=OLD, rest=7), "hidden"), (Both(OLD, 7), "hidden"), (OLD, None),
        (BaseModelOutput(last_hidden_state=OLD, hidden_states=(OLD,)), "last_hidden_state"),
        (BaseModelOutput(last_hidden_state=OLD, hidden_states=(OLD,)), 0),
    ],
)  # fmt: skip
def test_a_tensor_is_put_into_every_kind_of_output(output: Any, index: Any) -> None:
    term = Term("m", "output", index)
    _, _, passed = passed_on(term, ((), {}, output), NEW)
    assert type(passed) is type(output)
    assert term.resolve((), {}, passed) is NEW and term.resolve((), {}, output) is OLD
    if isinstance(passed, BaseModelOutput):
        assert passed.hidden_states is output.hidden_states and passed[0] is NEW
    elif index is not None:
        assert (
            list(getattr(passed, "__dict__", None) or passed)[1:]
            == list(getattr(output, "__dict__", None) or output)[1:]
        )


def test_a_tensor_is_put_into_arguments_by_place_and_by_name() -> None:
    args, kwargs = (OLD, 7), {"hidden_states": OLD, "mask": 3}
    assert passed_on(Term("m", "input", 0), (args, kwargs, None), NEW)[:2] == ((NEW, 7), kwargs)
    by_name = passed_on(Term("m", "input", "hidden_states"), (args, kwargs, None), NEW)
    assert by_name[0] is args and by_name[1] == {"hidden_states": NEW, "mask": 3} and kwargs["hidden_states"] is OLD


@pytest.mark.parametrize(
    ("term", "shape"),
    [
        (Term("m", "output", None), (2, 3, 8)),
        (Term("m", "output", None, flat=True), (6, 8)),
        (Term("m", "output", None, axes=("pos", "batch", "d_model")), (3, 2, 8)),
        (Term("m", "output", None, axes=("stream", "batch", "pos", "d_model")), (4, 2, 3, 8)),
        (Term("m", "output", None, rows="last"), (2, 5, 8)),
        (Term("m", "output", None, heads=Heads(groups=1, start=0, stop=8, d_head=2)), (2, 3, 8)),
        (Term("m", "output", None, heads=Heads(groups=2, start=0, stop=4, d_head=2)), (2, 3, 12)),
        (Term("m", "output", None, heads=Heads(groups=2, start=4, stop=6, d_head=2)), (2, 3, 12)),
        (Term("m", "output", None, heads=Heads(groups=1, start=2, stop=4, d_head=2)), (2, 1, 3, 6)),
    ],
)  # fmt: skip
def test_only_the_cells_are_written_however_the_tensor_lies(term: Term, shape: tuple[int, ...]) -> None:
    """What is read there afterwards is the new value at the cells, and every other number is as it was."""
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    kept, cells = tensor.clone(), ([0, 1, 1], [2, 0, 1])
    _, _, written = BoundaryTensor(term, "replace").write(((), {}, tensor), (2, 3), cells, lambda rows: -rows - 1, "x")
    assert torch.equal(tensor, kept)
    before, after = (term.arrange(term.resolve((), {}, t), 2, 3) for t in (tensor, written))
    expected = before.clone()
    expected[cells] = -before[cells] - 1
    assert torch.equal(after, expected)
    assert int((written != tensor).sum()) == before[cells].numel()


def test_in_place_is_seen_by_whoever_holds_the_tensor_and_a_replacement_is_not() -> None:
    tensor = torch.ones(1, 2, 3)
    holder = tensor.view(2, 3)
    BoundaryTensor(Term("m", "input", 0), "replace").write(
        ((tensor,), {}, None), (1, 2), ([0], [1]), torch.zeros_like, "x"
    )
    assert (holder == 1).all()
    given = ((tensor,), {}, None)
    passed = BoundaryTensor(Term("m", "input", 0), "in place").write(given, (1, 2), ([0], [1]), torch.zeros_like, "x")
    assert passed is given and holder.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_a_scaled_term_gets_the_value_divided_and_keeps_what_stays() -> None:
    tensor = torch.rand(1, 4, 3)
    place = BoundaryTensor(Term("m", "output", None, scale=0.22), "replace")
    _, _, same = place.write(((), {}, tensor), (1, 4), ([0] * 4, [0, 1, 2, 3]), lambda rows: rows, "x")
    assert torch.equal(same, tensor)
    _, _, moved = place.write(((), {}, tensor), (1, 4), ([0], [1]), lambda rows: rows + 1, "x")
    torch.testing.assert_close(moved[0, 1] * 0.22, tensor[0, 1] * 0.22 + 1)


def test_a_tensor_of_another_shape_is_refused() -> None:
    place = BoundaryTensor(Term("m", "output", None), "replace")
    with pytest.raises(hookmap.InterventionError, match=r"expected a tensor of \[1, 4, ...\].*got \[1, 1, 3\]"):
        place.write(((), {}, torch.zeros(1, 1, 3)), (1, 4), ([0], [0]), lambda rows: rows, "x")


@pytest.mark.parametrize("mode", ["replace", "in place"])
def test_two_axes_that_are_not_side_by_side_in_memory_are_written_in_a_copy_where_that_does(mode: Any) -> None:
    place = BoundaryTensor(Term("m", "output", None, heads=Heads(groups=1, start=0, stop=8, d_head=2)), mode)
    tensor = torch.zeros(3, 2, 4, 8).transpose(0, 1)
    write = partial(place.write, ((), {}, tensor), (6, 4), ([1], [2]), lambda rows: rows + 1, "x")
    if mode == "in place":
        with raises(hookmap.InterventionError, "no view of m.output can be written", "in another order"):
            write()
        return
    expected = torch.zeros(2, 3, 4, 8)
    expected[0, 1, 2] = 1
    assert torch.equal(write()[2], expected) and not tensor.any()
