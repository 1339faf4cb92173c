"""The evidence in words, the picture of a block, and the names for raw nnsight code."""

import io
from pathlib import Path
from xml.etree import ElementTree as Xml

import nnsight
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from support import plain_hooks
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.cli.main import main
from hookmap.cli.map_table import show_map
from hookmap.maps.describe import alike, explain, places
from hookmap.maps.tree import tree


@pytest.mark.slow
def test_the_evidence_names_additions_branches_and_readers() -> None:
    text = explain(hookmap.discover(plain_hooks.FAMILIES["llama"].config()))
    for part in (
        "resid_mid = resid_pre + mixer_out",
        "the mixer is attention: self_attn",
        "resid_mid is read by post_attention_layernorm",
        "k: self_attn.k_proj.output, features 0:16 of 1 groups, heads of 8",
        "final_norm: model.norm.output",
    ):
        assert part in text, part


@pytest.mark.slow
def test_a_hybrid_is_explained_kind_by_kind() -> None:
    text = explain(hookmap.discover(plain_hooks.FAMILIES["jamba"].config()))
    assert "layers 0, 2: recurrent+dense" in text and "layer 1: attention+moe" in text


def test_the_commands_explain_and_draw(tmp_path: Path) -> None:
    plain_hooks.build("jamba").save_pretrained(tmp_path / "model")
    explained = CliRunner().invoke(
        main, ["discover", str(tmp_path / "model"), "--explain", "-o", str(tmp_path / "m.json")]
    )
    assert explained.exit_code == 0 and "the chain of additions" in explained.stderr
    drawn = CliRunner().invoke(main, ["show", str(tmp_path / "m.json"), "--svg", str(tmp_path / "block.svg")])
    assert drawn.exit_code == 0, drawn.output
    for name in ("block.svg", "block-2.svg"):
        assert Xml.parse(tmp_path / name).getroot().tag.endswith("svg")
    nowhere = CliRunner().invoke(main, ["show", str(tmp_path / "m.json"), "--svg", str(tmp_path / "no" / "b.svg")])
    assert nowhere.exit_code == 1 and "--svg FILE" in nowhere.stderr


@pytest.mark.slow
def test_kinds_that_differ_in_a_constant_alone_are_told_in_few_lines(tmp_path: Path) -> None:
    """BEAM multiplies what layer i's attention adds by (2 i + 2) ** -0.5, what its MLP adds by (2 i + 3) ** -0.5."""

    def shown(*arguments: str) -> str:
        done = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["show", "BeamForCausalLM", *arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    short = shown()
    # Every sixth layer has no rotary embedding: another place of q_rot, so a branch of its own.
    branches = ("layers 0–2: ", "layers 3–4, 6–10, ", "layers 5, 11, ")
    assert len(short.splitlines()) < 140 and all(branch in short for branch in branches)
    attention, mlp = ([f"{(2 * i + add) ** -0.5:g}" for i in range(52)] for add in (2, 3))
    for factors, norm in ((attention, "post_attention_layernorm"), (mlp, "post_feedforward_layernorm")):
        assert f"({', '.join(factors[:3])}) × {norm}.output" in short
        assert f"({', '.join(factors[3:5])}, …, {factors[50]}) × {norm}.output" in short
        assert f"({factors[5]}, {factors[11]}, …, {factors[51]}) × {norm}.output" in short
    assert "--layers shows each layer's" in short
    whole, one = shown("--layers", "all"), shown("--layers", "-1,7")
    assert all(f" {factor} × post_attention_layernorm.output" in whole for factor in attention)
    assert "layer 7: " in one and "layer 51: " in one and "layer 3" not in one
    assert f" {attention[7]} × " in one and f" {mlp[51]} × " in one and "--layers shows" not in one
    refused = CliRunner().invoke(main, ["show", "BeamForCausalLM", "--layers", "52"])
    assert refused.exit_code == 1 and "layer 52 is out of range" in refused.stderr
    screen = Console(file=io.StringIO(), width=200)
    show_map(hookmap.load_map("BeamForCausalLM"), screen)
    table = screen.file.getvalue()  # type: ignore[attr-defined]
    assert len(table.splitlines()) < 50 and f"({', '.join(attention[:2])}, …, {attention[51]}) × " in table
    shown("--svg", str(tmp_path / "block.svg"))
    assert {file.name for file in tmp_path.iterdir()} == {"block.svg", "block-2.svg", "block-3.svg"}
    assert "× c<" in (tmp_path / "block.svg").read_text() or "c·post_" in (tmp_path / "block.svg").read_text()


@pytest.mark.parametrize("name", ["llama", "jamba", "gemma2"])
def test_nothing_of_kinds_that_differ_otherwise_is_joined(name: str) -> None:
    """Each point of each layer has the place that its selector has."""
    found = hookmap.discover(plain_hooks.FAMILIES[name].config())
    assert [len(kinds) for kinds in alike(found.kinds)] == [1] * len(found.kinds)
    for names, layers, where in places(found):
        for point in names.split(" = "):
            for layer in layers:
                (selector,) = found.selectors(point, [layer])
                own = " + ".join(str(term).replace(" * ", " × ") for term in selector.terms)
                assert own == where.replace("{i}", str(layer))


def test_a_reason_that_some_of_the_layers_have_names_them() -> None:
    found = hookmap.load_map("LlamaForCausalLM")
    (kind,) = found.kinds
    one, two = (
        kind.model_copy(update={"layers": layers, "unavailable": {"resid_mid.1": "none", "mlp_in.1": reason}})
        for layers, reason in (((0, 1), "this"), (tuple(range(2, 32)), "that"))
    )
    screen = Console(file=io.StringIO(), width=200)
    screen.print(tree(found.model_copy(update={"kinds": (one, two)})))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "no resid_mid.1  none\n" in text
    assert "no mlp_in.1  this (layers 0–1)" in text and "no mlp_in.1  that (layers 2–31)" in text
    assert text.count("resid_pre") == 1


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "olmo2", "jamba", "falcon_7b", "opt"])
def test_raw_nnsight_code_can_say_the_points(name: str) -> None:
    model = plain_hooks.build(name)
    found = hookmap.discover(model)
    names = found.rename()
    wrapped = nnsight.TransformersModel(model, tokenizer=tiny_tokenizer(), rename=names)
    for module, points in names.items():
        for point in points:
            (selector, *_) = found.selectors(point)
            if selector.layer is None:
                assert getattr(wrapped, point)._module is model.get_submodule(module)
            else:
                block = wrapped.get(found.layers_path.replace("{i}", str(selector.layer)))
                assert getattr(block, point)._module is model.get_submodule(selector.module)


def test_a_renamed_point_gives_the_tensor_of_its_selector() -> None:
    model = plain_hooks.build("llama")
    found = hookmap.discover(model)
    wrapped = nnsight.TransformersModel(model, tokenizer=tiny_tokenizer(), rename=found.rename())
    ids = torch.tensor([[5, 17, 3, 44]])
    with wrapped.trace(ids):
        middle = wrapped.model.layers[1].resid_mid.input.save()
    seen = []
    module = model.get_submodule("model.layers.1.post_attention_layernorm")
    handle = module.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    torch.testing.assert_close(middle, seen[0])


@pytest.mark.slow
def test_what_no_module_gives_whole_has_no_name() -> None:
    for name, absent in (("opt", "resid_mid"), ("granite", "mixer_out"), ("gpt2", "q"), ("llama", "resid_pre")):
        names = [
            p for points in hookmap.discover(plain_hooks.FAMILIES[name].config()).rename().values() for p in points
        ]
        assert absent not in names, name
