"""Functions of one's own: `apply` writes what hand-written hooks write, `watch` sees what hooks see."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import NNsight
from support import own_functions, plain_hooks
from support.opened import EACH_STRUCTURE, RAGGED, opened
from support.plain_hooks import FAMILIES, LAYERS
from support.raises import raises
from support.written_by_hand import LENGTHS, NEW, WIDTH, held_against_hooks, single

import hookmap
from hookmap.capture.interventions.documents import dump_interventions, fingerprint
from hookmap.capture.interventions.importable import name_of

Rows = torch.Tensor


def by_position(rows: Rows, at: Any) -> Rows:
    """A change that depends on the position of each row."""
    return rows * (1 + torch.tensor(at.positions, dtype=rows.dtype)).unsqueeze(-1)


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_what_a_function_gives_is_written_as_hand_written_hooks_write_it(name: str) -> None:
    for point in single(name):
        applied = hookmap.apply(by_position, point=point, layers=1)
        by_hand = lambda rows, at: rows * (1 + torch.tensor(at, dtype=rows.dtype)).unsqueeze(-1)  # noqa: E731
        held_against_hooks(name, point, 1, by_hand, applied)


@pytest.mark.parametrize("cache", [True, False])
def test_a_function_is_told_what_its_rows_are(cache: bool) -> None:
    hm, told = opened("llama"), []

    def note(rows: Rows, at: Any) -> Rows:
        assert len(at.positions) == len(at.tokens) == len(at.steps) == len(rows)
        told.append((at.sample, at.point, at.layer, at.call, at.heads, at.positions, at.tokens, at.steps))
        return rows

    run = hm.capture(
        RAGGED, ["resid_post"], [1], NEW, interventions=[hookmap.apply(note, "z", [1], heads=[2])], use_cache=cache
    )
    for number, length in enumerate(LENGTHS):
        own = [entry for entry in told if entry[0] == number]
        assert all(entry[1:5] == ("z", 1, None, (2,)) for entry in own)
        last = own[-1] if not cache else tuple(sum((entry[n] for entry in own), ()) for n in range(5, 8))
        positions, tokens, steps = last[-3:]
        assert positions == tuple(range(length + NEW - 1))
        assert tokens == run.tokens[number][:-1]
        assert steps == (*[0] * length, *range(1, NEW))
        if cache:
            assert [len(entry[5]) for entry in own] == [length, *[1] * (NEW - 1)]


def test_a_function_gets_the_same_rows_whatever_the_batch() -> None:
    """A function may mix the rows of its sample: it never sees those of another, nor pads."""
    hm = opened("llama")
    centred = hookmap.apply(lambda rows, at: rows - rows.mean(0, keepdim=True), "resid_mid", [0, 2])
    for new in (0, NEW):
        runs = [
            hm.capture(RAGGED, ["resid_post"], max_new_tokens=new, interventions=[centred], batch_size=size)
            for size in (1, 3)
        ]
        for number in range(len(RAGGED)):
            alone, batched = (run.read(number, "resid_post", 2) for run in runs)
            torch.testing.assert_close(batched, alone, rtol=1e-5, atol=1e-5)


def test_functions_and_documents_are_written_in_forward_order() -> None:
    hm, scale = opened("llama"), {"do": "scale", "factor": 2.0, "point": "resid_post", "layers": 1}
    add = hookmap.apply(lambda rows, at: rows + 1, "resid_post", 1)
    early = hookmap.apply(lambda rows, at: rows * 0, "resid_pre", 0)
    plain = hm.capture(RAGGED, ["resid_post"], [1], 0, interventions=[early]).read(0, "resid_post", 1)
    for edits, expected in (([early, scale, add], plain * 2 + 1), ([add, scale, early], (plain + 1) * 2)):
        found = hm.capture(RAGGED, ["resid_post"], [1], 0, interventions=edits).read(0, "resid_post", 1)
        assert torch.equal(found, expected)


def test_a_point_that_is_not_proved_is_refused_for_a_function_too() -> None:
    with raises(hookmap.InterventionError, "the model holds no such tensor: write z"):
        opened("llama").capture(
            RAGGED, (), max_new_tokens=0, interventions=[hookmap.apply(by_position, "attn_result", 1)]
        )


def wrong(fault: str) -> Any:
    def fn(rows: Rows, at: Any) -> Any:
        if at.sample != 1 or at.step != 2:
            return rows
        if fault == "shape":
            return rows[..., :-1]
        if fault == "dtype":
            return rows.double()
        if fault == "device":
            return rows.to("meta")
        if fault == "infinite":
            return rows / 0
        if fault == "none":
            return None
        raise KeyError("mine")

    return fn


@pytest.mark.parametrize(
    "fault, said",
    [
        ("shape", "expected rows of shape [1, 32], as it got, got [1, 31]"),
        ("dtype", "expected rows of dtype torch.float32, as it got, got torch.float64"),
        ("device", "expected rows of device cpu, as it got, got meta"),
        ("infinite", "expected finite rows, got an infinity or nan at position 4"),
        ("none", "expected a tensor, got NoneType. To see rows and write none, give hookmap.watch"),
        ("raise", "it raised KeyError: 'mine'"),
    ],
)
def test_a_wrong_function_is_named_with_its_sample_layer_and_step(fault: str, said: str) -> None:
    hm = opened("llama")
    with pytest.raises(hookmap.InterventionError) as found:
        hm.capture(RAGGED, ["resid_post"], [1], NEW, interventions=[hookmap.apply(wrong(fault), "mlp_out", 1)])
    assert "hookmap.apply(wrong.<locals>.fn, …) for mlp_out, layer 1, sample 1, step 2: " + said in str(found.value)
    assert hm.capture([[1, 2]], ["logits"], max_new_tokens=0)["logits"].isfinite().all()  # no hook is left


def test_arguments_that_make_no_function_are_all_said() -> None:
    with pytest.raises(hookmap.InterventionError) as found:
        hookmap.apply("rows", 3, layers="some", heads="z")  # type: ignore[arg-type]
    for part in ("fn: 'rows' is no name of a function", "point: ", "layers: ", "heads: "):
        assert f"hookmap.apply: {part}" in str(found.value)


def test_a_function_may_run_the_model_itself() -> None:
    hm = opened("llama")
    inner = hm.capture([[7, 8, 9]], ["resid_post"], [2], 0).read(0, "resid_post", 2)

    def other(rows: Rows, at: Any) -> Rows:
        return rows + hm.capture([[7, 8, 9]], ["resid_post"], [2], 0).read(0, "resid_post", 2)[-1]

    edits = [hookmap.apply(other, "resid_post", 0)]
    plain, run = (hm.capture(RAGGED, ["resid_post"], [0], 0, interventions=i) for i in ((), edits))
    assert torch.equal(run.read(1, "resid_post", 0), plain.read(1, "resid_post", 0) + inner[-1])


# What only sees


@pytest.mark.filterwarnings("ignore:Module '.*' has a submodule named 'output'")  # nnsight's, of BERT
@pytest.mark.parametrize("name", EACH_STRUCTURE)
@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_a_watch_is_shown_the_rows_that_plain_hooks_see(name: str, engine: Any) -> None:
    """Sums of terms, too: OPT's `resid_mid` is one."""
    hm, family = opened(name), FAMILIES[name]
    shown: dict[tuple[str, int], dict[int, list[Rows]]] = {}
    tokens: dict[int, list[int]] = {}

    def see(rows: Rows, at: Any) -> None:
        shown.setdefault((at.point, at.layer), {}).setdefault(at.sample, []).append(rows)
        if (at.point, at.layer) == ("resid_pre", 0):
            tokens.setdefault(at.sample, []).extend(at.tokens)

    watches = [hookmap.watch(see, point) for point in family.points]
    run = hm.capture(RAGGED, ["logits"], max_new_tokens=NEW, interventions=watches, engine=engine)
    reference = plain_hooks.generate(hm.model, family, RAGGED, max_new_tokens=NEW, do_sample=False)
    for number, length in enumerate(LENGTHS):
        assert list(run.tokens[number]) == reference.sequences[number, WIDTH - length :].tolist()
        assert tokens[number] == list(run.tokens[number])[:-1]
        for point in family.points:
            for layer in family.only_layers.get(point, range(LAYERS)):
                expected = reference.point(family, point, layer)[number, WIDTH - length :]
                assert torch.equal(torch.cat(shown[point, layer][number]), expected), (point, layer)


