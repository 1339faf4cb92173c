"""Any module's input or output, and any operation in a module's own forward, is captured and written by its place."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import plain_hooks
from support.opened import EACH_STRUCTURE, RAGGED, opened
from support.raises import raises
from support.tiny_tokenizer import tiny_tokenizer
from torch import nn

import hookmap
from hookmap.maps.points import is_place

ATTENTION = "model.layers.{i}.self_attn"
SOFTMAX, Q_ROT, K_ROT = f"{ATTENTION}:_softmax.output", f"{ATTENTION}:add#0.output", f"{ATTENTION}:add#1.output"
GATE = "model.layers.{i}.mlp.gate_proj.output"


def rows(run: Any, place: str, layer: int | None = 1) -> list[torch.Tensor]:
    return [run.read(number, place, layer) for number in range(len(RAGGED))]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
@pytest.mark.parametrize("new", [0, 5])
def test_what_is_asked_for_by_place_is_what_a_plain_hook_sees(new: int, engine: Any) -> None:
    hm = opened("llama")
    family = plain_hooks.FAMILIES["llama"]
    run = hm.capture(RAGGED, [GATE, "model.layers.2.mlp.act_fn.output"], [1], max_new_tokens=new, engine=engine)
    for number, ids in enumerate(RAGGED):
        tokens = torch.tensor([list(run.samples[number].token_ids)[: run.samples[number].rows]])
        assert len(ids) <= tokens.shape[1]
        places = {"gate": ("model.layers.1.mlp.gate_proj", "output"), "act": ("model.layers.2.mlp.act_fn", "output")}
        with plain_hooks.watching(hm.model, places) as seen:
            hm.model(tokens)
        for name, read in (
            ("gate", run.read(number, GATE, 1)),
            ("act", run.read(number, places["act"][0] + ".output")),
        ):
            torch.testing.assert_close(read, seen[name][0][0], rtol=1e-4, atol=1e-5)
    assert family.block == "model.layers.{i}"


@pytest.mark.parametrize("new", [0, 4])
def test_the_engines_show_the_same_operations(new: int) -> None:
    names = [SOFTMAX, Q_ROT, K_ROT, f"{ATTENTION}:bmm#0.input[1]", "model.layers.{i}.mlp:mul.output", "resid_post"]
    runs = [opened("qwen3").capture(RAGGED, names, [1], max_new_tokens=new, engine=e) for e in ("hooks", "nnsight")]
    for name in names:
        assert same(rows(runs[0], name), rows(runs[1], name)), name


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_an_operation_in_every_step_is_as_in_one_whole_pass(name: str) -> None:
    """With a cache, pads, and, of Gemma, a window of 16 that 30 tokens slide out of."""
    hm, names = opened(name), [SOFTMAX, Q_ROT, K_ROT, "pattern"]
    run = hm.capture(RAGGED, names, [0, 1], max_new_tokens=24)
    for number in range(len(RAGGED)):
        ids = [list(run.samples[number].token_ids)[: run.samples[number].rows]]
        whole = hm.capture(ids, names, [0, 1], max_new_tokens=0)
        for place in names:
            for layer in (0, 1):
                step = run.read(number, place, layer)
                step = step[..., : len(ids[0])] if "key" in run.axes("pattern", 0, 4) and step.ndim == 3 else step
                expected = whole.read(0, place, layer)
                torch.testing.assert_close(step[..., : expected.shape[-1]], expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(run.read(number, SOFTMAX, 1), run.read(number, "pattern", 1))


def test_rotated_queries_are_those_that_are_computed_by_hand() -> None:
    hm = opened("llama")
    run = hm.capture(RAGGED, [Q_ROT, K_ROT, "q", "k"], [1], max_new_tokens=3)
    half = 4
    for number in range(len(RAGGED)):
        for rotated, plain in ((Q_ROT, "q"), (K_ROT, "k")):
            x = run.read(number, plain, 1)
            angles = torch.arange(len(x))[:, None] / 10_000.0 ** (torch.arange(half) / half)
            cos, sin = (f(angles)[:, None] for f in (torch.cos, torch.sin))
            a, b = x[..., :half], x[..., half:]
            by_hand = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
            torch.testing.assert_close(run.read(number, rotated, 1), by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}]
)
def test_other_ways_to_generate_show_the_same(options: dict[str, Any]) -> None:
    hm, names = opened("llama"), [Q_ROT, K_ROT, GATE, *([] if "cache_implementation" in options else [SOFTMAX])]
    usual, other = (hm.capture(RAGGED, names, [1], max_new_tokens=4, **o) for o in ({}, options))
    assert usual.tokens == other.tokens
    for name in names:
        for a, b in zip(rows(usual, name), rows(other, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [SOFTMAX, f"{ATTENTION}:bmm#0.input[1]"])
def test_a_cache_with_places_for_tokens_to_come_is_refused(place: str) -> None:
    with raises(hookmap.CaptureError, "cache_implementation"):
        opened("llama").capture(RAGGED, [place], [1], max_new_tokens=4, cache_implementation="static")


@pytest.mark.parametrize("name", ["deepseek_v3"])
def test_values_that_a_static_cache_holds_are_refused_too(name: str) -> None:
    """Its values are expanded from the cache in each step: the last places are not the newest tokens."""
    with raises(hookmap.CaptureError, "v[1]", "cache_implementation"):
        opened(name).capture(RAGGED[:1], ["v"], [1], max_new_tokens=4, cache_implementation="static")


def test_everything_else_is_bit_identical_beside_operations() -> None:
    hm = opened("qwen3")
    plain = hm.capture(RAGGED, ["resid_post", "pattern"], max_new_tokens=4)
    beside = hm.capture(RAGGED, ["resid_post", "pattern", SOFTMAX, Q_ROT], max_new_tokens=4)
    assert plain.tokens == beside.tokens
    for key in plain.keys:
        assert same(rows(plain, *key[:2]), rows(beside, *key[:2]))  # type: ignore[arg-type]


def test_what_hooks_and_inner_modules_compute_is_not_counted() -> None:
    hm = opened("qwen3")
    alone = rows(hm.capture(RAGGED, [Q_ROT], [1], max_new_tokens=2), Q_ROT)
    attention = hm.model.get_submodule("model.layers.1.self_attn")
    before = attention.register_forward_pre_hook(lambda module, args: (torch.ones(2) + 1, None)[1])
    inside = attention.get_submodule("q_norm").register_forward_hook(lambda module, args, output: output + 0)
    try:
        with hooked(attention, lambda module, args, output: (output[0] + 0, *output[1:])):
            assert same(rows(hm.capture(RAGGED, [Q_ROT], [1], max_new_tokens=2), Q_ROT), alone)
    finally:
        before.remove()
        inside.remove()


def test_in_inference_mode_the_operations_are_the_same() -> None:
    hm, names = opened("llama"), [Q_ROT, SOFTMAX, f"{ATTENTION}:bmm#1.output"]
    usual = hm.capture(RAGGED, names, [1], max_new_tokens=2)
    with torch.inference_mode():
        inside = hm.capture(RAGGED, names, [1], max_new_tokens=2)
    assert all(same(rows(usual, name), rows(inside, name)) for name in names)


@pytest.mark.slow
def test_compiled_modules_run_as_they_are_written() -> None:
    model = plain_hooks.build("llama")
    names = [Q_ROT, SOFTMAX, GATE]
    usual = hookmap.open(model, tokenizer=tiny_tokenizer()).capture(RAGGED, names, [1], max_new_tokens=2)
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.compile(backend="eager")
    compiled = hookmap.open(model, tokenizer=tiny_tokenizer()).capture(RAGGED, names, [1], max_new_tokens=2)
    assert all(same(rows(usual, name), rows(compiled, name)) for name in names)


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_every_module_inside_a_block_has_a_tensor_or_a_reason(name: str) -> None:
    """Held against plain hooks: a place is refused, or is what a hook sees in the same pass."""
    hm = opened(name)
    block = hm.map.at_layer(hm.map.layers_path, 1)
    model: nn.Module = hm.model
    paths = [path for path, _ in model.get_submodule(block).named_modules() if path and path.count(".") < 2]
    ids = RAGGED[0]
    for path in paths[:12]:
        place = f"{block}.{path}.output"
        try:
            run = hm.capture([ids], [place], max_new_tokens=0)
        except (hookmap.SelectionError, hookmap.CaptureError):
            continue
        seen: list[torch.Tensor] = []
        with (
            hooked(model.get_submodule(f"{block}.{path}"), lambda m, a, output, seen=seen: seen.append(output.clone())),
            torch.no_grad(),
        ):
            model(torch.tensor([ids]))
        found = run.read(0, place)
        torch.testing.assert_close(found.flatten().sort().values, seen[0].flatten().sort().values, rtol=1e-4, atol=1e-5)
        assert len(found) == len(ids)


def test_a_stored_capture_has_the_names(tmp_path: Any) -> None:
    run = opened("llama").capture(RAGGED, {SOFTMAX: [1], GATE: [0, 2]}, max_new_tokens=2, store=tmp_path / "run")
    store = hookmap.open_store(tmp_path / "run")
    assert store.keys == ((GATE, 0), (SOFTMAX, 1), (GATE, 2))
    for number in range(len(RAGGED)):
        assert torch.equal(store.read(number, GATE, 2), run.read(number, GATE, 2))
    assert store.axes(GATE, 2, 3) == ("batch", "pos", "axis_2")


# Writing -------------------------------------------------------------------------------------------------------------


def edited(hm: Any, place: str, names: list[str], **edit: Any) -> Any:
    edits = [{"point": place, "layers": [1], **edit}]
    return hm.capture(RAGGED, [place, *names], [1, 2], max_new_tokens=4, interventions=edits)


def test_a_module_written_by_place_gives_what_a_plain_hook_makes_it_give() -> None:
    hm = opened("llama")
    run = edited(hm, GATE, ["resid_post"], do="scale", factor=0.5)
    with hooked(hm.model.get_submodule("model.layers.1.mlp.gate_proj"), lambda m, a, output: output * 0.5):
        plain = hm.capture(RAGGED, ["resid_post"], [1, 2], max_new_tokens=4)
    assert run.tokens == plain.tokens
    assert all(same(rows(run, "resid_post", layer), rows(plain, "resid_post", layer)) for layer in (1, 2))


def test_a_head_without_attention_weights_gives_nothing() -> None:
    run = edited(opened("qwen3"), SOFTMAX, ["pattern", "z"], do="ablate", heads=[2])
    for number in range(len(RAGGED)):
        z, pattern = run.read(number, "z", 1), run.read(number, "pattern", 1)
        assert not pattern[:, 2].any() and not z[:, 2].any() and z[:, [0, 1, 3]].abs().min(0).values.any()
        assert run.read(number, "z", 2)[:, 2].any()


def test_patched_attention_weights_belong_to_the_same_tokens_whatever_the_pads() -> None:
    """In a batch with pads the columns of keys are others than in the source's run."""
    hm, ids = opened("llama"), RAGGED[0]
    source = {"prompt": tuple(ids), "positions": [2]}
    run = edited(hm, SOFTMAX, ["z", "v"], do="patch", positions=[2], source=source)
    clean = hm.capture([ids], [SOFTMAX], [1], max_new_tokens=0).read(0, SOFTMAX, 1)[2]
    for number in range(len(RAGGED)):
        written = run.read(number, SOFTMAX, 1)[2]
        assert torch.equal(written[:, :3], clean[:, :3]) and not written[:, 3:].any()
        v = run.read(number, "v", 1)[:3].repeat_interleave(2, 1)
        by_hand = torch.einsum("hk,khd->hd", clean[:, :3], v)
        torch.testing.assert_close(run.read(number, "z", 1)[2], by_hand, rtol=1e-4, atol=1e-5)


