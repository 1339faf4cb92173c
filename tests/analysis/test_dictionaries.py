"""Dictionaries are held against the formulas of the programs that make them, written out here on their own weights."""

import json
import logging
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from support import plain_hooks
from support.opened import RAGGED, opened
from support.raises import raises
from support.tiny_tokenizer import WORDS, tiny_tokenizer
from torch.nn.functional import cross_entropy

import hookmap
from hookmap.analysis.dictionaries.dictionary import About, Dictionary
from hookmap.analysis.dictionaries.evaluating import evaluate
from hookmap.analysis.dictionaries.loading import as_dictionary, load_dictionary
from hookmap.analysis.dictionaries.saving import save_dictionary
from hookmap.cli.main import main
from hookmap.errors import CaptureError, SelectionError, StoreError

D, F = 32, 48
HOOK = {"model_name": "tiny", "hook_name": "blocks.1.hook_resid_post", "prepend_bos": False, "context_size": 16}


def drawn(seed: int = 0, out: int = D) -> dict[str, torch.Tensor]:
    """Weights under SAELens's names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 4

    names = {
        "W_enc": (D, F),
        "W_dec": (F, out),
        "b_enc": (F,),
        "b_dec": (out,),
        "b_gate": (F,),
        "r_mag": (F,),
        "b_mag": (F,),
    }
    return {name: draw(*shape) for name, shape in names.items()} | {"threshold": draw(F).abs(), "W_skip": draw(out, D)}


ROWS = torch.randn(20, D, generator=torch.Generator().manual_seed(9))


def saelens(folder: Path, architecture: str, keep: str, **config: Any) -> Path:
    """A folder as SAELens 6 writes it."""
    folder.mkdir(parents=True)
    weights = {name: value for name, value in drawn().items() if name in keep.split()}
    save_file(weights, folder / "sae_weights.safetensors")
    whole = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "apply_b_dec_to_input": True}
    (folder / "cfg.json").write_text(json.dumps({**whole, "normalize_activations": "none", "metadata": HOOK, **config}))
    return folder


def topk(before: torch.Tensor, k: int) -> torch.Tensor:
    kept = torch.zeros_like(before)
    for row, values in enumerate(before):
        for place in values.argsort(descending=True)[:k]:
            kept[row, place] = max(values[place], 0)
    return kept


PLAIN = "W_enc W_dec b_enc b_dec"


def test_saelens_architectures_are_their_formulas(tmp_path: Path) -> None:
    w = drawn()
    before = (ROWS - w["b_dec"]) @ w["W_enc"]
    gate, size = (
        before + w["b_gate"] > 0,
        torch.relu((ROWS - w["b_dec"]) @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]),
    )
    cases: dict[str, tuple[str, dict[str, Any], torch.Tensor]] = {
        "standard": (PLAIN, {}, torch.relu(before + w["b_enc"])),
        "topk": (PLAIN, {"k": 5}, topk(before + w["b_enc"], 5)),
        "jumprelu": (
            f"{PLAIN} threshold",
            {},
            torch.relu(before + w["b_enc"]) * (before + w["b_enc"] > w["threshold"]),
        ),
        "gated": ("W_enc W_dec b_dec b_gate r_mag b_mag", {}, size * gate),
    }
    for name, (keep, config, expected) in cases.items():
        found = load_dictionary(saelens(tmp_path / name, name, keep, **config))
        torch.testing.assert_close(found.encode(ROWS), expected)
        torch.testing.assert_close(found.decode(expected), expected @ w["W_dec"] + w["b_dec"])
        assert found.reads == ("resid_post", 1) and found.features == F and found.about.model == "tiny"
        again = load_dictionary(save_dictionary(found, tmp_path / f"{name}-again"))
        torch.testing.assert_close(again.reconstruct(ROWS), found.reconstruct(ROWS))
        assert again.reads == found.reads and again.activation == found.activation
        with raises(StoreError, "already holds a dictionary"):
            save_dictionary(found, tmp_path / f"{name}-again")
    found = load_dictionary(saelens(tmp_path / "own", "standard", PLAIN, apply_b_dec_to_input=False))
    torch.testing.assert_close(found.encode(ROWS), torch.relu(ROWS @ w["W_enc"] + w["b_enc"]))


def test_rows_are_normalised_as_saelens_does(tmp_path: Path) -> None:
    w = drawn()

    def features(rows: torch.Tensor) -> torch.Tensor:
        return torch.relu((rows - w["b_dec"]) @ w["W_enc"] + w["b_enc"])

    factor = D**0.5 / ROWS.norm(dim=-1, keepdim=True)
    expected = (features(ROWS * factor) @ w["W_dec"] + w["b_dec"]) / factor
    found = load_dictionary(saelens(tmp_path / "a", "standard", PLAIN, normalize_activations="constant_norm_rescale"))
    torch.testing.assert_close(found.reconstruct(ROWS), expected)
    mean = ROWS.mean(-1, keepdim=True)
    deviation = (ROWS - mean).std(-1, keepdim=True)
    expected = (features((ROWS - mean) / (deviation + 1e-5)) @ w["W_dec"] + w["b_dec"]) * deviation + mean
    found = load_dictionary(saelens(tmp_path / "b", "standard", PLAIN, normalize_activations="layer_norm"))
    torch.testing.assert_close(found.reconstruct(ROWS), expected)
    with raises(SelectionError, "decode(features, rows)"):
        found.decode(found.encode(ROWS))
    with raises(SelectionError, "expected_average_only_in", "fold"):
        load_dictionary(saelens(tmp_path / "c", "standard", PLAIN, normalize_activations="expected_average_only_in"))


def test_transcoders_read_one_point_and_write_another(tmp_path: Path) -> None:
    w, hooks = drawn(), {**HOOK, "hook_name": "blocks.1.hook_resid_mid", "hook_name_out": "blocks.1.hook_mlp_out"}
    expected = torch.relu(ROWS @ w["W_enc"] + w["b_enc"]) @ w["W_dec"] + w["b_dec"]
    plain = load_dictionary(saelens(tmp_path / "t", "transcoder", PLAIN, metadata=hooks, d_out=D))
    torch.testing.assert_close(plain.reconstruct(ROWS), expected)
    assert plain.reads == ("resid_mid", 1) and plain.writes == ("mlp_out", 1) and plain.transcoder
    skips = load_dictionary(saelens(tmp_path / "s", "skip_transcoder", f"{PLAIN} W_skip", metadata=hooks, d_out=D))
    torch.testing.assert_close(skips.reconstruct(ROWS), expected + ROWS @ w["W_skip"].T)
    again = load_dictionary(save_dictionary(skips, tmp_path / "again"))
    torch.testing.assert_close(again.reconstruct(ROWS), skips.reconstruct(ROWS))
    assert again.writes == skips.writes


def learned(folder: Path, kind: str, tensors: dict[str, torch.Tensor], **trainer: Any) -> Path:
    """A folder as dictionary_learning writes it."""
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "ae.pt")
    told = {"dict_class": kind, "lm_name": "tiny", "layer": 1, "submodule_name": "resid_post_layer_1", **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": told, "buffer": {"ctx_len": 128}}))
    return folder


def test_dictionary_learning_classes_are_their_formulas(tmp_path: Path) -> None:
    w = drawn()
    norms, linear = (
        w["W_dec"].norm(dim=1),
        {"encoder.weight": w["W_enc"].T.contiguous(), "decoder.weight": w["W_dec"].T.contiguous()},
    )
    biased = {**linear, "encoder.bias": w["b_enc"]}
    centred, raw = (ROWS - w["b_dec"]) @ w["W_enc"] + w["b_enc"], ROWS @ w["W_enc"] + w["b_enc"]
    before = (ROWS - w["b_dec"]) @ w["W_enc"]
    line = torch.tensor(0.3)
    gated = {
        **linear,
        "decoder_bias": w["b_dec"],
        "r_mag": w["r_mag"],
        "gate_bias": w["b_gate"],
        "mag_bias": w["b_mag"],
    }
    own = {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    size = (before + w["b_gate"] > 0) * torch.relu(w["r_mag"].exp() * before + w["b_mag"])
    cases: dict[str, tuple[dict[str, torch.Tensor], torch.Tensor]] = {
        "AutoEncoder": ({**biased, "bias": w["b_dec"]}, torch.relu(centred)),
        "AutoEncoderNew": ({**biased, "decoder.bias": w["b_dec"]}, torch.relu(raw)),
        "GatedAutoEncoder": (gated, size * norms),
        "AutoEncoderTopK": (
            {**biased, "b_dec": w["b_dec"], "k": torch.tensor(4), "threshold": line},
            topk(torch.relu(centred), 4),
        ),
        "BatchTopKSAE": (
            {**biased, "b_dec": w["b_dec"], "k": torch.tensor(4), "threshold": line},
            torch.relu(centred) * (centred > 0.3),
        ),
        "MatryoshkaBatchTopKSAE": (
            {**own, "threshold": line, "k": torch.tensor(4)},
            torch.relu(centred) * (centred > 0.3),
        ),
        "JumpReluAutoEncoder": ({**own, "threshold": w["threshold"]}, torch.relu(raw * (raw > w["threshold"])) * norms),
    }
    for kind, (tensors, expected) in cases.items():
        found = load_dictionary(learned(tmp_path / kind, kind, tensors))
        torch.testing.assert_close(found.encode(ROWS), expected)
        scale = norms if kind in ("GatedAutoEncoder", "JumpReluAutoEncoder") else torch.ones(F)
        torch.testing.assert_close(found.decode(expected), expected / scale @ w["W_dec"] + w["b_dec"])
        assert found.reads == ("resid_post", 1) and found.about.context == 128
        again = load_dictionary(save_dictionary(found, tmp_path / f"{kind}-again"))
        torch.testing.assert_close(again.reconstruct(ROWS), found.reconstruct(ROWS), atol=1e-5, rtol=1e-5)


def test_gemma_scope_and_plain_files(tmp_path: Path) -> None:
    w = drawn()
    own = {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    before = ROWS @ w["W_enc"] + w["b_enc"]
    (tmp_path / "g").mkdir()
    np.savez(tmp_path / "g" / "params.npz", **{name: each.numpy() for name, each in own.items()})
    found = load_dictionary(tmp_path / "g", point="mlp_out", layer=1)
    torch.testing.assert_close(found.encode(ROWS), torch.relu(before) * (before > w["threshold"]))
    assert found.reads == ("mlp_out", 1)
    with raises(SelectionError, "point=POINT"):
        _ = load_dictionary(tmp_path / "g").reads
    (tmp_path / "p").mkdir()
    save_file(own, tmp_path / "p" / "mine.safetensors")
    config = {"architecture": "jumprelu", "apply_b_dec_to_input": False, "point": "resid_post", "layer": 1}
    (tmp_path / "p" / "config.json").write_text(json.dumps(config))
    plain = load_dictionary(tmp_path / "p")
    torch.testing.assert_close(plain.encode(ROWS), found.encode(ROWS))
    assert plain.reads == ("resid_post", 1)


class Dangerous:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


@pytest.mark.usefixtures("own_folder")
def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path: Path) -> None:
    folder = learned(tmp_path / "d", "AutoEncoder", {})
    (folder / "ae.pt").write_bytes(pickle.dumps({"encoder.weight": Dangerous()}))
    with raises(StoreError, "ae.pt", "safetensors"):
        load_dictionary(folder)
    torch.save({"encoder.weight": Dangerous()}, folder / "ae.pt")
    with raises(StoreError, "ae.pt", "more than tensors"):
        load_dictionary(folder)
    np.savez(tmp_path / "d" / "x.npz", W_enc=np.array([Dangerous()], dtype=object))
    (tmp_path / "g").mkdir()
    (tmp_path / "d" / "x.npz").rename(tmp_path / "g" / "params.npz")
    with raises(StoreError, "params.npz"):
        load_dictionary(tmp_path / "g")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_dictionary_is_refused(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "a", "standard", PLAIN)
    data = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(data[: len(data) // 2])
    with raises(StoreError, "sae_weights.safetensors", "broken"):
        load_dictionary(folder)
    (folder / "cfg.json").write_text("{")
    with raises(StoreError, "cfg.json", "broken"):
        load_dictionary(folder)
    with raises(StoreError, "holds no dictionary", "cfg.json"):
        load_dictionary(tmp_path)
    with raises(StoreError, "is not there"):
        load_dictionary(tmp_path / "none")
    with raises(SelectionError, "'lista'", "jumprelu"):
        load_dictionary(saelens(tmp_path / "b", "lista", PLAIN))
    with raises(SelectionError, "lack b_enc", "W_dec"):
        load_dictionary(saelens(tmp_path / "c", "standard", "W_enc W_dec b_dec"))
    with raises(SelectionError, "'MyDict'"):
        load_dictionary(learned(tmp_path / "e", "MyDict", {}))
    w = drawn()
    with raises(SelectionError, "encoder_bias is [3], expected [48]", "threshold is missing", "infinity"):
        Dictionary(w["W_enc"] * float("nan"), w["W_dec"], torch.zeros(3), w["b_dec"], "jumprelu")
    with raises(SelectionError, "reads rows of 32", "got 16", "another model"):
        made().encode(torch.zeros(2, 16))


def made(point: str = "resid_post", layer: int = 1, **how: Any) -> Dictionary:
    w = drawn()
    about = About(point, layer)
    return Dictionary(w["W_enc"], w["W_dec"], w["b_enc"], w["b_dec"], input_bias=w["b_dec"], about=about, **how)


def hooked(hm: Any, layer: int, write: Any, tokens: list[int]) -> torch.Tensor:
    """Logits [pos, vocab] with a layer's output rewritten by a plain PyTorch hook."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        rows = output[0] if isinstance(output, tuple) else output
        new = write(rows)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = hm.model.model.layers[layer].register_forward_hook(hook)
    with torch.no_grad():
        logits = hm.model(torch.tensor([tokens])).logits[0]
    handle.remove()
    return logits


