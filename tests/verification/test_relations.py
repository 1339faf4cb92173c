"""Every relation that a shipped map states is checked, and a false one of its form fails: arithmetic by hand."""

from __future__ import annotations

import ast
import re
from functools import cache
from typing import Any

import pytest
import torch
from support import plain_hooks
from torch import Tensor, nn

from hookmap.discovery.discover import discover
from hookmap.maps.parsing import load
from hookmap.maps.relations import Relation
from hookmap.maps.shipped import mappings_folder
from hookmap.maps.templates import BlockKind
from hookmap.verification import relations
from hookmap.verification.context import Context
from hookmap.verification.runner import Given
from hookmap.verification.verify import verify

B, S, D, STREAMS = 2, 9, 64, 4
_INSIDE = r"z = pattern @ v|m\w+_out_raw = [\w.{}]+\((z|mlp_post)\)|router_indices = topk\(router_logits\)"


@cache
def stated() -> list[tuple[str, str, BlockKind]]:
    """Architecture, relation and kind of block, of all shipped maps."""
    paths = [path for path in mappings_folder().rglob("*.json") if ".schema" not in path.name]
    maps = [load(path) for path in sorted(paths)]
    return [(m.architecture, relation, kind) for m in maps for kind in m.kinds for relation in kind.relations]


def form_of(relation: str) -> str:
    return re.sub(r"\d+\.\d+(e-?\d+)?", "0.5", relation)


@cache
def forms() -> dict[str, tuple[str, BlockKind]]:
    """One of each form of those that are sums of points; the others are about the inside of a branch.

    What is multiplied by a parameter of the model is held in tests/discovery/test_invented_streams.py. What a block
    adds that depends on the tokens (Reformer's other stream) is stated, and no arithmetic can check it.
    """
    apart = re.compile(rf"{_INSIDE}|.*(\{{i\}}|other_of_tokens).*")
    return {form_of(line): (line, kind) for _, line, kind in stated() if not apart.fullmatch(line)}


def test_every_relation_of_the_shipped_maps_names_what_can_be_checked() -> None:
    assert len(stated()) > 1000
    parsed = [(name, line, Relation.parse(line), kind) for name, line, kind in stated()]
    assert not [(name, line) for name, line, each, kind in parsed if not each or not each.can_be_checked(kind.points)]
    assert not [(name, line) for name, line, each, _ in parsed if str(each) != line]


class _Made:
    """The points of one block, made by hand so that one relation holds."""

    def __init__(self, relation: str, kind: BlockKind) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.streams = "stream" in kind.axes
        self.values: dict[str, Tensor] = {}
        self.kind = kind
        left, _, right = relation.partition(" = ")
        tree = ast.parse(re.sub(r"\.(?=\d\b)(?<!\d\.)", "__", right), mode="eval").body
        self.values[left] = self._value(tree)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def stream(self) -> Tensor:
        return self.random(B, S, STREAMS, D) if self.streams else self.random(B, S, D)

    def _value(self, node: Any) -> Tensor:
        if isinstance(node, ast.BinOp):
            if isinstance(node.op, ast.Mult):
                assert isinstance(node.left, ast.Constant)
                return node.left.value * self._value(node.right)
            return self._value(node.left) + self._value(node.right)
        if isinstance(node, ast.Name):
            return self._point(node.id.replace("__", "."))
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        return self._applied(node.func.id, self._value(node.args[0]))

    def _point(self, name: str) -> Tensor:
        if name == "other":
            return self.random(D)
        if name in self.kind.points:
            return self.values.setdefault(name, self.stream())
        bare = self.values.setdefault(name.replace("_out", "_out_raw"), self.random(B, S, D))
        return bare.unsqueeze(2) * self.random(B, S, STREAMS, 1) if self.streams else bare * self.random(D)

    def _applied(self, function: str, x: Tensor) -> Tensor:
        if function == "norm":
            return nn.functional.layer_norm(x, (D,), self.random(D), self.random(D))
        if function == "mix":
            return self.random(B, S, STREAMS, STREAMS) @ x
        return x * (self.random(D) if function == "gate" else 0.3)