def test_what_a_cache_holds_of_earlier_passes_is_not_written() -> None:
    keys = f"{ATTENTION}:bmm#0.input[1]"
    with raises(hookmap.InterventionError, "use_cache=False"):
        edited(opened("llama"), keys, [], do="scale", factor=0.0, positions=[1])
    with raises(hookmap.InterventionError, "v[1]", "use_cache=False"):
        opened("deepseek_v3").capture(
            RAGGED[:1], ["v"], [1], max_new_tokens=3,
            interventions=[{"do": "scale", "point": "v", "layers": [1], "factor": 0.0, "positions": [1]}],
        )  # fmt: skip


@pytest.mark.parametrize("do", [{"do": "steer", "vector": [1.0]}, {"do": "ablate", "to": "mean"}])
def test_rows_of_keys_take_no_vector_and_no_mean(do: dict[str, Any]) -> None:
    with raises(hookmap.InterventionError, SOFTMAX, "scale"):
        edited(opened("llama"), SOFTMAX, [], **do)


# What is not there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("model.layers.{i}.mlp.gate.output", ("no module", "gate_proj")),
        (f"{ATTENTION}:bmm#7.input", ("bmm#7", "2 operations", "--operations")),
        (f"{ATTENTION}:mul.input", ("mul#0", "mul#4")),
        (f"{ATTENTION}:nothing.output", ("nothing", "_softmax")),
        (f"{ATTENTION}:_softmax.input[4]", ("[4]",)),
        (f"{ATTENTION}.output", ("as the output", "tuple")),
        ("model.layers.{i}.mlp.output[0]", ("index 0 of the output", "a bare tensor")),
        ("model.rotary_emb.output[0]", ("[1, 5, 8]",)),
        ("model.layers.{i}.self attn.output", ("quotes",)),
        ("2 * model.layers.{i}.mlp.output", ("factor",)),
    ],
)
def test_a_place_that_is_not_there_says_what_is(place: str, named: tuple[str, ...]) -> None:
    with raises(hookmap.SelectionError, *named) as caught:
        opened("llama").capture(RAGGED, [place], [1] if "{i}" in place else "all", max_new_tokens=0)
    assert "another version" not in str(caught.value)  # the user named it: no map is to blame


