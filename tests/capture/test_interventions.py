"""Interventions are what hand-written PyTorch hooks do, bit for bit; what changes nothing changes no bit."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import plain_hooks
from support.opened import EACH_STRUCTURE, RAGGED, opened
from support.plain_hooks import FAMILIES, LAYERS
from support.raises import raises
from support.tiny_tokenizer import tiny_tokenizer
from support.written_by_hand import LENGTHS, NEW, WIDTH, Change, Rows, held_against_hooks, single

import hookmap
from hookmap.analysis.steering import About, SteeringVector
from hookmap.capture.interventions.documents import Steer, dump_interventions, load_interventions, read_interventions

D = 32
VECTOR = torch.randn(D, generator=torch.Generator().manual_seed(1)) * 3
UNIT = VECTOR / VECTOR.norm()
SOURCE = [60, 61, 62, 63]


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_a_steer_is_what_hand_written_hooks_do_on_every_point(name: str) -> None:
    hm = opened(name)
    for point in single(name):
        steer = {"do": "steer", "point": point, "layers": 1, "vector": VECTOR, "strength": 2.0}
        held_against_hooks(name, point, 1, lambda rows, at: rows + (2.0 * VECTOR), steer)
        plain, run = (hm.capture(RAGGED, ["logits"], max_new_tokens=0, interventions=i) for i in ((), [steer]))
        assert all(not torch.equal(plain.read(n, "logits"), run.read(n, "logits")) for n in range(len(RAGGED)))


def source_rows(name: str, point: str, layer: int) -> torch.Tensor:
    """Rows of SOURCE by a plain hook in one forward pass."""
    hm, (place,) = opened(name), FAMILIES[name].points[point]
    ids = torch.tensor([SOURCE])
    mask = {} if name == "mamba" else {"attention_mask": torch.ones_like(ids)}
    with plain_hooks.watching(hm.model, {"": (place.module.replace("{i}", str(layer)), place.side)}) as seen:
        hm.model(input_ids=ids, use_cache=False, **mask)
    rows = seen[""][0][0]
    return rows * place.scale if place.scale != 1 else rows


def in_the_prompt(change: Callable[[Rows], Rows]) -> Change:
    """On the first two tokens of each prompt only."""

    def changed(rows: Rows, at: list[int]) -> Rows:
        return torch.stack([change(row) if p < 2 else row for row, p in zip(rows, at, strict=True)])

    return changed


def along(rows: Rows) -> Rows:
    return (rows * UNIT).sum(-1, keepdim=True)


def clamped_feature(rows: Rows, at: list[int]) -> Rows:
    rows = rows.clone()
    rows[:, 3] = 5.0
    return rows


def keeps_norm(rows: Rows, at: list[int]) -> Rows:
    moved = rows + VECTOR
    return moved * (rows.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True))


KINDS: dict[str, tuple[dict[str, Any], Change]] = {
    "keep norm": ({"do": "steer", "vector": VECTOR, "keep_norm": True}, keeps_norm),
    "zero": ({"do": "ablate"}, lambda rows, at: torch.zeros_like(rows)),
    "given mean": ({"do": "ablate", "to": "mean", "vector": VECTOR}, lambda rows, at: VECTOR.expand_as(rows)),
    "project out": ({"do": "project_out", "direction": VECTOR}, lambda rows, at: rows - along(rows) * UNIT),
    "scale": ({"do": "scale", "factor": 0.25}, lambda rows, at: rows * 0.25),
    "clamp": ({"do": "clamp", "feature": 3, "value": 5.0}, clamped_feature),
    "clamp along": (
        {"do": "clamp", "direction": VECTOR, "min": -0.5, "max": 0.5},
        lambda rows, at: rows + (along(rows).clamp(-0.5, 0.5) - along(rows)) * UNIT,
    ),
    "positions": ({"do": "scale", "factor": 3.0, "positions": ":2"}, in_the_prompt(lambda row: row * 3.0)),
    "steps": (
        {"do": "scale", "factor": 3.0, "steps": "0"},
        lambda rows, at: rows * 3.0 if len(at) > 1 else rows,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_every_kind_of_intervention_is_what_hand_written_hooks_do(name: str) -> None:
    points = single(name)
    for number, (document, change) in enumerate(KINDS.values()):
        point = points[number % len(points)]
        held_against_hooks(name, point, 1, change, {**document, "point": point, "layers": [1]})


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_a_patch_puts_in_the_rows_of_another_prompt(name: str) -> None:
    for point in single(name):
        rows = source_rows(name, point, 1)

        def patched(old: Rows, at: list[int], rows: Rows = rows) -> Rows:
            pairs = zip(old, at, strict=True)
            return torch.stack([rows[p + 2] if p < 2 else row for row, p in pairs])

        source = {"prompt": SOURCE, "positions": "2:4"}
        patch = {"do": "patch", "point": point, "layers": 1, "positions": [0, 1], "source": source}
        held_against_hooks(name, point, 1, patched, patch)


@pytest.mark.parametrize("positions", [[1, 3], [-5, 3], "1,3"])
@pytest.mark.parametrize("of_source", [[3, 1], [-1, -3], "3,1"])
@pytest.mark.parametrize("stored", [False, True])
def test_a_patch_pairs_positions_in_the_order_given(
    tmp_path: Path, positions: Any, of_source: Any, stored: bool
) -> None:
    hm, rows = opened("llama"), source_rows("llama", "resid_pre", 1)
    source: dict[str, Any] = {"prompt": SOURCE}
    if stored:
        hm.capture([SOURCE], ["resid_pre"], [1], 0, store=tmp_path / "run")
        source = {"store": str(tmp_path / "run")}
    patch = {"do": "patch", "point": "resid_pre", "layers": 1, "positions": positions}
    edits = [{**patch, "source": {**source, "positions": of_source}}]
    got = hm.capture([RAGGED[0]], ["resid_pre"], [1], 0, interventions=edits).read(0, "resid_pre", 1)
    torch.testing.assert_close(got[[1, 3]], rows[[3, 1]], rtol=1e-4, atol=1e-4)
    swapped = hm.capture([RAGGED[0]], ["resid_pre"], [1], 0, interventions=[{**edits[0], "positions": [3, 1]}])
    assert torch.equal(swapped.read(0, "resid_pre", 1)[[3, 1]], got[[1, 3]])


@pytest.mark.parametrize(
    ("positions", "of_source", "message"),
    [
        ([1, 1], [0, 1], "1 given more than once"),
        ([1, 2], [3, 3], "3 given more than once"),
        ([1, -5], [0, 1], "two of them are token 1 of prompt 0, whose 6 tokens"),
        ([1, 99], [0], "positions 99: no prompt has them"),
        ([1, 2], [3, 9], "no row at each of positions 3, 9: it holds positions 0, 1, 2, 3"),
    ],
)
def test_positions_that_do_not_pair_are_refused(positions: Any, of_source: Any, message: str) -> None:
    source = {"prompt": SOURCE, "positions": of_source}
    patch = {"do": "patch", "point": "resid_pre", "layers": 1, "positions": positions, "source": source}
    with pytest.raises(hookmap.HookmapError, match=message):
        opened("llama").capture([RAGGED[0]], ["resid_pre"], [1], 0, interventions=[patch])


def test_one_source_token_may_stand_for_two_by_its_two_names() -> None:
    source = {"prompt": SOURCE, "positions": [3, -1]}
    patch = {"do": "patch", "point": "resid_pre", "layers": 1, "positions": [1, 2], "source": source}
    got = opened("llama").capture([RAGGED[0]], ["resid_pre"], [1], 0, interventions=[patch]).read(0, "resid_pre", 1)
    torch.testing.assert_close(got[1:3], source_rows("llama", "resid_pre", 1)[[3, 3]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", [{"positions": [2, 40]}, {"steps": [1, 9]}, {"heads": [0, 0], "point": "z"}])
def test_what_is_written_nowhere_or_named_twice_is_refused(where: dict[str, Any]) -> None:
    with pytest.raises(hookmap.HookmapError, match=r"positions 40: no prompt|steps 9: the last is 2|each head once"):
        opened("llama").generate(RAGGED, [{"do": "scale", "point": "mlp_out", "factor": 2, **where}], None, 3)


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_what_changes_nothing_changes_no_bit(name: str) -> None:
    """No intervention, a steer by zero, a scale by one, a clamp without an end, an ablation of tokens that are not
    there, each prompt patched into itself.
    """
    hm, family = opened(name), FAMILIES[name]
    points = list(family.points)
    for new in (NEW, 0):
        plain = hm.capture(RAGGED[:1], points, max_new_tokens=new)
        writable = [p for p in points if hm.proofs.of(hm.map.selectors([p], [0])[0]).reason is None]
        nothing = [
            {"do": do, "point": point, **what}
            for point in writable
            for do, what in (
                ("steer", {"vector": [0.0] * D}),
                ("steer", {"vector": VECTOR, "strength": 0.0, "keep_norm": True}),
                ("scale", {"factor": 1.0}),
                ("clamp", {"direction": VECTOR, "min": -1e9}),
                ("ablate", {"positions": "500:"}),  # of which there are none
                ("patch", {"source": {"prompt": RAGGED[0]}}),
            )
            if do != "patch" or not new  # a prompt's rows by generate may differ from those of one pass in a bit
        ]
        for interventions in ((), nothing):
            run = hm.capture(RAGGED[:1], points, max_new_tokens=new, interventions=interventions)
            assert run.tokens == plain.tokens
            for key in plain.keys:
                assert torch.equal(run.read(0, *key), plain.read(0, *key)), (key, new)


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_the_last_stream_patched_everywhere_gives_the_logits_of_its_source(name: str) -> None:
    hm = opened(name)
    source = hm.capture(SOURCE, ["logits"], max_new_tokens=0)
    patch = {"do": "patch", "point": "resid_post", "layers": -1, "positions": "all", "source": {"prompt": SOURCE}}
    run = hm.capture([[7, 8, 9, 10]], ["logits"], max_new_tokens=0, interventions=[patch])
    assert torch.equal(run.read(0, "logits"), source.read(0, "logits"))


def test_the_middle_of_opt_is_written_where_batch_and_positions_are_one_axis() -> None:
    """By hand: in place into what the second norm is given, the pads of the padded batch left out."""
    hm, fed = opened("opt"), [0]

    def steered(_: Any, args: Any) -> None:
        rows = args[0].view(len(RAGGED), -1, D)
        for number, length in enumerate(LENGTHS):
            rows[number, max(0, WIDTH - length - fed[0]) :] += VECTOR
        fed[0] += rows.shape[1]

    norm = hm.model.get_submodule("model.decoder.layers.1.final_layer_norm")
    with torch.no_grad():
        handle = norm.register_forward_pre_hook(steered)
        reference = plain_hooks.generate(hm.model, FAMILIES["opt"], RAGGED, max_new_tokens=NEW, do_sample=False)
        handle.remove()
    steer = {"do": "steer", "point": "resid_mid", "layers": 1, "vector": VECTOR}
    run = hm.capture(RAGGED, ["resid_post"], max_new_tokens=NEW, interventions=[steer])
    for number, length in enumerate(LENGTHS):
        expected = reference.point(FAMILIES["opt"], "resid_post", 2)[number, WIDTH - length :]
        assert torch.equal(run.read(number, "resid_post", 2), expected)


def test_the_mean_of_a_prompt_is_kept_for_the_tokens_after_it() -> None:
    """By hand: the mean over the prompt's own rows, pads left out, at every position."""
    means: dict[int, torch.Tensor] = {}
    count = [0]

    def averaged(rows: Rows, at: list[int]) -> Rows:
        row = count[0] % len(RAGGED)
        count[0] += 1
        if at[0] == 0:
            means[row] = rows.float().mean(0)
        return means[row].expand_as(rows)

    held_against_hooks("llama", "mlp_out", 1, averaged, {"do": "ablate", "to": "mean", "point": "mlp_out", "layers": 1})
    generated = {"do": "ablate", "to": "mean", "point": "mlp_out", "layers": 1, "positions": "generated"}
    held_against_hooks(
        "llama",
        "mlp_out",
        1,
        lambda rows, at: averaged(rows, at) if at[0] else (averaged(rows, at), rows)[1],
        generated,
    )