@pytest.mark.slow
def test_what_is_spliced_in_is_what_a_plain_hook_writes() -> None:
    hm, found = opened("llama"), made()
    for tokens in RAGGED:
        run = hm.capture([tokens], "logits", max_new_tokens=0, interventions=found.splice())
        torch.testing.assert_close(run["logits"][0], hooked(hm, 1, found.reconstruct, tokens), atol=1e-4, rtol=1e-4)

    def clamped(rows: torch.Tensor) -> torch.Tensor:
        features = found.encode(rows)
        new = features.clone()
        new[..., 3], new[..., 5] = 2.0, 0.0
        return rows + (new - features) @ found.decoder

    run = hm.capture([RAGGED[0]], "logits", max_new_tokens=0, interventions=found.clamp({3: 2.0, 5: 0.0}))
    torch.testing.assert_close(run["logits"][0], hooked(hm, 1, clamped, RAGGED[0]), atol=1e-4, rtol=1e-4)
    steered = hm.capture([RAGGED[0]], "logits", max_new_tokens=0, interventions=found.steer({3: 2.0}))
    expected = hooked(hm, 1, lambda rows: rows + 2 * found.direction(3), RAGGED[0])
    torch.testing.assert_close(steered["logits"][0], expected, atol=1e-4, rtol=1e-4)
    kept = hm.capture([RAGGED[0]], "logits", max_new_tokens=0, interventions=found.edit(lambda features: features))
    torch.testing.assert_close(kept["logits"][0], hooked(hm, 1, lambda rows: rows, RAGGED[0]), atol=1e-4, rtol=1e-4)
    with raises(SelectionError, "features 99", "0 to 47"):
        found.ablate([99])