def test_a_watch_sees_what_was_written_and_only_the_tokens_chosen() -> None:
    hm, seen = opened("llama"), []
    zero = {"do": "ablate", "point": "mlp_out", "layers": 1}
    watch = hookmap.watch(lambda rows, at: seen.append((at.sample, at.positions, rows)), "mlp_out", 1, "1:3", steps=0)
    hm.capture(RAGGED, (), max_new_tokens=NEW, interventions=[watch, zero])
    assert sorted((sample, positions) for sample, positions, _ in seen) == [(n, (1, 2)) for n in range(3)]
    assert all(not rows.any() for _, _, rows in seen)


def test_attention_weights_are_watched_without_those_of_pads() -> None:
    hm, shown = opened("llama"), {}
    watch = hookmap.watch(lambda rows, at: shown.setdefault(at.sample, []).append(rows), "pattern", 1, heads=[3, 0])
    for new in (0, NEW):
        shown.clear()
        run = hm.capture(RAGGED, ["pattern"], [1], new, interventions=[watch])
        for number, rows in shown.items():
            whole, at = run.read(number, "pattern", 1)[:, [3, 0]], 0
            for part in rows:
                assert torch.equal(part, whole[at : at + len(part), :, : part.shape[-1]])
                torch.testing.assert_close(part.sum(-1), torch.ones(part.shape[:-1]))
                at += len(part)
            assert at == len(whole)