def test_a_run_without_a_cache_writes_old_tokens_again() -> None:
    hm = opened("llama")
    for where in ({"positions": "prompt"}, {"positions": "generated"}, {"steps": "1:3"}, {"positions": "0,3,7"}):
        steer = {"do": "steer", "point": "resid_mid", "layers": 1, "vector": VECTOR, **where}
        runs = [
            hm.generate(RAGGED, [steer], {"points": "resid_post"}, 6, use_cache=cached, engine="hooks")
            for cached in (True, False)
        ]
        assert runs[0].tokens == runs[1].tokens
        for n in range(len(RAGGED)):
            for layer in range(LAYERS):
                one, two = (run.read(n, "resid_post", layer) for run in runs)
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_prompt_fed_in_pieces_is_written_in_all_of_them() -> None:
    hm = opened("llama")
    steer = {"do": "steer", "point": "resid_mid", "layers": 1, "vector": VECTOR, "positions": [1, 4, 5]}
    whole, pieces = (
        hm.generate(RAGGED[0], [steer], {"points": "resid_post"}, 4, prefill_chunk_size=size) for size in (None, 2)
    )
    torch.testing.assert_close(whole["resid_post", 2], pieces["resid_post", 2], rtol=1e-4, atol=1e-4)
    mean = {"do": "ablate", "to": "mean", "point": "resid_mid", "layers": 1}
    with raises(hookmap.InterventionError, "fed the prompt in pieces"):
        hm.generate(RAGGED[0], [mean], None, 4, prefill_chunk_size=2)


