"""hookmap, plain PyTorch hooks, TransformerLens and nnterp on the same random checkpoints. `make test-peers` runs it.

Each peer runs in an environment of its own. What it is known to answer otherwise is listed in programs.py, and held
against plain hooks here; where it begins to agree, or ceases to, a test fails, and docs/comparison.md is to be changed.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import questions as q
import torch
from hookmaps_answers import hookmaps_answers, load
from programs import PEERS, SEQUENTIAL, Peer, apart, like
from support import plain_hooks
from support.plain_hooks import FAMILIES
from support.tiny_tokenizer import tiny_tokenizer
from truth import truth

pytestmark = pytest.mark.slow

if not any(peer.python.exists() for peer in PEERS.values()):
    pytest.skip("no peer is installed: make test-peers", allow_module_level=True)

ROUNDING = 5e-6
"""of the largest number: float32 has 1.2e-7, and a peer may add in another order in each of a few dozen sums"""
OTHER = 1e-3
"""what differs differs by this at least: nothing between the two is taken for the one or the other"""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in FAMILIES:
        plain_hooks.build(name).save_pretrained(folder / name)  # type: ignore[operator]
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def ours(checkpoints: Path) -> Any:
    return cache(lambda name: hookmaps_answers(checkpoints / name))


@pytest.fixture(scope="session")
def theirs(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def asked(name: str) -> Path:
        peer = PEERS[name]
        if not peer.python.exists():
            pytest.skip(f"{peer.name} is not installed: make test-peers")
        answers = tmp_path_factory.mktemp(peer.name)
        peer.ask(checkpoints, answers)
        return answers

    return lambda peer, name: q.Answers.load(asked(peer.name) / name)


@pytest.mark.parametrize("name", FAMILIES)
def test_hookmap_says_what_plain_hooks_say(name: str, checkpoints: Path, ours: Any) -> None:
    true, own = truth(load(checkpoints / name), FAMILIES[name]), ours(name)
    assert not true.refused
    for question in true.tensors.keys() & own.tensors.keys():
        assert torch.equal(own.tensors[question], true.tensors[question]), question
    assert apart(own.tensors["lens"][-1], true.tensors["last lens"]) < ROUNDING


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_a_peer_agrees_save_where_it_is_known_not_to(peer: Peer, name: str, ours: Any, theirs: Any) -> None:
    own, other = ours(name), theirs(peer, name)
    assert ("load" in other.refused) == (name in peer.does_not_load), other.refused.get("load")
    if name in peer.does_not_load:
        return
    shared = {question: other.tensors[question] for question in other.tensors if question in own.tensors}
    assert len(shared) > 12, other.refused
    distances = {
        question: apart(tensor, like(own.tensors[question], question, tensor)) for question, tensor in shared.items()
    }
    known = {question for question in shared if peer.differs_on(name, question)}
    assert not {question: apart for question, apart in distances.items() if question not in known and apart >= ROUNDING}
    assert not {question for question in known if distances[question] <= OTHER}, f"{peer.name} agrees now"


@pytest.mark.parametrize("name", [name for name in SEQUENTIAL if name not in ("bloom", "opt")])  # a norm shows it there
def test_transformer_lens_writes_resid_mid_for_the_norm_alone(name: str, checkpoints: Path, theirs: Any) -> None:
    """The block goes on with the stream as it was: what it says is what a plain hook on the norm's own input says."""
    peer = PEERS["transformer-lens"]
    true, other = truth(load(checkpoints / name), FAMILIES[name]), theirs(peer, name)
    for question in ("steer resid_mid", "patch resid_mid"):
        assert apart(other.tensors[question], true.tensors[f"{question} for the norm alone"]) < ROUNDING
        assert apart(other.tensors[question], true.tensors[question]) > OTHER


@pytest.mark.parametrize("name", ["cohere", "gemma2"])
def test_nnterps_lens_leaves_out_what_stands_behind_the_unembedding(name: str, checkpoints: Path, theirs: Any) -> None:
    """Cohere's factor, Gemma 2's soft-cap: at the last layer it is not what the model says."""
    said = theirs(PEERS["nnterp"], name).tensors["lens"][-1]
    model = load(checkpoints / name)
    logits = truth(model, FAMILIES[name]).tensors["logits"][-1:]
    before = 30 * torch.atanh(logits.double() / 30) if name == "gemma2" else logits / model.config.logit_scale
    assert apart(said, before.softmax(-1).float()) < 1e-4 and apart(said, logits.softmax(-1)) > OTHER


def test_transformer_lenss_middle_of_bert_lies_behind_the_mlp(checkpoints: Path, theirs: Any) -> None:
    """`hook_resid_mid` is the stream plus both branches, before its last norm; `hook_attn_out` is the real middle."""
    model = load(checkpoints / "bert")
    true, said = truth(model, FAMILIES["bert"]).tensors, theirs(PEERS["transformer-lens"], "bert").tensors
    for layer in range(q.LAYERS):
        both = true[f"read resid_mid {layer}"] + true[f"read mlp_out {layer}"]
        assert apart(said[f"read resid_mid {layer}"], both) < ROUNDING
        assert apart(said[f"read mixer_out {layer}"], true[f"read resid_mid {layer}"]) < ROUNDING


def test_nnterps_attention_of_bloom_holds_the_stream_too(checkpoints: Path, theirs: Any) -> None:
    true = truth(load(checkpoints / "bloom"), FAMILIES["bloom"])
    said = theirs(PEERS["nnterp"], "bloom")
    for layer in range(q.LAYERS):
        own = true.tensors[f"read resid_mid {layer}"]
        assert apart(said.tensors[f"read mixer_out_raw {layer}"], own) < ROUNDING
