"""Gradients are what torch.autograd gives by hand: zeros added to the point by a plain hook, on a copy in float64."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from support import plain_hooks
from support.opened import EACH_STRUCTURE, RAGGED, opened
from support.plain_hooks import FAMILIES, Place
from support.raises import raises

import hookmap
from hookmap import metrics
from hookmap.analysis.gradients import GradientEstimate, check_room

RIGHT, WRONG = 5, 9


@cache
def wide(name: str) -> Any:
    model = copy.deepcopy(opened(name).model).double().requires_grad_(False)
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._experts_implementation = "eager"  # the others have no float64
    return model


def added(model: Any, point: str, place: Place, layer: int, zeros: torch.Tensor) -> Any:
    """A plain hook that adds `zeros` to the point, where it is written: in place where it is the stream in a block."""
    module = model.get_submodule(place.module.replace("{i}", str(layer)))
    share = zeros / place.scale

    def on_input(_: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0] if args else kwargs["hidden_states"]
        if point == "resid_mid":
            tensor += share
            return None
        new = tensor + share
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def on_output(_: Any, args: Any, output: Any) -> Any:
        return (output[0] + share, *output[1:]) if isinstance(output, tuple) else output + share

    if place.side == "input":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


def by_hand(
    name: str, point: str, layer: int, ids: list[int], metric: Callable[[torch.Tensor], torch.Tensor], model: Any = None
) -> torch.Tensor:
    """[pos, d], float64, of one text alone. A sum is changed where its last term is added."""
    family, model = FAMILIES[name], wide(name) if model is None else model
    zeros = torch.zeros(1, len(ids), 32, dtype=torch.float64, requires_grad=True)
    handle = added(model, point, family.points[point][-1], layer, zeros)
    try:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        handle.remove()
    [found] = torch.autograd.grad(metric(logits), [zeros])
    return found[0]


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[-1, RIGHT] - logits[-1, WRONG]


def near(found: torch.Tensor, expected: torch.Tensor, what: Any = "") -> None:
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < 1e-5, (what, error)


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_gradients_at_every_point_are_those_of_autograd_by_hand(name: str) -> None:
    hm, family = opened(name), FAMILIES[name]
    wanted = [parameter.requires_grad for parameter in hm.model.parameters()]
    found = hm.gradients(RAGGED, metrics.logit_difference(RIGHT, WRONG), list(family.points))
    values = hm.capture(RAGGED, list(family.points), max_new_tokens=0)
    assert found.keys == values.keys
    for key in found.keys:
        for number, ids in enumerate(RAGGED):
            near(found.read(number, *key), by_hand(name, *key, ids, difference), (key, number))
            torch.testing.assert_close(found.values.read(number, *key), values.read(number, *key))
    for number, ids in enumerate(RAGGED):
        expected = difference(wide(name)(torch.tensor([ids]), use_cache=False).logits[0].double())
        torch.testing.assert_close(found.metric[number].double(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert [parameter.requires_grad for parameter in hm.model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in hm.model.parameters())


def test_points_inside_a_branch_and_of_the_whole_model() -> None:
    """The gradient of a view is a view of that of the tensor which gradients flow through."""
    hm = opened("llama")
    places = {
        "q": Place("model.layers.{i}.self_attn.q_proj", "output"),
        "v": Place("model.layers.{i}.self_attn.v_proj", "output"),
        "z": Place("model.layers.{i}.self_attn.o_proj", "input"),
        "mlp_post": Place("model.layers.{i}.mlp.down_proj", "input"),
        "embed": Place("model.embed_tokens", "output"),
        "final_norm": Place("model.norm", "output"),
        "logits": Place("lm_head", "output"),
    }
    widths = {"v": 16, "mlp_post": 48, "logits": 97}
    found = hm.gradients(RAGGED, difference_at, list(places))
    for key in found.keys:
        for number, ids in enumerate(RAGGED):
            zeros = torch.zeros(1, len(ids), widths.get(key[0], 32), dtype=torch.float64, requires_grad=True)
            own = found.read(number, *key).flatten(1)
            near(own, with_zeros(wide("llama"), key[0], places[key[0]], key[1] or 0, ids, zeros), (key, number))


def difference_at(logits: torch.Tensor, at: Any) -> torch.Tensor:
    return difference(logits)


def with_zeros(model: Any, point: str, place: Place, layer: int, ids: list[int], zeros: torch.Tensor) -> torch.Tensor:
    handle = added(model, point, place, layer, zeros)
    try:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        handle.remove()
    return torch.autograd.grad(difference(logits), [zeros])[0][0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_hook_of_ones_own_retains_the_gradient_of_the_whole_tensor(name: str) -> None:
    """`resolve` of heads gives a view that no gradient flows through; `view` of the whole one's gradient is its."""
    hm, ids = opened(name), RAGGED[0]
    (selector,) = hm.map.selectors("q", 1)
    assert selector.is_view
    seen: dict[str, torch.Tensor] = {}

    def hook(_: Any, args: Any, output: Any) -> None:
        seen["whole"], seen["view"] = selector.whole(args, {}, output), selector.resolve(args, {}, output)
        seen["whole"].requires_grad_()
        for tensor in seen.values():
            tensor.retain_grad()

    handle = hm.model.get_submodule(selector.module).register_forward_hook(hook)
    logits = hm.model(torch.tensor([ids])).logits
    handle.remove()
    logits[0, -1, 7].backward()
    hm.model.zero_grad()
    found = hm.gradients([ids], lambda logits, at: logits[-1, 7], points="q", layers=1)
    assert seen["view"].grad is None
    torch.testing.assert_close(selector.view(seen["whole"].grad)[0], found.read(0, "q", 1), rtol=1e-4, atol=1e-7)