def test_a_batch_a_harvest_and_a_prompt_alone_are_written_alike() -> None:
    hm = opened("gemma2")
    resample = {"do": "ablate", "to": "resample", "source": {"prompt": SOURCE}, "seed": 3}
    edits = [
        {"do": "steer", "point": "resid_mid", "layers": [0, 2], "vector": VECTOR, "positions": "last_prompt"},
        {**resample, "point": "mlp_out", "layers": 1},
    ]
    together = hm.capture(RAGGED, ["resid_post"], max_new_tokens=0, interventions=edits)
    for number, ids in enumerate(RAGGED):
        if number == 0:  # the draw of a resample goes by the number of the prompt
            alone = hm.capture([ids], ["resid_post"], max_new_tokens=3, interventions=edits)
            rows = alone.read(0, "resid_post", 2)[: len(ids)]
            torch.testing.assert_close(together.read(number, "resid_post", 2), rows, rtol=1e-4, atol=1e-4)
    drawn = hm.capture(SOURCE, ["mlp_out"], [1], max_new_tokens=0).read(0, "mlp_out", 1)
    found = hm.capture(RAGGED, ["mlp_out"], [1], max_new_tokens=0, interventions=edits[1:]).read(2, "mlp_out", 1)
    picked = [(row == drawn).all(1).nonzero().flatten().tolist() for row in found]
    assert all(len(each) == 1 for each in picked) and len({each[0] for each in picked}) > 1
    other = [{**edits[1], "seed": 4}]
    again = hm.capture(RAGGED, ["mlp_out"], [1], max_new_tokens=0, interventions=other).read(2, "mlp_out", 1)
    assert not torch.equal(again, found)


