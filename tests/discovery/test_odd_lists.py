"""Where the blocks are: under any key, in no module of their own, in a buffer, or where no map can say it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from support import odd_lists, odd_parts, odd_streams, plain_hooks
from support.invented import DEPTH, D, Ladder, check, read
from support.raises import raises
from torch import Tensor, nn

import hookmap
from hookmap.discovery.dataflow import record
from hookmap.discovery.discover import discover
from hookmap.discovery.values import Values
from hookmap.errors import DiscoveryError, MapMismatchError
from hookmap.maps.parsing import parse
from hookmap.maps.shipped import resize
from hookmap.maps.tree import tree
from hookmap.verification.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("seeded")]

UNEXPOSED = dict.fromkeys(
    ("resid_pre", "resid_mid", "resid_post"), "the operation `.*` in the forward of .* computes it"
)


@pytest.mark.parametrize(
    ("kind", "path", "names"),
    [
        (odd_lists.Words, "rungs.{i}", ("dawn", "noon", "dusk")),
        (odd_lists.Attributes, "{i}", ("lowest", "middle", "highest")),
        (odd_lists.Backwards, "{i}", ("low", "mid", "top")),
        (odd_lists.OneBlock, "{i}", ("rung",)),
        (odd_parts.SideBySide, "calms.{i}", ()),
        (odd_parts.InWords, "calm_{i}", ("low", "mid", "high")),
        (odd_parts.Pairs, "trunk.{i}", ("0", "2", "4")),
        (odd_lists.Trunk, "trunk.{i}", ("1", "2", "3")),
        (odd_parts.HalfInside, "blends.{i}", ()),
        (odd_parts.BothInside, "blends.{i}", ()),
        (odd_parts.Assorted, "calms.{i}", ()),
        (odd_parts.Couples, "rungs.{i}.0", ()),
        (odd_parts.Dictionaries, "layers.{i}.calm", ()),
        (odd_lists.Parts, "parts.block_{i}", ("a", "b", "c")),
        (lambda: odd_streams.InStates(odd_streams.StateRung), "rungs.{i}", ()),
        (lambda: Ladder(odd_lists.OfResiduals), "rungs.{i}", ()),
        (lambda: Ladder(odd_lists.SequenceOfResiduals), "rungs.{i}", ()),
        (odd_lists.TwoOfResiduals, "{i}", ("low", "high")),
        (odd_lists.Stages, "rungs.{i}", (*(f"low.{i}" for i in range(3)), *(f"high.{i}" for i in range(3)))),
        (odd_lists.Downwards, "rungs.{i}", ()),
        (lambda: odd_streams.Flat(odd_streams.FlatRung), "rungs.{i}", ()),
        (odd_streams.Buffer, "rungs.{i}", ()),
        (odd_streams.BufferLast, "rungs.{i}", ()),
        (odd_lists.Gaps, "rungs.{i}", ("1", "4", "7")),
        (odd_lists.Towers, "rungs.{i}", ()),
    ],
)
def test_blocks_are_found_under_any_key(kind: Callable[[], nn.Module], path: str, names: tuple[str, ...]) -> None:
    found = check(kind())
    assert (found.layers_path, found.layer_names) == (path, names)
    assert parse(found.to_json()) == found
    assert not found.between
    assert not found.left_out


def test_what_no_module_hands_over_is_refused_and_the_rest_is_right() -> None:
    found = check(odd_parts.Method(), UNEXPOSED)
    assert (found.layers_path, found.num_layers) == ("blends.{i}", DEPTH)


def test_a_block_in_two_modules_of_one_list_is_one_layer() -> None:
    found = check(odd_parts.Pairs())
    (selector,) = found.selectors("mlp_out", 1)
    assert selector.module == "trunk.3"
    assert found.final_norm_path == "trunk.6"
    with raises(MapMismatchError, "cannot be told"):
        resize(found, 6, D)


def test_what_the_blocks_run_through_is_written_where_it_is_kept() -> None:
    """A slice of a buffer holds what was written into that slice, and nothing else does."""

    class Kept(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept = torch.zeros(1, 3, 4)
            before = kept[:, 0]
            kept[:, 1] = x
            self.read = kept[:, 1], before, kept[:, 2]
            return self.read[0] * 2 + before + self.read[2]

    flow = record(Kept(), {"x": torch.ones(1, 4)})
    values = Values(flow)
    multiplied = next(op for op in flow.operations if op.name == "mul")
    added = [op for op in flow.operations if op.name == "add"]
    x = values.value(flow.inputs["x"])
    assert values.value(multiplied.inputs[0]) == x
    assert x not in [values.value(op.inputs[1]) for op in added]


# Blocks that are not of the logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "layers", "reason"),
    [
        (odd_lists.Ahead, [3], "does not lead to the logits"),
        (odd_lists.Spare, [3, 4], "never called"),
        (odd_streams.Shorter, [2, 3], "runs on 7 positions where the others have 13"),
    ],
)
def test_a_block_that_is_no_layer_has_its_number_and_a_reason(
    kind: type[Ladder], layers: list[int], reason: str
) -> None:
    found = check(kind())
    assert found.num_layers == (6 if kind is odd_streams.Shorter else DEPTH + len(layers))
    for layer in range(found.num_layers):
        said = found.unavailable("resid_post", layer)
        assert (said is not None and reason in said) if layer in layers else said is None


def test_a_second_tower_of_the_logits_is_said() -> None:
    assert check(odd_lists.Beside()).left_out == ("aside.{i}",)


def test_a_block_outside_the_list_is_said() -> None:
    found = check(odd_lists.Prelude())
    assert (found.num_layers, found.left_out) == (DEPTH, ("first",))


@pytest.mark.parametrize(
    ("kind", "pairs"),
    [
        (odd_streams.Skips, {"2 -> 3", "3 -> 4", "4 -> 5"}),
        (odd_streams.Interrupted, {"0-1 -> 1-2"}),
        (odd_streams.Shorter, {"1 -> 4"}),
    ],
)
def test_where_the_stream_is_changed_between_blocks_is_said_of_each_pair(kind: type[Ladder], pairs: set[str]) -> None:
    found = check(kind())
    assert found.between.keys() == pairs
    assert not found.joined


# Blocks that give only what is to be added ----------------------------------------------------------------------------


def test_what_blocks_give_may_be_added_to_the_stream_outside_them() -> None:
    found = check(odd_streams.AddedOutside(odd_streams.Given))
    assert (found.layers_path, found.joined, found.kinds[0].branch_order) == ("rungs.{i}", True, "sequential")
    assert (found.kinds[0].mixer.modules, found.kinds[0].mlp.modules) == (("rungs.{i}.blend",), ("rungs.{i}.think",))
    (resid_post,) = found.selectors("resid_post", 0)
    assert [str(term) for term in resid_post.terms] == ["rungs.0.input[0]", "rungs.0.output"]


def test_each_run_of_such_blocks_is_right() -> None:
    assert check(odd_streams.AddedOutsideTwice(odd_streams.Given)).runs == "2 x (0-2)"


def test_what_they_give_may_be_of_one_branch() -> None:
    lacking = ("resid_mid", "mlp_in", "mlp_out")
    found = check(odd_streams.AddedOutside(odd_streams.GivenOne), dict.fromkeys(lacking, "no MLP"))
    assert [kind.branch_order for kind in found.kinds] == ["mixer_only"]


def test_half_of_a_value_that_holds_both_branches_is_the_mixers_output() -> None:
    why = "the mixer, and what computes each position alone behind it, are added to the stream as one value: mixer_out"
    lacking = ("resid_mid", "mlp_in", "mlp_out")
    check(odd_streams.HalfAddedOutside(odd_streams.GivenHalf), dict.fromkeys(lacking, why))


# What a map cannot say ----------------------------------------------------------------------------------------------


class Nothing(Ladder):
    """No blocks at all: a bag of words."""

    def climb(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (lambda: odd_streams.FlatTurned(odd_streams.FlatRung), r"positions first: \[pos \* batch, d_model\]"),
        (odd_streams.Copies, r"given \[4, 13, 24\] for one sequence of 13 tokens: several rows of the batch"),
        (odd_streams.Hourglass, "several widths: 24 in layers 0–1, 4–5, 12 in layers 2–3"),
        (odd_streams.History, r"no blocks were found.*Seen: rungs.\{i\} \(3 modules\)"),
        (
            lambda: odd_streams.MoreAddedOutside(odd_streams.Given),
            r"rungs.\{i\} is added to the stream outside it, and",
        ),
        (odd_streams.OneTensorOfTwo, r"rungs.\{i\} enters the next only through `cat`, `split`\."),
        (odd_streams.Swapped, r"Seen: rungs.\{i\}.calm \(4 modules\), rungs.\{i\}.branch \(4 modules\)"),
        (Nothing, r"no blocks were found.*Seen: no lists of modules"),
        (odd_streams.Turned, r"rungs.\{i\} keep positions behind features: they are given \[1, 24, 13\]"),
    ],
)
def test_what_no_map_can_say_is_refused_with_what_was_seen(kind: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(DiscoveryError, match=reason):
        discover(kind().eval())


# What a user sees and gets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [odd_lists.Words, odd_lists.Attributes, odd_parts.InWords, odd_parts.Pairs])
def test_the_selectors_of_words_give_what_plain_hooks_give(kind: type[Ladder]) -> None:
    """To the bit: the selector's own module, hooked, against the tape."""
    model = kind().eval()
    found = discover(model)
    seen = read(model, found.selectors(["mixer_out", "mlp_out"]))
    assert len({s.module for s, _ in seen}) == 2 * DEPTH
    assert len({float(t.sum()) for t in seen.values()}) == 2 * DEPTH


