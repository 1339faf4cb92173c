"""The evidence in words, the picture of a block, and the names for raw nnsight code."""

from pathlib import Path
from xml.etree import ElementTree as Xml

import nnsight
import pytest
import torch
from click.testing import CliRunner
from support import plain_hooks
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.cli.main import main
from hookmap.maps.describe import explain


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


def test_what_no_module_gives_whole_has_no_name() -> None:
    for name, absent in (("opt", "resid_mid"), ("granite", "mixer_out"), ("gpt2", "q"), ("llama", "resid_pre")):
        names = [
            p for points in hookmap.discover(plain_hooks.FAMILIES[name].config()).rename().values() for p in points
        ]
        assert absent not in names, name