def test_several_at_one_place_go_in_the_order_given_and_layers_in_forward_order() -> None:
    hm = opened("llama")
    add = {"do": "steer", "point": "resid_mid", "layers": 1, "vector": VECTOR}
    double = {"do": "scale", "point": "resid_mid", "layers": 1, "factor": 2.0}
    plain = hm.capture(RAGGED[0], ["resid_mid"], [1], 0)["resid_mid", 1]
    one, two = (
        hm.capture(RAGGED[0], ["resid_mid"], [1], 0, interventions=i)["resid_mid", 1]
        for i in ([add, double], [double, add])
    )
    assert torch.equal(one, (plain + VECTOR) * 2) and torch.equal(two, plain * 2 + VECTOR)
    zero_first = [
        {"do": "scale", "point": "resid_post", "layers": 1, "factor": 2.0},
        {"do": "ablate", "point": "resid_post", "layers": 0},
    ]
    run = hm.capture(RAGGED[0], ["resid_pre", "resid_post"], [1], 0, interventions=zero_first)
    assert torch.equal(run["resid_pre", 1], torch.zeros_like(plain))


def test_rows_before_and_after_come_out_of_one_run() -> None:
    hm = opened("qwen3")
    steers = [
        {"do": "steer", "point": p, "layers": 1, "vector": VECTOR} for p in ("resid_mid", "mlp_out", "resid_post")
    ]
    run = hm.generate(RAGGED, steers, {"points": "all", "before": True}, 4)
    assert run.before is not None and run.before.keys == run.keys and run.before.tokens == run.tokens
    for number in range(len(RAGGED)):
        for key in run.keys:
            before, after = run.before.read(number, *key), run.read(number, *key)
            written = key in (("resid_mid", 1), ("mlp_out", 1), ("mlp_out_raw", 1), ("resid_post", 1))
            assert torch.equal(after, before + VECTOR if written else before), key
    assert hm.generate(RAGGED, steers, {"points": "all"}, 2).before is None


