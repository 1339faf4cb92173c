"""Encoder-decoders: the decoder's rows, held against plain hooks around a plain `generate`; prompts of both sides."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.encoders import DECODERS, ENCODERS, LAYERS, build, by_hand, prompt_inputs
from support.raises import raises
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.errors import CaptureError, ModelError, TokenizerError

_TEXTS: list[Any] = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19]]
_NEW = 5


def _prompts(name: str) -> list[Any]:
    if not DECODERS[name].features:
        return _TEXTS
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(1, *DECODERS[name].features, generator=draw) for _ in range(3)]


def _given(name: str, prompt: Any) -> Any:
    return {"input_features": prompt} if DECODERS[name].features else prompt


@pytest.mark.parametrize("name", DECODERS)
def test_rows_of_the_decoder_are_those_of_a_plain_generate(name: str) -> None:
    reading, model = DECODERS[name], build(DECODERS[name])
    hm = hookmap.open(model)
    assert hm.map.architecture == reading.kind and hm.map.num_layers == LAYERS
    for prompt in _prompts(name):
        inputs = prompt_inputs(reading, prompt)
        sequences, expected = by_hand(
            model,
            reading,
            lambda: model.generate(**inputs, max_new_tokens=_NEW, do_sample=False),  # noqa: B023
        )
        run = hm.capture(_given(name, prompt), points=list(reading.places), max_new_tokens=_NEW)
        (sample,) = run.samples
        assert list(sample.token_ids) == [2, *sequences[0].tolist()][-_NEW - 1 :]
        assert (sample.prompt_tokens, sample.rows) == (1, _NEW)
        assert sample.encoder_token_ids == (None if reading.features else tuple(prompt))
        for (point, layer), rows in expected.items():
            found = run.read(0, point, None if point == "final_norm" else layer)
            assert torch.equal(found, rows), (point, layer)


@pytest.mark.parametrize("name", DECODERS)
def test_the_branches_sum_to_the_stream_and_a_harvest_gives_the_first_rows(name: str) -> None:
    hm = hookmap.open(build(DECODERS[name]))
    prompt = _given(name, _prompts(name)[0])
    run = hm.capture(prompt, max_new_tokens=4)
    harvest = hm.capture(prompt, max_new_tokens=0)
    assert [sample.rows for sample in harvest.samples] == [1]
    for key in harvest.keys:
        torch.testing.assert_close(harvest.read(0, *key), run.read(0, *key)[:1], rtol=1e-5, atol=1e-5)
    if not any("norm(" in relation for relation in hm.map.kinds[0].relations):
        for layer in range(LAYERS):
            pre, attn, cross, mlp, post = (
                run.read(0, point, layer)
                for point in ("resid_pre", "attn_out", "cross_attn_out", "mlp_out", "resid_post")
            )
            torch.testing.assert_close(pre + attn + cross + mlp, post, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_prompts_of_different_lengths_share_a_batch_where_pads_change_nothing(name: str) -> None:
    hm = hookmap.open(build(DECODERS[name]))
    assert hm.why_no_pads is None
    prepared = hm.prepare(_TEXTS, "resid_post", max_new_tokens=_NEW)
    assert prepared.groups == ((0, 1, 2),)
    together = prepared.capture(None, resume=False)
    for number, prompt in enumerate(_TEXTS):
        alone = hm.capture([prompt], "resid_post", max_new_tokens=_NEW)
        assert alone.tokens[0] == together.tokens[number]
        for layer in range(LAYERS):
            torch.testing.assert_close(
                together.read(number, "resid_post", layer), alone.read(0, "resid_post", layer), rtol=1e-4, atol=1e-5
            )


def test_sounds_of_one_size_share_a_batch() -> None:
    model = build(DECODERS["whisper"])
    hm = hookmap.open(model)
    features = torch.cat(_prompts("whisper"))
    prepared = hm.prepare({"input_features": features}, "cross_attn_out", max_new_tokens=_NEW)
    assert prepared.groups == ((0, 1, 2),)
    run = prepared.capture(None, resume=False)
    _, expected = by_hand(
        model, DECODERS["whisper"], lambda: model.generate(input_features=features[:1], max_new_tokens=_NEW)
    )
    torch.testing.assert_close(run.read(0, "cross_attn_out", 1), expected["cross_attn_out", 1], rtol=1e-4, atol=1e-5)


def test_the_decoder_may_be_given_its_first_tokens() -> None:
    model = build(DECODERS["t5"])
    hm = hookmap.open(model, tokenizer=tiny_tokenizer())
    given = [{"prompt": "two and two", "decoder_token_ids": [7, 8]}, {"prompt": "one", "decoder_token_ids": [2, 9]}]
    run = hm.capture(given, "resid_post", max_new_tokens=0)
    assert run.tokens == [(2, 7, 8), (2, 9)]
    ids = torch.tensor([run.samples[0].encoder_token_ids])
    _, expected = by_hand(
        model, DECODERS["t5"], lambda: model(input_ids=ids, decoder_input_ids=torch.tensor([[2, 7, 8]]))
    )
    assert torch.equal(run.read(0, "resid_post", 1), expected["resid_post", 1])
    generated = hm.capture(given, "resid_post", max_new_tokens=3)
    assert [sample.prompt_tokens for sample in generated.samples] == [3, 2]
    own = model.generate(input_ids=ids, decoder_input_ids=torch.tensor([[2, 7, 8]]), max_new_tokens=3)
    assert list(generated.tokens[0]) == own[0].tolist()

    said = hm.tokenizer("two", add_special_tokens=False)["input_ids"]
    (sample,) = hm.capture({"prompt": "one", "decoder_text": "two"}, "resid_post", max_new_tokens=0).samples
    assert list(sample.token_ids) == [2, *said] and sample.prompt == "one"


def test_what_is_no_prompt_of_an_encoder_decoder_is_refused_with_what_is_expected() -> None:
    hm = hookmap.open(build(DECODERS["whisper"]), tokenizer=tiny_tokenizer())
    with raises(TokenizerError, "encoder of WhisperForConditionalGeneration reads no text but input_feat"):
        hm.capture("a text", "resid_post", max_new_tokens=1)
    with raises(TokenizerError, "reads input_features"):
        hm.capture({"input_values": torch.zeros(1, 9)}, "resid_post", max_new_tokens=1)
    model = build(DECODERS["t5"])
    hm = hookmap.open(model, tokenizer=tiny_tokenizer())
    with raises(TokenizerError, "'decoder_text' or 'decoder_token_ids' or neither"):
        hm.capture({"prompt": "a", "decoder_text": "b", "decoder_token_ids": [3]}, "resid_post", max_new_tokens=1)
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = None
    model.generation_config.bos_token_id = model.config.bos_token_id = None
    with raises(ModelError, "decoder_start_token_id"):
        hm.capture("a", "resid_post", max_new_tokens=1)


def test_a_folder_holds_what_both_sides_read_and_resumes(tmp_path: Path) -> None:
    hm = hookmap.open(build(DECODERS["bart"]), tokenizer=tiny_tokenizer())
    run = hm.capture(["one two", "three"], "cross_attn_out", max_new_tokens=3, store=tmp_path / "run")
    store = hookmap.open_store(tmp_path / "run")
    for sample, prompt in zip(store.samples, ["one two", "three"], strict=True):
        assert sample.prompt == prompt
        assert list(sample.encoder_token_ids or ()) == hm.tokenizer(prompt)["input_ids"]
        assert sample.token_ids[0] == 2 and sample.rows == 3
    assert torch.equal(store.read(1, "cross_attn_out", 0), run.read(1, "cross_attn_out", 0))
    hm.capture(["one two", "three"], "cross_attn_out", max_new_tokens=3, store=tmp_path / "run", resume=True)
    with raises(hookmap.HookmapError, "prompts"):
        hm.capture(["one two", "four"], "cross_attn_out", max_new_tokens=3, store=tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_interventions_write_to_the_decoder(name: str) -> None:
    reading, model = DECODERS[name], build(DECODERS[name])
    hm = hookmap.open(model)
    prompt = _prompts(name)[0]
    path, _, index = reading.places["cross_attn_out"]
    module = model.get_submodule(path.replace("{i}", "0"))

    def without(_: Any, args: Any, output: Any) -> Any:
        return tuple(part * 0 if place == index else part for place, part in enumerate(output))

    handle = module.register_forward_hook(without)
    inputs = prompt_inputs(reading, prompt)
    _, expected = by_hand(model, reading, lambda: model.generate(**inputs, max_new_tokens=4, do_sample=False))
    handle.remove()
    edit = {"do": "ablate", "point": "cross_attn_out", "layers": [0]}
    run = hm.capture(_given(name, prompt), "resid_post", max_new_tokens=4, interventions=[edit])
    for layer in range(LAYERS):
        torch.testing.assert_close(run.read(0, "resid_post", layer), expected["resid_post", layer])
    plain = hm.capture(_given(name, prompt), "resid_post", max_new_tokens=4)
    assert not torch.equal(plain.read(0, "resid_post", 1), run.read(0, "resid_post", 1))


@pytest.mark.parametrize("name", ["t5", "marian", "whisper"])
def test_the_lens_of_the_last_layer_is_the_model_itself(name: str) -> None:
    model = build(DECODERS[name])
    if name == "marian":
        model.final_logits_bias.normal_()
    hm = hookmap.open(model)
    found = hm.lens(_given(name, _prompts(name)[0]))
    assert found.layers == (0, 1) and float(found.kl[-1].abs().max()) < 1e-5 < float(found.kl[0].min())


def test_beams_are_refused_with_what_to_give() -> None:
    model = build(DECODERS["marian"])
    model.generation_config.num_beams = 4
    with raises(CaptureError, "Give num_beams=1"):
        hookmap.open(model).capture([[5, 6]], "resid_post", max_new_tokens=2)


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_a_server_says_that_it_serves_no_such_model(name: str, tmp_path: Path) -> None:
    from hookmap.services.server.models import Models
    from hookmap.services.server.settings import Settings

    reading = {**DECODERS, **ENCODERS}[name]
    models = Models(Settings(root=tmp_path))
    with pytest.raises(ModelError, match=f"{reading.kind} .*the server's answers do"):
        models.add(name, hookmap.open(build(reading), tokenizer=tiny_tokenizer()))
    assert not models.all