class _Norms(nn.Module):
    """A block with a norm whose weights are those of no relation here, and the eps of those by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList([nn.LayerNorm(D)])


def _held(relation: str, kind: BlockKind, values: dict[str, Tensor]) -> bool:
    """What the checks say of a relation, with these numbers as the points of layer 0."""
    one = kind.model_copy(update={"relations": (relation,), "layers": (0,)})
    document: Any = type("Map", (), {"layers_path": "block.{i}", "kinds": (one,), "at_layer": lambda *_: "block.0"})()
    points: Any = {(name, 0): value for name, value in values.items()}
    (check,) = relations.sums(Context(document, _Norms(), Given(B, S), points))
    assert check.detail == relation
    return check.passed


def _nested(form: str) -> bool:
    return form.count("norm(") > 1


@pytest.mark.parametrize("form", sorted(forms()))
def test_a_relation_that_holds_passes_and_one_that_does_not_fails(form: str) -> None:
    relation, kind = forms()[form]
    if _nested(form):
        pytest.skip("a norm within a norm has the weights of a module: X-MOD, below")
    made = _Made(relation, kind)
    assert _held(relation, kind, made.values)
    for name, value in made.values.items():
        assert not _held(relation, kind, {**made.values, name: made.random(*value.shape)}), f"another {name}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "relation", "false"),
    [
        ("qwen3", "z = pattern @ v", "q = pattern @ v"),
        ("qwen3", "mixer_out_raw = self_attn.o_proj(z)", "mlp_out_raw = self_attn.o_proj(z)"),
        ("qwen3", "mlp_out_raw = mlp.down_proj(mlp_post)", "mixer_out_raw = mlp.down_proj(mlp_post)"),
        ("qwen3", "resid_mid = resid_pre + mixer_out", "resid_mid = resid_pre + mlp_out"),
        ("qwen3", "resid_mid = resid_pre + mixer_out", "resid_mid = norm(resid_pre)"),
        ("qwen3", "resid_mid = resid_pre + mixer_out", "resid_mid = twice(resid_pre)"),
        ("qwen3", "resid_mid = resid_pre + mixer_out", "resid_mid = resid_pre + expert_out"),
    ],
)
def test_a_map_with_a_false_relation_fails(family: str, relation: str, false: str) -> None:
    model = plain_hooks.build(family)
    found = discover(model)
    (kind,) = found.kinds
    assert relation in kind.relations
    lines = tuple(false if line == relation else line for line in kind.relations)
    wrong = found.model_copy(update={"kinds": (kind.model_copy(update={"relations": lines}),)})
    failed = [check.detail for check in verify(model, architecture_map=wrong).checks if not check.passed]
    assert [line for line in failed if line.startswith(false)], failed


@pytest.mark.slow
def test_a_norm_within_a_norm_is_checked() -> None:
    """X-MOD: its adapter adds to a norm of the stream, and the sum is normed again."""
    from transformers import XmodConfig, XmodForCausalLM

    config = XmodConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=97,
        default_language="en_XX", is_decoder=True,
    )  # fmt: skip
    model = plain_hooks.redrawn(XmodForCausalLM(config))
    found = discover(model)
    apart = ("resid_mid.1 = norm(resid_mid + mlp_out)", "resid_post = norm(resid_mid.1 + mlp_out.1)")
    assert set(apart) < set(found.kinds[0].relations)
    nested = "resid_post = norm(norm(resid_mid + mlp_out) + mlp_out.1)"
    lines = (*(line for line in found.kinds[0].relations if line not in apart), nested)
    found = found.model_copy(
        update={"kinds": tuple(kind.model_copy(update={"relations": lines}) for kind in found.kinds)}
    )
    details = {check.detail: check.passed for check in verify(model, architecture_map=found).checks}
    assert details[nested]
    false = nested.replace("mlp_out.1", "mixer_out")
    lines = tuple(false if line == nested else line for line in found.kinds[0].relations)
    kinds = tuple(kind.model_copy(update={"relations": lines}) for kind in found.kinds)
    details = {
        c.detail: c.passed for c in verify(model, architecture_map=found.model_copy(update={"kinds": kinds})).checks
    }
    assert not details[false]