def test_rows_before_go_to_disk_too_and_are_gone_on_with(tmp_path: Path) -> None:
    """After a kill one folder may be ahead of the other: what either lacks is done again, and doubled in neither."""
    hm = opened("llama")
    steer = {"do": "steer", "point": "resid_mid", "layers": 1, "vector": VECTOR}
    capture = {"points": ["resid_mid", "mlp_out"], "layers": [1], "before": True}
    options = {"max_new_tokens": 4, "batch_size": 1}
    memory = hm.generate(RAGGED, [steer], capture, **options)
    folder = tmp_path / "run"

    def stop(where: Any) -> None:
        if where.samples_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hm.generate(RAGGED, [steer], capture, store=folder, progress=stop, **options)
    shutil.rmtree(folder / "before")
    assert len(hookmap.open_store(folder)) == 2
    with raises(hookmap.StoreError, "before"):
        hm.generate(RAGGED, [steer], {**capture, "before": False}, store=folder, resume=True, **options)
    run = hm.generate(RAGGED, [steer], capture, store=folder, resume=True, **options)
    assert run.before is not None and memory.before is not None
    assert run.before.tokens == run.tokens == memory.tokens
    for found, expected in ((run, memory), (run.before, memory.before)):
        assert not found.store.verify()  # type: ignore[attr-defined]
        for key in memory.keys:
            assert all(torch.equal(found.read(n, *key), expected.read(n, *key)) for n in range(len(RAGGED)))
    assert torch.equal(run.read(0, "resid_mid", 1), run.before.read(0, "resid_mid", 1) + VECTOR)


def test_heads_are_written_one_by_one() -> None:
    """Ablating head 2 of z is ablating what the output projection makes of it, by hand."""
    for name, path in (("llama", "model.layers.1.self_attn.o_proj"), ("gpt2", "transformer.h.1.attn.c_proj")):
        hm = opened(name)

        def cut(_: Any, args: Any) -> Any:
            new = args[0].clone()
            new[..., 16:24] = 0
            return (new, *args[1:])

        with torch.no_grad():
            handle = hm.model.get_submodule(path).register_forward_pre_hook(cut)
            expected = hm.model(torch.tensor([RAGGED[0]])).logits[0]
            handle.remove()
        ablate = {"do": "ablate", "point": "z", "layers": 1, "heads": [2]}
        run = hm.capture(RAGGED[0], ["logits", "z"], [1], 0, interventions=[ablate])
        torch.testing.assert_close(run.read(0, "logits"), expected, rtol=1e-5, atol=1e-5)
        assert (run.read(0, "z", 1)[:, 2] == 0).all() and (run.read(0, "z", 1)[:, 1] != 0).any()


def test_queries_out_of_a_fused_and_grouped_projection_are_written_alone() -> None:
    hm = opened("falcon_40b")
    before = hm.capture(RAGGED[0], ["q", "k", "v", "mixer_out"], [1], 0)
    scale = {"do": "scale", "point": "q", "layers": 1, "factor": 3.0}
    after = hm.capture(RAGGED[0], ["q", "k", "v", "mixer_out"], [1], 0, interventions=[scale])
    assert torch.equal(after["q", 1], before["q", 1] * 3.0)
    assert torch.equal(after["k", 1], before["k", 1]) and torch.equal(after["v", 1], before["v", 1])
    assert not torch.equal(after["mixer_out", 1], before["mixer_out", 1])


def test_logits_are_written_and_choose_the_tokens() -> None:
    hm = opened("llama")
    wanted = torch.zeros(plain_hooks.VOCABULARY)
    wanted[42] = 1e4
    run = hm.generate(RAGGED, [{"do": "steer", "point": "logits", "vector": wanted}], None, 3)
    assert all(ids[-3:] == (42, 42, 42) for ids in run.tokens)
    assert run.keys == ()