def test_a_transcoder_writes_what_it_read_before() -> None:
    hm, w = opened("llama"), drawn()
    about = About("mlp_in", 1, "mlp_out", 1)
    found = Dictionary(w["W_enc"], w["W_dec"], w["b_enc"], w["b_dec"], about=about)
    run = hm.capture(RAGGED, ["mlp_in", "mlp_out"], 1, 0, interventions=found.splice())
    for sample in run.samples:
        rows = run.read(sample.sample, "mlp_in", 1)
        torch.testing.assert_close(run.read(sample.sample, "mlp_out", 1), found.reconstruct(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("skip", "trained"), [(0, 1), (1, 1), (None, 2)])
def test_an_evaluation_is_saebenchs_formulas(skip: int | None, trained: int) -> None:
    """The first tokens of each text are kept as they are, on request, or where they were left out of the training."""
    hm, found = opened("llama"), made()
    found = replace(found, about=replace(found.about, skip=trained))
    own = evaluate(hm, RAGGED, found, skip=skip)
    first = trained if skip is None else skip
    rows = torch.cat([each[first:] for each in hm.capture(RAGGED, "resid_post", 1, 0)["resid_post", 1]])
    assert own.skip == first
    features, wrote = found.encode(rows), found.reconstruct(rows)
    assert own.tokens == len(rows)
    assert own.l0 == pytest.approx(float((features != 0).float().sum(1).mean()))
    assert own.l1 == pytest.approx(float(features.abs().sum(1).mean()), rel=1e-5)
    assert own.mse == pytest.approx(float(((rows - wrote) ** 2).mean()), rel=1e-5)
    total = ((rows - rows.mean(0)) ** 2).sum()
    assert own.explained_variance == pytest.approx(float(1 - ((rows - wrote) ** 2).sum() / total), rel=1e-4)
    assert own.cossim == pytest.approx(float(torch.cosine_similarity(rows, wrote).mean()), rel=1e-5)
    assert own.l2_ratio == pytest.approx(float((wrote.norm(dim=1) / rows.norm(dim=1)).mean()), rel=1e-5)
    assert own.frac_alive == pytest.approx(float((features != 0).any(0).float().mean()))

    def loss(write: Any) -> float:
        each = [cross_entropy(hooked(hm, 1, write, t)[:-1], torch.tensor(t[1:]), reduction="none") for t in RAGGED]
        return float(torch.cat([losses[first:] for losses in each]).mean())

    def splice(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows[..., :first, :], found.reconstruct(rows[..., first:, :])], dim=-2)

    clean, spliced, ablated = loss(lambda r: r), loss(splice), loss(torch.zeros_like)
    assert own.ce_loss_without_sae == pytest.approx(clean, rel=1e-4)
    assert own.ce_loss_with_sae == pytest.approx(spliced, rel=1e-4)
    assert own.ce_loss_with_ablation == pytest.approx(ablated, rel=1e-4)
    assert own.ce_loss_score == pytest.approx((ablated - spliced) / (ablated - clean), rel=1e-3)
    with raises(SelectionError, "reads rows of 32", "got"):
        evaluate(hm, RAGGED, made("mlp_post"))
    with raises(SelectionError, "a text of 102 tokens"):
        evaluate(hm, RAGGED, found, skip=100)
    with raises(CaptureError, "skip", "-1"):
        evaluate(hm, RAGGED, found, skip=-1)


