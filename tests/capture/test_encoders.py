"""Encoders alone: masked language models and classifiers, whose texts are harvested and which generate nothing."""

import pytest
import torch
from click.testing import CliRunner
from support.encoders import ENCODERS, LAYERS, build, by_hand
from support.raises import raises

import hookmap
from hookmap.cli.main import main
from hookmap.errors import CaptureError, SelectionError

_TEXTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [12, 13, 14], [15, 16, 17, 18, 19]]


@pytest.mark.parametrize("name", ENCODERS)
def test_rows_are_those_of_a_plain_forward_pass(name: str) -> None:
    reading, model = ENCODERS[name], build(ENCODERS[name])
    hm = hookmap.open(model)
    assert hm.map.architecture == reading.kind
    for text in _TEXTS:
        output, expected = by_hand(model, reading, lambda: model(input_ids=torch.tensor([text])))  # noqa: B023
        run = hm.capture([text], points=[*reading.places, *({"logits"} - {*reading.unavailable})], max_new_tokens=0)
        for (point, layer), rows in expected.items():
            found = run.read(0, point, None if point == "final_norm" else layer)
            assert torch.equal(found, rows), (point, layer)
        if "logits" not in reading.unavailable:
            assert torch.equal(run.read(0, "logits"), output.logits[0])


@pytest.mark.parametrize("name", ENCODERS)
def test_texts_of_different_lengths_share_a_batch_though_every_token_sees_both_sides(name: str) -> None:
    model = build(ENCODERS[name])
    hm = hookmap.open(model)
    assert hm.pads.why_not(harvest=True) is None
    prepared = hm.prepare(_TEXTS, "resid_post", max_new_tokens=0)
    assert prepared.groups == ((1, 2, 0),)
    run = prepared.capture(None, resume=False)
    for number, text in enumerate(_TEXTS):
        _, expected = by_hand(model, ENCODERS[name], lambda: model(input_ids=torch.tensor([text])))  # noqa: B023
        for layer in range(LAYERS):
            torch.testing.assert_close(
                run.read(number, "resid_post", layer), expected["resid_post", layer], rtol=1e-4, atol=1e-5
            )


def test_a_model_that_reads_its_pads_gets_none() -> None:
    """A masked language model that drops its mask: its rows would be those of the pads, too."""
    model = build(ENCODERS["bert"])
    inner = model.bert.forward

    def forward(*args: object, attention_mask: object = None, **kwargs: object) -> object:
        return inner(*args, **kwargs)

    model.bert.forward = forward
    prepared = hookmap.open(model).prepare(_TEXTS, "resid_post", max_new_tokens=0)
    assert sorted(prepared.groups) == [(0,), (1,), (2,)] and "pads change its rows" in str(prepared.apart)


@pytest.mark.parametrize("name", ENCODERS)
def test_generating_is_refused_with_the_reason(name: str) -> None:
    hm = hookmap.open(build(ENCODERS[name]))
    with pytest.raises(CaptureError, match=rf"{ENCODERS[name].kind} generates no text: .*max_new_tokens=0"):
        hm.capture(_TEXTS, "resid_post")


def test_what_a_classifier_says_of_a_text_is_no_row_of_a_token() -> None:
    hm = hookmap.open(build(ENCODERS["classifier"]))
    assert hm.map.unavailable("logits") == ENCODERS["classifier"].unavailable["logits"] and hm.map.d_vocab is None
    with raises(SelectionError, "no logits for each position"):
        hm.capture(_TEXTS, "logits", max_new_tokens=0)


def test_an_edit_of_an_encoder_is_seen_in_its_rows() -> None:
    model = build(ENCODERS["bert"])
    handle = model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda module, args, output: output * 0)
    _, expected = by_hand(model, ENCODERS["bert"], lambda: model(input_ids=torch.tensor([_TEXTS[1]])))
    handle.remove()
    edit = {"do": "ablate", "point": "mlp_out", "layers": [0]}
    run = hookmap.open(model).capture([_TEXTS[1]], "resid_post", max_new_tokens=0, interventions=[edit])
    for layer in range(LAYERS):
        torch.testing.assert_close(run.read(0, "resid_post", layer), expected["resid_post", layer])


@pytest.mark.slow
def test_the_command_line_harvests_a_masked_language_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    from support.tiny_tokenizer import tiny_tokenizer

    folder = tmp_path_factory.mktemp("bert")
    build(ENCODERS["bert"]).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    given = [str(folder / "model"), "--points", "resid_post", "--prompt", "two and two", "-o", str(folder / "run")]
    refused = CliRunner().invoke(main, ["capture", *given])
    assert refused.exit_code == 1 and "BertForMaskedLM generates no text" in refused.stderr
    done = CliRunner().invoke(main, ["capture", *given, "--max-new-tokens", "0"])
    assert done.exit_code == 0, done.stderr
    assert hookmap.open_store(folder / "run").keys == (("resid_post", 0), ("resid_post", 1))