def test_a_stored_capture_is_a_source(tmp_path: Path) -> None:
    hm = opened("llama")
    hm.capture([RAGGED[1], SOURCE], ["resid_mid"], [1], 3, store=tmp_path / "run")
    by_prompt = {"do": "patch", "point": "resid_mid", "layers": 1, "positions": ":4", "source": {"prompt": SOURCE}}
    by_store = {**by_prompt, "source": {"store": str(tmp_path / "run"), "sample": 1}}
    one, two = (
        hm.capture(RAGGED[0], ["logits"], max_new_tokens=0, interventions=[i])["logits"] for i in (by_prompt, by_store)
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    other = opened("mistral")
    with raises(hookmap.InterventionError, "captured from a LlamaForCausalLM"):
        other.capture(RAGGED[0], ["logits"], max_new_tokens=0, interventions=[by_store])


def test_a_file_says_what_python_says(tmp_path: Path) -> None:
    hm = opened("llama")
    (tmp_path / "vectors").mkdir()
    save_file({"happy": VECTOR}, tmp_path / "vectors" / "v.safetensors")
    file = tmp_path / "edits.yaml"
    file.write_text(
        "- {do: steer, point: resid_mid, layers: [1], vector: {file: vectors/v.safetensors, key: happy}, strength: 2}\n"
        "- {do: scale, point: mlp_out, layers: all, factor: 0.5, steps: '1:'}\n"
    )
    same = [
        Steer(point="resid_mid", layers=(1,), vector=tuple(VECTOR.tolist()), strength=2.0),
        {"do": "scale", "point": "mlp_out", "factor": 0.5, "steps": "1:"},
    ]
    runs = [hm.generate(RAGGED, i, {"points": "resid_post"}, 4) for i in (file, same)]
    assert all(torch.equal(runs[0].read(0, *key), runs[1].read(0, *key)) for key in runs[0].keys)
    (tmp_path / "edits.json").write_text(dump_interventions(load_interventions(file)))
    assert load_interventions(tmp_path / "edits.json")[1] == load_interventions(file)[1]
    noted = runs[0].manifest.settings["interventions"]
    assert noted[0]["vector"]["key"] == "happy" and len(noted[0]["vector"]["sha256"]) == 64
    assert json.dumps(noted) and noted[1]["factor"] == 0.5


def test_a_span_in_a_file_is_a_span_and_a_key_is_given_once(tmp_path: Path) -> None:
    """To YAML 1.1 the positions 4:20 are 4 * 60 + 20, of which no prompt has any: nothing would be written."""
    file = tmp_path / "edits.yaml"
    file.write_text("- {do: scale, point: mlp_out, factor: 2, positions: 4:20, steps: 1:2}\n")
    assert (load_interventions(file)[0].positions, load_interventions(file)[0].steps) == ("4:20", "1:2")
    file.write_text("- do: scale\n  point: mlp_out\n  factor: 2\n  factor: 3\n")
    with raises(hookmap.InterventionError, "edits.yaml", "factor is given twice", "line 4"):
        load_interventions(file)


def test_a_resumed_run_must_have_the_same_interventions(tmp_path: Path) -> None:
    hm, where = opened("llama"), tmp_path / "run"
    steer = {"do": "steer", "point": "resid_mid", "layers": 1, "vector": VECTOR}
    hm.capture(RAGGED, ["resid_mid"], [1], 2, interventions=[steer], store=where)
    with raises(hookmap.StoreError, "interventions"):
        hm.capture(RAGGED, ["resid_mid"], [1], 2, interventions=[{**steer, "strength": 2}], store=where, resume=True)


def test_every_problem_of_the_documents_is_said_at_once() -> None:
    with pytest.raises(hookmap.InterventionError) as found:
        read_interventions(
            [
                {"do": "steer", "point": "resid_mid"},
                {"do": "ablate", "point": "resid_mid", "to": "resample"},
                {"do": "clamp", "point": "mlp_out", "feature": 1, "min": 3, "max": 2},
                {"do": "stear", "point": "mlp_out"},
                {"do": "patch", "point": "mlp_out", "source": {"prompt": "a", "store": "b"}},
            ]
        )
    text = str(found.value)
    for part in (
        "intervention 0 (steer) vector",
        "resample needs a source",
        "min 3 is above max 2",
        "stear",
        "one of them",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    "given", [SteeringVector(About(point="resid_post", method="pca"), {1: torch.ones(D)}), len, None, 3]
)
def test_what_is_no_document_is_told_how_it_is_given(given: Any) -> None:
    told = ("hookmap.apply(", ".interventions(", f"got {type(given).__name__}")
    before = {"do": "scale", "point": "z", "factor": 2}
    for each, number in ((given, 0), ([before, given], 1), ([before, hookmap.apply(len, "z", layers=1), given], 2)):
        with raises(hookmap.InterventionError, f"intervention {number}: expected a document", *told):
            read_interventions(each)


def test_every_problem_with_the_model_is_said_at_once() -> None:
    hm = opened("llama")
    wrong = [
        {"do": "scale", "point": "resid_midd", "factor": 1},
        {"do": "scale", "point": "resid_mid", "layers": [7], "factor": 1},
        {"do": "scale", "point": "resid_mid", "positions": "last", "factor": 1},
        {"do": "scale", "point": "resid_mid", "steps": "-1", "factor": 1},
        {"do": "steer", "point": "resid_mid", "vector": [1.0, 2.0]},
        {"do": "project_out", "point": "resid_mid", "direction": [0.0] * D},
        {"do": "scale", "point": "resid_mid", "heads": [0], "factor": 1},
        {"do": "scale", "point": "z", "heads": [9], "factor": 1},
        {"do": "clamp", "point": "resid_mid", "feature": 32, "max": 1},
        {"do": "patch", "point": "resid_mid", "positions": "all", "source": {"prompt": SOURCE}},
        {"do": "scale", "point": "attn_result", "factor": 1},
    ]
    with pytest.raises(hookmap.SelectionError) as found:
        hm.generate(RAGGED, wrong, None, 2)
    for part in (
        "did you mean resid_mid", "layer 7 is out of range", "Use last_prompt", "steps '-1'", "expected [32], a row",
        "direction of length 0", "resid_mid has no heads", "has 0 to 3", "feature 32 is not there",
        "the source has 4 rows", "the model holds no such tensor: write z",
    ):  # fmt: skip
        assert part in str(found.value), (part, str(found.value))


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"layers": 7}, hookmap.SelectionError),
        ({"positions": "last"}, hookmap.SelectionError),
        ({"positions": "text=a"}, hookmap.SelectionError),  # without a tokenizer
        ({"steps": "-1"}, hookmap.SelectionError),
        ({"heads": [0]}, hookmap.InterventionError),
        ({"vector": [1.0, 2.0]}, hookmap.InterventionError),
        ({"point": "pattern"}, hookmap.InterventionError),
    ],
)
def test_a_place_that_is_not_there_is_another_error_than_a_change_that_is_none(
    wrong: dict[str, Any], kind: type[hookmap.HookmapError]
) -> None:
    hm = hookmap.open(plain_hooks.build("llama"))
    with raises(hookmap.HookmapError, "1 problem with the interventions") as found:
        hm.generate(RAGGED, [{"do": "steer", "point": "resid_mid", "vector": [0.0] * D, **wrong}], None, 1)
    assert type(found.value) is kind