def test_another_model_and_another_beginning_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hm = hookmap.open(plain_hooks.build("llama"), tokenizer=tiny_tokenizer())
    hm.name = "org/model-7b"
    folder = saelens(tmp_path / "a", "standard", PLAIN, metadata={**HOOK, "prepend_bos": True, "model_name": "other"})
    with caplog.at_level(logging.WARNING, "hookmap"):
        evaluate(hm, RAGGED, load_dictionary(folder))
    assert "trained on other" in caplog.text and "prepend_bos" in caplog.text


def test_anything_with_encode_and_decode_is_a_dictionary() -> None:
    class Theirs(torch.nn.Module):
        d_in = D

        def encode(self, rows: torch.Tensor) -> torch.Tensor:
            return made().encode(rows)

        def decode(self, features: torch.Tensor) -> torch.Tensor:
            return made().decode(features)

    found = as_dictionary(Theirs(), "resid_post", 1)
    torch.testing.assert_close(found.reconstruct(ROWS), made().reconstruct(ROWS))
    torch.testing.assert_close(found.direction(4), drawn()["W_dec"][4], atol=1e-5, rtol=1e-5)
    hm = opened("llama")
    one, other = (hm.capture(RAGGED[:1], "logits", max_new_tokens=0, interventions=d.splice()) for d in (found, made()))
    torch.testing.assert_close(one["logits"], other["logits"])
    with raises(SelectionError, "encode and decode", "int"):
        as_dictionary(3)


