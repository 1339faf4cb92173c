"""Cross-layer transcoders, held against their definition on weights drawn here, and against plain PyTorch hooks.

Layer L's MLP is reconstructed as b_dec_L + sum over i <= L of features_i @ W_dec_i[:, L - i] (Ameisen et al. 2025).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from support import plain_hooks
from support.opened import RAGGED, opened
from support.raises import raises

import hookmap
from hookmap.analysis.dictionaries.cross_layer import CrossLayer
from hookmap.analysis.dictionaries.evaluating import evaluate
from hookmap.analysis.dictionaries.saving import save_dictionary
from hookmap.cli.main import main
from hookmap.errors import SelectionError, StoreError

D, F, LAYERS = 32, 20, plain_hooks.LAYERS
CONFIG = "model_kind: cross_layer_transcoder\nmodel_name: tiny\nfeature_input_hook: hook_resid_mid\n"


def files(folder: Path, threshold: bool = True, config: str = CONFIG) -> Path:
    """A folder as circuit-tracer writes it."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 4

    for n in range(LAYERS):
        encoder = {f"W_enc_{n}": draw(F, D), f"b_enc_{n}": draw(F), f"b_dec_{n}": draw(D)}
        thresholds = {f"threshold_{n}": draw(F).abs()} if threshold else {}
        save_file(encoder | thresholds, folder / f"W_enc_{n}.safetensors")
        save_file({f"W_dec_{n}": draw(F, LAYERS - n, D)}, folder / f"W_dec_{n}.safetensors")
    if config:
        (folder / "config.yaml").write_text(config)
    return folder