def test_a_vector_of_heads_is_given_as_the_rows_are_or_flat() -> None:
    hm, rows = opened("llama"), torch.arange(32.0).reshape(4, 8)
    for vector in (rows.tolist(), rows.flatten().tolist()):
        ablate = {"do": "ablate", "point": "z", "to": "mean", "vector": vector}
        run = hm.capture([[5, 6, 7]], ["z"], [1], 0, interventions=[ablate])
        assert torch.equal(run.read(0, "z", 1), rows.expand(3, 4, 8))


def test_a_source_whose_rows_are_of_another_width_is_refused(tmp_path: Path) -> None:
    opened("llama").capture([[5, 6, 7]], ["resid_mid"], features=8, max_new_tokens=0, store=tmp_path / "narrow")
    patch = {"do": "patch", "point": "resid_mid", "layers": 1, "positions": "all"}
    source = {"store": str(tmp_path / "narrow"), "sample": 0}
    with raises(hookmap.InterventionError, "rows of resid_mid are [8]: expected [32]"):
        opened("llama").generate([[7, 8, 9]], [{**patch, "source": source}], None, 1)


@pytest.mark.slow
def test_what_the_models_numbers_cannot_hold_is_refused_and_never_written() -> None:
    hm = hookmap.open(plain_hooks.build("llama", dtype=torch.float16), tokenizer=tiny_tokenizer())
    at, ones = {"point": "resid_post", "layers": 1}, [1.0] * D
    wrong: list[dict[str, Any]] = [
        {"do": "steer", "vector": ones, "strength": 1e6},
        {"do": "ablate", "to": "mean", "vector": [1e6] * D},
        {"do": "clamp", "feature": 1, "value": 1e6},
        {"do": "clamp", "direction": ones, "min": 1e6},
    ]
    with raises(hookmap.InterventionError, "4 problems with the interventions") as found:
        hm.generate(RAGGED, [{**at, **each} for each in wrong], None, 2)
    assert str(found.value).count("it writes numbers up to 1e+06, and torch.float16 of this point goes up to") == 4
    with raises(hookmap.InterventionError, "too large for torch.float16"):
        hm.generate(RAGGED, [{**at, "do": "scale", "factor": 1e6}], None, 2)
    for document in ({"do": "clamp", "feature": 1, "min": float("nan")}, {"do": "scale", "factor": 1e39}):
        with raises(hookmap.InterventionError, "Input should be"):
            read_interventions([{**at, **document}])
    with raises(hookmap.InterventionError, "no heads given"):
        hm.generate(RAGGED, [{"do": "ablate", "point": "z", "layers": 1, "heads": []}], None, 2)