def test_logits_are_watched_where_the_run_stores_none_or_all() -> None:
    hm, shown = opened("llama"), {}
    for points in ((), ["logits"]):
        for new in (0, 3):
            shown.clear()
            watch = hookmap.watch(
                lambda rows, at: shown.__setitem__(at.sample, rows), "logits", positions="last_prompt"
            )
            hm.capture(RAGGED, points, max_new_tokens=new, interventions=[watch])
            expected = hm.capture(RAGGED, ["logits"], max_new_tokens=new, positions="last_prompt")
            for number in range(len(RAGGED)):
                torch.testing.assert_close(shown[number], expected.read(number, "logits"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_a_sample_stops_where_its_function_says_so(engine: Any) -> None:
    hm = opened("llama")
    plain = hm.capture(RAGGED, ["resid_post"], [2], 8)

    def two(rows: Rows, at: Any) -> None:
        if at.sample == 1 and at.step == 2:
            at.stop()

    run = hm.capture(RAGGED, ["resid_post"], [2], 8, interventions=[hookmap.watch(two, "resid_mid", 1)], engine=engine)
    for number, length in enumerate(LENGTHS):
        made = 3 if number == 1 else 8
        assert run.tokens[number] == plain.tokens[number][: length + made]
        rows = plain.read(number, "resid_post", 2)[: length + made - 1]
        assert torch.equal(run.read(number, "resid_post", 2), rows)


def test_a_harvest_has_nothing_to_stop() -> None:
    stop = hookmap.watch(lambda rows, at: at.stop(), "resid_mid", 1)
    with raises(hookmap.InterventionError, "max_new_tokens=0 generates nothing"):
        opened("llama").capture(RAGGED, (), max_new_tokens=0, interventions=[stop])


# Where a function cannot go


def test_writing_beside_edits_stored_in_an_nnsight_model_is_refused() -> None:
    inner = plain_hooks.build("llama")
    given = NNsight(inner)
    hm, applied = hookmap.open(given), [hookmap.apply(by_position, "resid_pre", 1)]
    found, expected = (
        hm.capture(RAGGED, ["resid_post"], [1], 0, interventions=applied, engine=engine) for engine in ("auto", "hooks")
    )
    assert hm.engine()[0] == "nnsight"
    assert all(torch.equal(found.read(n, "resid_post", 1), expected.read(n, "resid_post", 1)) for n in range(3))
    with given.edit(inplace=True):
        given.model.layers[0].output[:] = 0
    with raises(hookmap.InterventionError, "edits are stored in this nnsight model"):
        hm.capture(RAGGED, (), max_new_tokens=0, interventions=applied)


def test_a_document_holds_no_function(tmp_path: Path) -> None:
    file = tmp_path / "edits.yaml"
    file.write_text("- {do: apply, fn: rows * 2, point: resid_pre, layers: 1}\n")
    for given in (str(file), [{"do": "apply", "fn": by_position, "point": "resid_pre"}]):
        with pytest.raises(hookmap.InterventionError, match=r"a document holds no function, .* give hookmap.apply"):
            opened("llama").capture(RAGGED, (), max_new_tokens=0, interventions=given)
    with raises(hookmap.InterventionError, "apply(by_position): a function is Python code"):
        dump_interventions([hookmap.apply(by_position, "resid_pre")])


def test_a_capture_goes_on_only_with_the_same_function(tmp_path: Path) -> None:
    def times(factor: Any) -> Any:
        return hookmap.apply(lambda rows, at: rows * factor, "resid_pre", [1])

    prints = [fingerprint([each]) for each in (times(2), times(2), times(3), times(torch.tensor(2.0)))]
    assert prints[0] == prints[1] and len({str(each) for each in prints}) == 3
    hm = opened("llama")
    hm.capture(RAGGED, ["resid_pre"], [1], 0, store=tmp_path / "run", interventions=[times(2)])
    with raises(hookmap.StoreError, "interventions"):
        hm.capture(RAGGED, ["resid_pre"], [1], 0, store=tmp_path / "run", resume=True, interventions=[times(3)])
    again = hm.capture(RAGGED, ["resid_pre"], [1], 0, store=tmp_path / "run", resume=True, interventions=[times(2)])
    assert len(again) == len(RAGGED)


def test_a_function_may_be_named() -> None:
    hm = opened("llama")
    named, given = (hookmap.apply(fn, "resid_pre", 1) for fn in (own_functions.TURNED, own_functions.turned))
    runs = [hm.capture(RAGGED, ["resid_post"], [1], NEW, interventions=[each]) for each in (named, given)]
    assert runs[0].tokens == runs[1].tokens and named.fn is own_functions.turned
    for name, told in (
        ("no name", "no name of a function"),
        ("support.own_functions:missing", "has no attribute 'missing'"),
        ("support.missing:turned", "No module named"),
        ("support.own_functions:TURNED", "expected a function of"),
    ):
        with raises(hookmap.InterventionError, told):
            hookmap.apply(name, "resid_pre", 1)
    assert [name_of(fn) for fn in (own_functions.turned, lambda rows, at: rows)] == [own_functions.TURNED, None]