class OneMore(nn.Module):
    """Adds once more where it is called with one token: which addition is which changes from step to step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 + 2 if x.shape[1] == 1 else x + 3


def test_a_number_of_operations_that_changes_is_refused() -> None:
    model = copy.deepcopy(plain_hooks.build("llama"))
    model.model.layers[1].mlp.act_fn = OneMore()  # type: ignore[union-attr,index]
    hm = hookmap.open(model, tokenizer=tiny_tokenizer())
    place = "model.layers.1.mlp.act_fn:add#0.output"
    assert hm.capture(RAGGED, [place], max_new_tokens=0).keys == ((place, None),)
    with raises(hookmap.CaptureError, "add", "2 times", "expected 1"):
        hm.capture(RAGGED, [place], max_new_tokens=3)


class Fused(nn.Module):
    """An attention that computes its scores in one operation, whatever the model was told."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        x = hidden_states[:, None]
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0], None


def test_a_fused_attention_shows_no_scores_and_says_what_to_ask_for() -> None:
    model = copy.deepcopy(plain_hooks.build("llama"))
    layer = model.model.layers[1]  # type: ignore[union-attr,index]
    layer.self_attn = Fused(layer.self_attn)
    hm = hookmap.open(model, tokenizer=tiny_tokenizer())
    with raises(hookmap.SelectionError, "_scaled_dot_product", 'attn_implementation="eager"'):
        hm.capture(RAGGED, ["model.layers.1.self_attn:_softmax.input"], max_new_tokens=0)


def test_a_name_is_a_place_or_a_point() -> None:
    assert is_place("lm_head.output") and is_place(":mul#0.input[1]") and is_place("a.b:c.output['d']")
    assert not any(map(is_place, ("resid_mid.0", "blocks.3.attn.hook_q", "layers_output", "output")))