def test_a_direction_has_no_length_that_is_too_small_or_too_large() -> None:
    hm = opened("llama")
    runs = [
        hm.capture(RAGGED[0], ["resid_post"], [1], 0, interventions=[
            {"do": "project_out", "point": "resid_post", "layers": 1, "direction": VECTOR * size}
        ])["resid_post", 1]
        for size in (1.0, 1e-30, 1e30)
    ]  # fmt: skip
    assert all(torch.allclose(run, runs[0], atol=1e-5) for run in runs)
    assert float((runs[0] @ UNIT).abs().max()) < 1e-4


def test_files_of_vectors_are_checked(tmp_path: Path) -> None:
    hm = opened("llama")
    (tmp_path / "v.bin").write_bytes(b"x")
    (tmp_path / "v.safetensors").write_bytes(b"x")
    save_file({"a": torch.arange(D)}, tmp_path / "ints.safetensors")
    for file, key, message in (
        ("v.bin", "a", "from .safetensors files only"), ("none.safetensors", "a", "no such file"),
        ("v.safetensors", "a", "is no safetensors file"), ("ints.safetensors", "b", "it holds a"),
        ("ints.safetensors", "a", "expected floating point"),
    ):  # fmt: skip
        steer = {"do": "steer", "point": "resid_mid", "vector": {"file": str(tmp_path / file), "key": key}}
        with pytest.raises(hookmap.InterventionError, match=message):
            hm.generate(RAGGED, [steer], None, 2)


def test_both_engines_write_the_same() -> None:
    steer = {"do": "scale", "point": "resid_mid", "factor": 2.0}
    runs = [opened("llama").generate(RAGGED, [steer], None, 2, engine=engine) for engine in ("hooks", "nnsight")]
    assert runs[0].tokens == runs[1].tokens != opened("llama").generate(RAGGED, (), None, 2).tokens


def test_a_place_that_the_model_does_not_come_by_is_an_error() -> None:
    hm = hookmap.open(plain_hooks.build("llama"))
    steer = {"do": "steer", "point": "mlp_out", "layers": 1, "vector": VECTOR}
    hm.generate(RAGGED, [steer], None, 2)
    hm.model.model.layers[1].forward = lambda hidden_states, **_: hidden_states  # type: ignore[union-attr,operator]
    with raises(hookmap.InterventionError, "did not reach model.layers.1.mlp.output"):
        hm.generate(RAGGED, [steer], None, 2)


def test_threads_write_only_their_own_runs() -> None:
    """Each waits in the middle of its run for the other, on one model: one steers, one does not, one scales."""
    hm, meet = opened("llama"), threading.Barrier(3, timeout=240)
    steer = {"do": "steer", "point": "resid_mid", "layers": 1, "vector": VECTOR}
    scale = {"do": "scale", "point": "mlp_out", "layers": 1, "factor": 3.0}
    edits: list[list[dict[str, Any]]] = [[steer], [], [scale]]
    alone = [hm.generate(RAGGED[0], i, {"points": "resid_post"}, 4) for i in edits]
    runs: dict[int, Any] = {}

    def work(number: int) -> None:
        def wait(where: Any) -> None:
            if 0 < where.tokens_done < 4:
                meet.wait()

        runs[number] = hm.generate(RAGGED[0], edits[number], {"points": "resid_post"}, 4, progress=wait)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        assert all(torch.equal(runs[number][key], expected[key]) for key in expected.keys)


def test_the_model_is_as_it_was_after_a_run() -> None:
    hm = opened("gpt2")
    own = plain_hooks.hooks_on(hm.model)
    before = hm.capture(RAGGED, ["resid_post"], max_new_tokens=2)
    hm.generate(RAGGED, [{"do": "scale", "point": "resid_mid", "factor": 9.0}], None, 2)
    after = hm.capture(RAGGED, ["resid_post"], max_new_tokens=2)
    assert all(torch.equal(before.read(0, *key), after.read(0, *key)) for key in before.keys)
    assert plain_hooks.hooks_on(hm.model) == own