def test_its_features_have_examples_and_statistics() -> None:
    hm, found = opened("llama"), made()
    examples = hm.examples(RAGGED, dictionary=found, k=2, skip=0)
    features = torch.cat([found.encode(rows) for rows in hm.capture(RAGGED, "resid_post", 1, 0)["resid_post", 1]])
    for feature in range(0, F, 5):
        above = features[:, feature][features[:, feature] > 0].sort(descending=True).values[:2]
        top = [each.value for each in examples.of(("resid_post", 1), feature).top]
        np.testing.assert_allclose(top, above.numpy(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_the_command(tmp_path: Path) -> None:
    plain_hooks.build("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    saelens(tmp_path / "d", "topk", PLAIN, k=4)
    run = ["dictionary", "evaluate", "d", str(tmp_path / "m"), "--prompt", " ".join(WORDS[:8])]
    shown = CliRunner().invoke(main, run)
    assert shown.exit_code == 0, shown.output
    assert "explained variance" in shown.stderr
    printed = CliRunner().invoke(main, [*run, "--json"])
    document = json.loads(printed.stdout)
    assert document["l0"] == 4.0 and document["tokens"] == 8
    told = CliRunner().invoke(main, ["dictionary", "show", "d"])
    assert told.exit_code == 0 and "resid_post.1" in told.stderr
    missing = CliRunner().invoke(main, ["dictionary", "evaluate", "none", str(tmp_path / "m"), "--prompt", "to be"])
    assert missing.exit_code == 1 and "none" in missing.stderr and "Traceback" not in missing.output
    assert CliRunner().invoke(main, ["dictionary", "evaluate", "d"]).exit_code == 2
