"""The Jacobian lens is held against autograd's whole Jacobian on a tiny model, and its files against their format."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.opened import opened
from support.raises import raises

import hookmap
from hookmap.analysis.jacobian_lens import JacobianLens
from hookmap.errors import SelectionError, StoreError

TEXTS = [[5, 17, 3, 60, 22, 9, 41], [11, 2, 33, 8, 19, 54]]
SKIP = 2


def by_hand(hm: Any, tokens: list[int], layer: int) -> torch.Tensor:
    """Sum over later positions, mean over positions, of the whole Jacobian from one block's output to the last's."""
    blocks = hm.model.transformer.h
    ids = torch.tensor([tokens])
    with torch.no_grad():
        begin = hm.model(ids, output_hidden_states=True).hidden_states[layer + 1]

    def rest(stream: torch.Tensor) -> torch.Tensor:
        for block in blocks[layer + 1 :]:
            out = block(stream)
            stream = out[0] if isinstance(out, tuple) else out
        return stream[0]

    whole = torch.autograd.functional.jacobian(rest, begin)[:, :, 0]  # [pos', d, pos, d]
    valid = range(SKIP, len(tokens) - 1)
    return torch.stack([whole[list(valid), :, t].sum(0) for t in valid]).mean(0)


@pytest.mark.slow
def test_it_is_the_mean_jacobian(tmp_path: Path) -> None:
    hm = opened("gpt2")
    done: list[tuple[int, int]] = []
    found = hm.fit_jacobian_lens(TEXTS, skip=SKIP, rows_at_once=5, progress=lambda *each: done.append(each))
    assert found.layers == tuple(range(hm.map.num_layers - 1)) and found.prompts == 2 and done == [(1, 2), (2, 2)]
    for layer in found.layers:
        expected = torch.stack([by_hand(hm, text, layer) for text in TEXTS]).mean(0)
        torch.testing.assert_close(found.matrices[layer], expected, atol=1e-4, rtol=1e-3)
    assert not any(p.grad is not None for p in hm.model.parameters())
    again = hookmap.load_jacobian_lens(found.save(tmp_path / "lens.safetensors"))
    assert again.prompts == 2 and all(torch.equal(again.matrices[n], found.matrices[n]) for n in found.layers)


def test_a_lens_goes_through_it() -> None:
    hm = opened("gpt2")
    jacobian = hm.fit_jacobian_lens(TEXTS, skip=SKIP)
    read = hm.lens(TEXTS[0], jacobian=jacobian)
    run = hm.capture(TEXTS[0], "resid_post", max_new_tokens=0)
    for place, layer in enumerate(read.layers):
        stream = run.read(0, "resid_post", layer)
        moved = stream @ jacobian.matrices[layer].T if layer in jacobian.matrices else stream
        with torch.no_grad():
            logits = hm.model.lm_head(hm.model.transformer.ln_f(moved))
        assert torch.equal(read.top_ids[place, :, 0], logits.argmax(-1))
    one = JacobianLens({0: torch.eye(hm.map.d_model)}, 1)
    plain, same = hm.lens(TEXTS[0], layers=[0]), hm.lens(TEXTS[0], layers=[0], jacobian=one)
    torch.testing.assert_close(plain.probability, same.probability)


def test_published_files_are_read(tmp_path: Path) -> None:
    """In the format of the authors' package and of neuronpedia/jacobian-lens: float16, by layer, under the key J."""
    drawn = {n: torch.randn(8, 8, generator=torch.Generator().manual_seed(n)).half() for n in range(3)}
    whole = {"J": drawn, "n_prompts": 100, "source_layers": [0, 1, 2], "d_model": 8}
    torch.save(whole, tmp_path / "lens.pt")
    found = hookmap.load_jacobian_lens(tmp_path, "lens.pt")
    assert found.layers == (0, 1, 2) and found.prompts == 100 and torch.equal(found.matrices[1], drawn[1].float())
    torch.save({"jacobian_sum": drawn}, tmp_path / "other.pt")
    with raises(StoreError, "under the key J"):
        hookmap.load_jacobian_lens(tmp_path / "other.pt")


class Runs:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_bad_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.pt").write_bytes(pickle.dumps({"J": Runs()}))
    with raises(StoreError, "evil.pt"):
        hookmap.load_jacobian_lens("evil.pt")
    assert not Path("ran").exists()
    with raises(StoreError, "no file"):
        hookmap.load_jacobian_lens("nowhere.pt")
    Path("cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0")
    with raises(StoreError, "broken"):
        hookmap.load_jacobian_lens("cut.safetensors")
    with raises(SelectionError, "square"):
        JacobianLens({0: torch.zeros(3, 4)}, 1)
    with raises(SelectionError, "nan"):
        JacobianLens({0: torch.full((3, 3), torch.nan)}, 1)
    hm = opened("gpt2")
    other = JacobianLens({0: torch.eye(7)}, 1)
    with raises(SelectionError, "width 7"):
        hm.lens(TEXTS[0], jacobian=other)
    own = JacobianLens({0: torch.eye(hm.map.d_model)}, 1)
    with raises(SelectionError, "resid_pre"):
        hm.lens(TEXTS[0], "resid_pre", jacobian=own)
    with raises(SelectionError, "no layers"):
        hm.lens(TEXTS[0], layers=[1], jacobian=own)
    with raises(SelectionError, "18 tokens"):
        hm.fit_jacobian_lens(TEXTS)