def weights(folder: Path, layer: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    both = load_file(folder / f"W_enc_{layer}.safetensors") | load_file(folder / f"W_dec_{layer}.safetensors")
    return {name.removesuffix(f"_{layer}"): tensor for name, tensor in both.items()}


def features_of(w: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    before = rows @ w["W_enc"].T + w["b_enc"]
    return before * (before > w["threshold"]) if "threshold" in w else before.clamp(min=0)


def loaded(folder: Path, layer: int) -> CrossLayer:
    found = hookmap.load_dictionary(folder, layer=layer)
    assert isinstance(found, CrossLayer)
    return found


@pytest.mark.parametrize("threshold", [True, False])
def test_its_layers_together_are_the_definition(tmp_path: Path, threshold: bool) -> None:
    folder = files(tmp_path / "clt", threshold)
    each = [loaded(folder, n) for n in range(LAYERS)]
    assert [(one.reads, one.writes, one.about.model) for one in each] == [
        (("resid_mid", n), ("mlp_out", n), "tiny") for n in range(LAYERS)
    ]
    rows = torch.randn(LAYERS, 7, D, generator=torch.Generator().manual_seed(4))
    ours = [one.encode(rows[n]) for n, one in enumerate(each)]
    shares = [one.written(ours[n]) for n, one in enumerate(each)]
    by_hand = [weights(folder, n) for n in range(LAYERS)]
    for layer in range(LAYERS):
        expected = by_hand[layer]["b_dec"].expand(7, D)
        for i in range(layer + 1):
            features = features_of(by_hand[i], rows[i])
            torch.testing.assert_close(ours[i], features)
            expected = expected + features @ by_hand[i]["W_dec"][:, layer - i]
        found = each[layer].decoder_bias + sum(shares[i][:, layer - i] for i in range(layer + 1))
        torch.testing.assert_close(found, expected)
    assert loaded(folder, 0).to(dtype=torch.bfloat16).written(ours[0]).dtype == torch.bfloat16


def test_a_changed_feature_is_written_to_every_later_layer(tmp_path: Path) -> None:
    folder, hm = files(tmp_path / "clt"), opened("llama")
    for layer in (0, 1, LAYERS - 1):
        found, w = loaded(folder, layer), weights(folder, layer)
        run = hm.capture(RAGGED, "logits", max_new_tokens=0, interventions=found.clamp({3: 2.0, 5: 0.0}))
        steered = hm.capture(RAGGED, "logits", max_new_tokens=0, interventions=found.steer({3: 1.5}))
        for sample, tokens in enumerate(RAGGED):
            clamped = with_hooks(hm.model, tokens, w, layer, {3: 2.0, 5: 0.0}, False)
            torch.testing.assert_close(run.read(sample, "logits"), clamped, atol=1e-4, rtol=1e-4)
            added = with_hooks(hm.model, tokens, w, layer, {3: 1.5}, True)
            torch.testing.assert_close(steered.read(sample, "logits"), added, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def with_hooks(
    model: Any, tokens: list[int], w: dict[str, torch.Tensor], layer: int, values: dict[int, float], add: bool
) -> torch.Tensor:
    """Logits [n, d_vocab] of a plain forward pass with hooks written by hand."""
    change: list[torch.Tensor] = []

    def read(_: Any, args: Any) -> None:
        features = features_of(w, args[0])
        new = features.clone()
        for number, value in values.items():
            new[..., number] = new[..., number] + value if add else value
        change.append(new - features)

    blocks = model.model.layers
    handles = [blocks[layer].post_attention_layernorm.register_forward_pre_hook(read)]
    for place in range(LAYERS - layer):
        handles.append(
            blocks[layer + place].mlp.register_forward_hook(
                lambda _, args, output, place=place: output + change[0] @ w["W_dec"][:, place]
            )
        )
    try:
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
        return logits
    finally:
        for handle in handles:
            handle.remove()


def test_what_one_layer_alone_cannot_do_is_refused(tmp_path: Path) -> None:
    folder, hm = files(tmp_path / "clt"), opened("llama")
    found = loaded(folder, 1)
    for call in (
        lambda: found.decode(torch.zeros(1, F)),
        lambda: found.splice(),
        lambda: found.ablate([1], error=False),
        lambda: evaluate(hm, RAGGED, found),
    ):
        with raises(SelectionError, "one layer of a cross-layer transcoder reconstructs nothing", ".written(features)"):
            call()
    with raises(SelectionError, "a CrossLayer is more than SAELens's files hold"):
        save_dictionary(found, tmp_path / "saved")
    with raises(SelectionError, "features 99", "0 to 19"):
        found.ablate([99])
    assert not (tmp_path / "saved").exists()


def test_its_features_are_a_point(tmp_path: Path) -> None:
    folder, hm = files(tmp_path / "clt"), opened("llama")
    found = loaded(folder, 1)
    run = hm.capture(RAGGED, ["features", "resid_mid"], 1, max_new_tokens=0, dictionaries=[found])
    for sample in range(len(RAGGED)):
        rows = run.read(sample, "resid_mid", 1)
        features = run.read(sample, "features", 1)
        dense = features.to_dense() if features.is_sparse else features
        torch.testing.assert_close(dense, features_of(weights(folder, 1), rows), atol=1e-5, rtol=1e-5)


def test_wrong_files_and_layers_are_told(tmp_path: Path) -> None:
    folder = files(tmp_path / "clt")
    with raises(SelectionError, "say of which, layer=N"):
        hookmap.load_dictionary(folder)
    with raises(StoreError, "has no W_enc_7.safetensors and no W_dec_7.safetensors"):
        hookmap.load_dictionary(folder, layer=7)
    (folder / "config.yaml").write_text("feature_input_hook: hook_nowhere\n")
    with raises(SelectionError, "hook_nowhere, which is no point here"):
        hookmap.load_dictionary(folder, layer=0)
    (folder / "config.yaml").write_text("[1, 2]\n")
    with raises(StoreError, "config.yaml is broken: expected names and values, found a list"):
        hookmap.load_dictionary(folder, layer=0)
    (folder / "config.yaml").write_text("a: [\n")
    with raises(StoreError, "config.yaml is broken", "is not YAML"):
        hookmap.load_dictionary(folder, layer=0)
    (folder / "config.yaml").unlink()
    assert hookmap.load_dictionary(folder, layer=0).reads == ("resid_mid", 0)
    save_file({"W_dec_0": torch.zeros(F, D)}, folder / "W_dec_0.safetensors")
    with raises(SelectionError, "W_dec_0 is [20, 32], expected [features, layers, width]"):
        hookmap.load_dictionary(folder, layer=0)
    save_file({"W": torch.zeros(2)}, folder / "W_dec_1.safetensors")
    with raises(SelectionError, "the weights lack W_dec_1"):
        hookmap.load_dictionary(folder, layer=1)
    (folder / "W_enc_2.safetensors").write_bytes(b"no")
    with raises(StoreError, "W_enc_2.safetensors is broken"):
        hookmap.load_dictionary(folder, layer=2)


def test_the_command_shows_one_layer(tmp_path: Path) -> None:
    folder = files(tmp_path / "clt")
    done = CliRunner().invoke(main, ["dictionary", "show", str(folder), "--layer", "1", "--json"])
    assert done.exit_code == 0 and '"architecture": "cross_layer_transcoder"' in done.stdout, done.output
    refused = CliRunner().invoke(main, ["dictionary", "show", str(folder)])
    assert refused.exit_code == 1 and "--layer N" in refused.stderr and "Traceback" not in refused.stderr