def test_attention_weights_have_the_gradient_that_eager_attention_gives_them() -> None:
    hm, model = opened("llama"), wide("llama")
    found = hm.gradients(RAGGED, difference_at, "pattern", [1])
    kept: list[torch.Tensor] = []
    handle = model.model.layers[1].self_attn.register_forward_hook(lambda _, args, output: kept.append(output[1]))
    model.set_attn_implementation("eager")
    try:
        for number, ids in enumerate(RAGGED):
            embedded = model.model.embed_tokens(torch.tensor([ids])).requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
            [expected] = torch.autograd.grad(difference(logits), [kept[-1]])
            near(found["pattern", 1][number], expected[0], number)
    finally:
        handle.remove()
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("name", ["llama", "opt", "granite"])
def test_interventions_are_in_the_same_pass(name: str) -> None:
    """Downstream of a write the gradient is that of the run with it; upstream it goes through the write."""
    hm, model = opened(name), wide(name)
    place = FAMILIES[name].points["mlp_out"][0] if name != "opt" else FAMILIES[name].points["mixer_out"][0]
    point = "mlp_out" if name != "opt" else "mixer_out"
    halved = [{"do": "scale", "factor": 0.5, "point": point, "layers": 1}]
    own = [hookmap.apply(lambda rows, at: rows * 0.5, point, 1)]

    def halve(_: Any, args: Any, output: Any) -> Any:
        return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5

    handle = model.get_submodule(place.module.replace("{i}", "1")).register_forward_hook(halve)
    try:
        expected = {
            (layer, number): by_hand(name, "resid_pre", layer, ids, difference)
            for layer in (0, 2)
            for number, ids in enumerate(RAGGED)
        }
    finally:
        handle.remove()
    for found in (
        hm.gradients(RAGGED, difference_at, "resid_pre", [0, 2], interventions=halved),
        hm.gradients(RAGGED, difference_at, "resid_pre", [0, 2], interventions=own),
        hm.edited(halved).gradients(RAGGED, difference_at, "resid_pre", [0, 2]),
    ):
        for (layer, number), gradient in expected.items():
            near(found.read(number, "resid_pre", layer), gradient, (layer, number))


def test_what_is_written_cuts_the_gradient_off() -> None:
    given = {"do": "ablate", "point": "resid_mid", "layers": 1, "positions": [0]}
    found = opened("llama").gradients(RAGGED, difference_at, "resid_pre", [0, 1], interventions=[given])
    plain = opened("llama").gradients(RAGGED, difference_at, "resid_pre", [0, 1])
    for number in range(len(RAGGED)):
        rows, bare = found.read(number, "resid_pre", 1), plain.read(number, "resid_pre", 1)
        assert rows.isfinite().all() and not torch.allclose(rows, bare)
    mid = opened("llama").gradients(RAGGED, difference_at, "resid_mid", [1], interventions=[given])
    assert mid.read(0, "resid_mid", 1)[0].any() and not mid.values.read(0, "resid_mid", 1)[0].any()


def test_an_answer_of_several_tokens_is_read_behind_its_prompt() -> None:
    hm, answers = opened("llama"), [(5, 6, 7), (8,), (9, 10)]
    found = hm.gradients(RAGGED, metrics.log_probability(answers), "resid_pre", [1])
    for number, (ids, answer) in enumerate(zip(RAGGED, answers, strict=True)):
        fed = [*ids, *answer[:-1]]

        def log_probability(logits: torch.Tensor, ids: Any = ids, answer: Any = answer) -> torch.Tensor:
            return logits.log_softmax(-1)[range(len(ids) - 1, len(ids) - 1 + len(answer)), answer].sum()

        assert found.samples[number].token_ids == tuple(fed)
        near(found.read(number, "resid_pre", 1), by_hand("llama", "resid_pre", 1, fed, log_probability), number)
    loss = hm.gradients(RAGGED, metrics.loss(), "resid_pre", [1])

    def mean_loss(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(RAGGED[0][1:]))

    near(loss.read(0, "resid_pre", 1), by_hand("llama", "resid_pre", 1, RAGGED[0], mean_loss))


