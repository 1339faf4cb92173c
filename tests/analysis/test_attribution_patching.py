"""Estimated effects of patches are the gradient times the difference, by hand, in float64; of nodes and of edges."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import by_edges, plain_hooks
from support.by_edges import PAIRS, WIRING, at, change_of_head, change_of_mlp, difference, hooks, seen, wide, with_shift
from support.raises import raises

import hookmap
from hookmap.analysis.true_effects import sampled

QUICK = ("gpt2", "gemma2", "gpt_neox")
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in WIRING]
SIDES = {False: ("corrupted", "clean"), True: ("clean", "corrupted")}


def near(found: Any, expected: Any, what: Any = "", close: float = 1e-4, least: float = 1e-3) -> None:
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(least))
    assert error < close, (what, error, found, expected)


def gradient_at_z(name: str, layer: int, ids: list[int], pair: dict[str, Any], embeds: Any = None) -> torch.Tensor:
    """By hand, with zeros added to the input of the output projection; [pos, heads, d_head]."""
    model = wide(name)[0]
    zeros = torch.zeros(1, len(ids), 32, dtype=torch.float64, requires_grad=True)
    project = at(model, name, layer, WIRING[name].z)
    handles = [project.register_forward_pre_hook(lambda _, args: (args[0] + zeros,))]
    if embeds is not None:
        handles.append(model.get_input_embeddings().register_forward_hook(lambda *_: embeds))
    with hooks(*handles):
        [found] = torch.autograd.grad(difference(model, ids, pair), [zeros])
    return found[0].reshape(len(ids), -1, by_edges.WIDTH)


@pytest.mark.parametrize("noising", SIDES)
@pytest.mark.parametrize("name", EACH)
def test_nodes_are_the_gradient_times_the_difference(name: str, noising: bool) -> None:
    model, hm = wide(name)
    base, source = SIDES[noising]
    found = hm.attribution_patch(PAIRS, points=["z", "resid_pre"], noising=noising, check=4)
    for number, pair in enumerate(PAIRS):
        with torch.no_grad():
            near(found.base[number], difference(model, pair[base], pair))
            near(found.source[number], difference(model, pair[source], pair))
        for layer in range(plain_hooks.LAYERS):
            project = at(model, name, layer, WIRING[name].z)
            there, here = (seen(model, project, "input", pair[side]) for side in (source, base))
            gradient = gradient_at_z(name, layer, pair[base], pair)
            expected = ((there - here).unflatten(-1, (-1, by_edges.WIDTH)) * gradient).sum(-1)
            near(found["z", layer][number], expected, (layer, number))
    assert "correlation with true patching" in repr(found) and len(found.check.names) == 4


@pytest.mark.slow
def test_true_patches_are_those_of_plain_hooks() -> None:
    model, hm = wide("llama")
    found = hm.attribution_patch(PAIRS, points=["z"], check=12, seed=3)
    for name, true in zip(found.check.names, found.check.patched.tolist(), strict=True):
        words = name.split()  # pair 0 z[1] head 2 at 4
        number, layer, head, position = int(words[1]), int(words[2][2:-1]), int(words[4]), int(words[6])
        pair = PAIRS[number]
        project = at(model, "llama", layer, "self_attn.o_proj")
        clean = seen(model, project, "input", pair["clean"])
        features = slice(8 * head, 8 * head + 8)

        def put(_: Any, args: Any, clean: Any = clean, position: int = position, features: slice = features) -> Any:
            changed = args[0].clone()
            changed[0, position, features] = clean[position, features]
            return (changed,)

        with torch.no_grad():
            before = difference(model, pair["corrupted"], pair)
            with hooks(project.register_forward_pre_hook(put)):
                near(true, difference(model, pair["corrupted"], pair) - before, name, 1e-3)


@pytest.mark.slow
def test_with_steps_the_gradient_is_the_mean_along_the_path() -> None:
    model, hm = wide("llama")
    found = hm.attribution_patch(PAIRS, points=["z"], layers=[1], steps=3, check=4)
    for number, pair in enumerate(PAIRS):
        embed = model.get_input_embeddings()
        start, end = (embed(torch.tensor([pair[side]])) for side in ("corrupted", "clean"))
        mean = sum(
            gradient_at_z("llama", 1, pair["corrupted"], pair, start + share * (end - start))
            for share in (1 / 6, 1 / 2, 5 / 6)
        )
        project = at(model, "llama", 1, "self_attn.o_proj")
        there, here = (seen(model, project, "input", pair[side]) for side in ("clean", "corrupted"))
        near(found["z", 1][number], ((there - here).unflatten(-1, (-1, 8)) * mean / 3).sum(-1), number)


@pytest.mark.slow
def test_along_the_path_the_embedding_s_scores_sum_to_the_metric_s_difference() -> None:
    """Integrated gradients are complete."""
    hm = wide("gpt2")[1]
    found = hm.attribution_patch(PAIRS, points=["embed"], steps=60, check=4)
    for number, own in enumerate(found.scores["embed", None]):
        near(own.sum(), found.source[number] - found.base[number], number, 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_an_edge_is_what_moving_the_stream_of_one_reader_does(name: str) -> None:
    """Central differences of the metric, where the stream moves along what the writer adds, for this reader alone."""
    hm, pair = wide(name)[1], PAIRS[0]
    found = hm.edge_attribution([pair], check=4)
    k_heads = 4 if name in ("gpt2", "gpt_neox") else 2
    writers = {
        "mixer_out[0] head 1": change_of_head(name, 0, 1, pair, "corrupted", "clean"),
        "mlp_out[0]": change_of_mlp(name, 0, pair, "corrupted", "clean"),
        "mixer_out[1] head 3": change_of_head(name, 1, 3, pair, "corrupted", "clean"),
    }
    readers = {
        "q[1] head 2": ("q", 1, 2), "k[1] head 1": ("k", 1, 1), f"v[2] head {k_heads - 1}": ("v", 2, k_heads - 1),
        "q[2] head 0": ("q", 2, 0), "mlp_in[1]": ("mlp", 1, 0), "mlp_in[2]": ("mlp", 2, 0),
    }  # fmt: skip
    step = 1e-4 if name.startswith("gpt") else 3e-3  # RMS norms compute in float32
    for writer, change in writers.items():
        for reader, where in readers.items():
            if int(writer[writer.index("[") + 1]) > where[1] or (
                int(writer[writer.index("[") + 1]) == where[1] and (where[0] != "mlp" or WIRING[name].parallel)
            ):
                assert found[writer, reader].isnan().all()
                continue
            ends = [with_shift(name, where, sign * step * change, pair["corrupted"], pair) for sign in (1, -1)]
            near(found[writer, reader][0], (ends[0] - ends[1]) / (2 * step), (writer, reader), 2e-3, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", EACH)
def test_edges_out_of_a_node_sum_to_its_own_score(name: str, steps: int) -> None:
    hm = wide(name)[1]
    edges = hm.edge_attribution(PAIRS, check=4, steps=steps)
    nodes = hm.attribution_patch(PAIRS, points=["z", "mlp_out"], check=4, steps=steps)
    expected = dict(nodes.nodes())
    for row, writer in enumerate(edges.writers):
        key = writer.replace("mixer_out", "z")
        if key in expected and "rest" not in key:
            near(edges.scores[:, row].nansum(1), expected[key], writer, 1e-3)
    assert edges.edges == int((~edges.scores[0].isnan()).sum()) and f"{edges.edges} edges" in repr(edges)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_edges_into_a_node_sum_to_what_the_whole_stream_does_there(name: str) -> None:
    hm, pair = wide(name)[1], PAIRS[0]
    found = hm.edge_attribution([pair], check=4)
    model = wide(name)[0]
    block = at(model, name, 2, "")
    there, here = (seen(model, block, "input", pair[side]) for side in ("clean", "corrupted"))
    step = 1e-4
    for reader, where in (("q[2] head 1", ("q", 2, 1)), ("v[2] head 0", ("v", 2, 0))):
        ends = [with_shift(name, where, sign * step * (there - here), pair["corrupted"], pair) for sign in (1, -1)]
        column = found.readers.index(reader)
        near(found.scores[0, :, column].nansum(), (ends[0] - ends[1]) / (2 * step), reader, 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_true_edges_are_those_of_plain_hooks(name: str) -> None:
    hm, pair = wide(name)[1], PAIRS[0]
    found = hm.edge_attribution([pair], check=40, seed=1)
    model = wide(name)[0]
    held = 0
    for edge, true in zip(found.check.names, found.check.patched.tolist(), strict=True):
        writer, reader = edge.removeprefix("pair 0 ").split(" -> ")
        if not writer.startswith("mlp_out") or reader == "logits":
            continue
        change = change_of_mlp(name, int(writer[8]), pair, "corrupted", "clean")
        part, layer = reader.split("[")[0].removesuffix("_in"), int(reader[reader.index("[") + 1])
        head = int(reader.split()[-1]) if " " in reader else 0
        with torch.no_grad():
            before = float(difference(model, pair["corrupted"], pair))
        near(true, with_shift(name, (part, layer, head), change, pair["corrupted"], pair) - before, edge, 1e-3)
        held += 1
    assert held


def test_models_whose_stream_is_no_sum_are_refused_with_the_reason() -> None:
    with raises(hookmap.SelectionError, "norm the stream itself", "attribution_patch"):
        hookmap.open(plain_hooks.build("bert")).edge_attribution(PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "jamba", "granite", "olmo2", "cohere", "falcon_7b", "deepseek_v3", "opt"])
def test_edges_of_other_structures_sum_to_nodes(name: str) -> None:
    """Mixers without heads, hybrids, scaled branches, norms behind branches, latents, sums that no module holds."""
    hm = hookmap.open(plain_hooks.build(name))
    edges = hm.edge_attribution(PAIRS, check=4)
    point = "mlp_out" if "mlp_out" in hm.map.points else "mixer_out"
    nodes = hm.attribution_patch(PAIRS, points=[point], check=4)
    for row, writer in enumerate(edges.writers):
        if writer.startswith(point) and " " not in writer:
            near(edges.scores[:, row].nansum(1), dict(nodes.nodes())[writer], writer, 1e-2)


def test_the_sample_is_half_of_the_largest_and_the_rest_seeded() -> None:
    sizes = torch.arange(100.0)
    chosen = sampled(sizes, 10, 5)
    assert set(range(95, 100)) <= set(chosen) and len(chosen) == len(set(chosen)) == 10
    assert chosen == sampled(sizes, 10, 5) != sampled(sizes, 10, 6)
    assert sampled(torch.ones(3), 10, 0) == [0, 1, 2]


def test_results_are_saved_and_told(tmp_path: Path) -> None:
    hm = wide("llama")[1]
    found = hm.attribution_patch(PAIRS, check=4)
    assert found.by_head().shape == (3, 4) and found.grid("mlp_out", 0).values.shape == (3, 6)
    saved = json.loads(found.save(tmp_path / "nodes").with_suffix(".json").read_text())
    assert saved["nodes"][0]["node"] == found.nodes()[0][0] and len(saved["check"]["cells"]) == 4
    edges = hm.edge_attribution(PAIRS, check=4)
    saved = json.loads(edges.save(tmp_path / "edges").with_suffix(".json").read_text())
    assert tuple(saved["writers"]) == edges.writers and saved["edges"] == edges.edges
    top = edges.as_json(top=3)["top"]
    assert [(each["from"], each["to"]) for each in top] == [edge[:2] for edge in edges.top(3)]


def test_what_cannot_be_is_refused() -> None:
    hm = wide("llama")[1]
    for given, words in (
        ({"steps": 0}, ("steps",)),
        ({"check": 0}, ("check", "from 4 on")),
    ):
        with raises(hookmap.SelectionError, *words):
            hm.attribution_patch(PAIRS, **given)
    with raises(hookmap.InterventionError, "pair 0", "6 tokens", "5"):
        hm.attribution_patch([{**PAIRS[0], "corrupted": [1, 2, 3, 4, 5]}])
    found = hm.attribution_patch(PAIRS, check=4)
    with raises(hookmap.SelectionError, "different lengths", "pair="):
        found.grid("z")
    with raises(hookmap.SelectionError, "no attribution of"):
        found["q", 0]