def test_the_tree_shows_blocks_that_are_attributes_of_the_model() -> None:
    from rich.console import Console

    model = odd_lists.Attributes().eval()
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(tree(discover(model), {path: type(m).__name__ for path, m in model.named_modules() if path}))
    text = console.export_text()
    assert text.index("lookup") < text.index("layers 0, 2: Rung") < text.index("layer 1: InPlace")
    assert "── lowest" not in text


class Named(nn.ModuleDict):
    """Layers under words, in a model of transformers, which slices them."""

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, slice) else super().__getitem__(key)


def test_a_model_of_transformers_with_words_as_keys_is_captured_while_it_generates() -> None:
    model = plain_hooks.build("llama")
    model.model.layers = Named(dict(zip(("front", "middle", "back"), model.model.layers, strict=True)))
    hm = hookmap.open(model)
    assert hm.map.layer_names == ("front", "middle", "back")
    run = hm.capture([[5, 6, 7, 8]], ["resid_post", "attn_out"], max_new_tokens=3)
    seen: list[Tensor] = []
    layer = model.model.layers["back"]
    handle = layer.register_forward_hook(lambda _, args, out: seen.append(out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=3, do_sample=False)
    handle.remove()
    expected = torch.cat(seen, 1)
    assert torch.equal(run["resid_post", 2][:, : expected.shape[1]], expected)


def test_blocks_that_are_no_modules_run_twice() -> None:
    model = odd_parts.LoopedMethod().eval()
    found = discover(model)
    assert (found.runs, found.num_layers, found.between) == ("2 x (0-2)", DEPTH, {})
    result = verify(model, architecture_map=found)
    assert result.passed, [each for each in result.checks if not each.passed]
    for run in range(2):
        (selector,) = found.selectors("resid_pre", 1, calls=run)
        (term,) = selector.terms
        assert (term.module, term.side, term.call) == ("calms.1", "input", run)


def test_copies_of_a_sequence_inside_a_branch_are_refused_and_the_stream_is_right() -> None:
    found = check(Ladder(odd_streams.Ensemble))
    assert "several rows of the batch" in str(found.unavailable("q", 0))
    assert found.unavailable("mixer_out", 0) is None


def test_a_block_with_two_names_is_a_layer_under_each() -> None:
    model = odd_lists.SharedWords().eval()
    found = discover(model)
    assert [found.selectors("resid_pre", layer)[0].terms[0].call for layer in range(3)] == [0, 1, None]
    result = verify(model, architecture_map=found)
    assert result.passed, [each for each in result.checks if not each.passed]


def test_a_stream_with_positions_behind_features_is_refused_with_what_was_seen() -> None:
    """SqueezeBERT calls the methods of its blocks, and keeps the stream for convolutions."""
    sizes = {"hidden_size": 32, "embedding_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = tf.SqueezeBertForMaskedLM(tf.SqueezeBertConfig(**sizes, num_hidden_layers=2, vocab_size=96))
    with pytest.raises(DiscoveryError, match=r"positions behind features: they are given \[1, 32, \d+\] for one"):
        discover(model)