def test_rows_are_chosen_as_in_a_capture_and_batches_change_nothing() -> None:
    hm = opened("llama")
    whole = hm.gradients(RAGGED, difference_at, "resid_post", [0])
    alone = hm.gradients(RAGGED, difference_at, "resid_post", [0], batch_size=1)
    last = hm.gradients(RAGGED, difference_at, "resid_post", [0], positions="last_prompt")
    for number in range(len(RAGGED)):
        near(alone.read(number, "resid_post", 0), whole.read(number, "resid_post", 0).double())
        assert torch.equal(last.read(number, "resid_post", 0), whole.read(number, "resid_post", 0)[-1:])
    assert last["resid_post", 0].shape == (3, 1, 32)
    assert repr(last) == "<Gradients of difference_at: 3 samples, 3 rows of 1 tensor: resid_post>"


def test_memory_is_said_before_and_is_what_autograd_keeps() -> None:
    hm = opened("llama")
    texts = [[token % 97 for token in range(n, n + 60)] for n in range(6)]
    early, late = (hm.estimate_gradients(texts, difference_at, "resid_pre", [layer]) for layer in (0, 2))
    assert late.graph < early.graph / 2 and "from resid_pre of layer 2 on" in str(late)
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    kept: list[torch.Tensor] = []
    weights = {parameter.untyped_storage().data_ptr() for parameter in hm.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hm.gradients(texts, difference_at, "resid_pre", [0])
    measured = sum(size for place, size in seen.items() if place not in weights)
    assert 0.7 < early.graph / measured < 1.4, (early.graph, measured)
    with raises(hookmap.CaptureError, "ask for later layers", "smaller batch_tokens"):
        check_room(GradientEstimate(10**15, 0, "embed"), torch.device("cpu"))


@pytest.mark.slow
def test_narrow_dtypes_say_that_they_round() -> None:
    hm = hookmap.open(plain_hooks.build("llama", torch.bfloat16))
    found = hm.gradients(RAGGED, difference_at, "resid_post", [0])
    assert "computed in bfloat16" in repr(found)
    assert found.read(0, "resid_post", 0).dtype == torch.bfloat16
    error = by_hand("llama", "resid_post", 0, RAGGED[0], difference)
    assert float((found.read(0, "resid_post", 0).double() - error).norm() / error.norm()) < 0.3


def test_what_has_no_gradient_is_refused_with_its_reason() -> None:
    hm = opened("llama")
    for given, said in (
        ((lambda logits, at: logits.detach().sum(), "resid_pre"), "the metric does not depend on these points"),
        ((lambda logits, at: torch.tensor(1.0), "resid_pre"), "the metric does not depend on these points"),
    ):
        with pytest.raises(hookmap.CaptureError, match=said):
            hm.gradients(RAGGED, *given)
    with raises(hookmap.CaptureError, "whole numbers, which have no gradient"):
        opened("mixtral").gradients(RAGGED, difference_at, "router_indices", [0])
    assert all(parameter.requires_grad for parameter in hm.model.parameters())


def test_operations_have_the_gradient_of_the_tensor_that_they_read_or_give() -> None:
    hm = opened("llama")
    hm.model.set_attn_implementation("eager")
    try:
        places = {side: f"model.layers.{{i}}.self_attn:_softmax.{side}" for side in ("input", "output")}
        found = hm.gradients(RAGGED, difference_at, [*places.values(), "pattern", "resid_pre"], [1])
    finally:
        hm.model.set_attn_implementation("sdpa")
    for number in range(len(RAGGED)):
        weights, scores = (found.read(number, places[side], 1) for side in ("output", "input"))
        assert torch.equal(weights, found.read(number, "pattern", 1))
        values = found.values.read(number, "pattern", 1)
        by_hand = values * (weights - (weights * values).sum(-1, keepdim=True))  # the derivative of a softmax
        torch.testing.assert_close(scores, by_hand, rtol=1e-4, atol=1e-7)


def test_a_caller_without_gradients_gets_the_same_ones() -> None:
    hm = hookmap.open(plain_hooks.build("llama"))
    metric = hookmap.metrics.logit_difference(7, 9)
    plain = hm.gradients([5, 17, 3], metric, "resid_pre", 1)
    with torch.no_grad():
        assert torch.equal(hm.gradients([5, 17, 3], metric, "resid_pre", 1)["resid_pre", 1], plain["resid_pre", 1])  # type: ignore[arg-type]
