"""Encoder-decoders: the decoder's rows, held against plain hooks around a plain `generate`; prompts of both sides."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support import plain_hooks
from support.encoders import DECODERS, ENCODERS, LAYERS, build, by_hand, prompt_inputs
from support.raises import raises
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.analysis.grid import load_grid
from hookmap.cli.main import main
from hookmap.errors import CaptureError, InterventionError, ModelError, SelectionError, TokenizerError

_TEXTS: list[Any] = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19]]
_NEW = 5


def _prompts(name: str) -> list[Any]:
    if not DECODERS[name].features:
        return _TEXTS
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(1, *DECODERS[name].features, generator=draw) for _ in range(3)]


def _given(name: str, prompt: Any) -> Any:
    return {"input_features": prompt} if DECODERS[name].features else prompt


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
@pytest.mark.parametrize("name", DECODERS)
def test_rows_of_the_decoder_are_those_of_a_plain_generate(name: str, engine: Any) -> None:
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
        run = hm.capture(_given(name, prompt), points=list(reading.places), max_new_tokens=_NEW, engine=engine)
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "marian", "whisper"])
def test_the_lens_of_the_last_layer_is_the_model_itself(name: str) -> None:
    model = build(DECODERS[name])
    if name == "marian":
        model.final_logits_bias.normal_()
    hm = hookmap.open(model)
    found = hm.lens(_given(name, _prompts(name)[0]))
    assert found.layers == (0, 1) and float(found.kl[-1].abs().max()) < 1e-5 < float(found.kl[0].min())


@pytest.mark.slow
def test_a_patch_takes_the_rows_of_a_decoder_that_began_with_something() -> None:
    hm = hookmap.open(build(DECODERS["t5"]), tokenizer=tiny_tokenizer())
    clean, other = ({"prompt": text, "decoder_text": "two and"} for text in ("one", "three four"))
    edit = {"do": "patch", "point": "resid_pre", "layers": 1, "source": {"prompt": clean}}
    run = hm.capture(other, "resid_pre", 1, max_new_tokens=0, interventions=[edit])
    own = hm.capture(clean, "resid_pre", 1, max_new_tokens=0)
    assert run.samples[0].rows == 3 and torch.equal(run.read(0, "resid_pre", 1), own.read(0, "resid_pre", 1))
    with raises(InterventionError, "source has"):
        hm.capture(clean, "resid_pre", 1, max_new_tokens=0, interventions=[{**edit, "positions": [0, 1], "source": {
            "prompt": clean, "positions": [0, 1, 2]}}])  # fmt: skip


_LAST_NORM = {
    "t5": "decoder.final_layer_norm", "pegasus": "model.decoder.layer_norm", "whisper": "model.decoder.layer_norm",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", _LAST_NORM)
def test_an_attribution_is_what_each_branch_gives_through_the_last_norm(name: str) -> None:
    """By hand: the norm's statistic is held, and the unembedding is a product. Cross-attention is a part of its own."""
    reading, model = DECODERS[name], build(DECODERS[name])
    hm = hookmap.open(model)
    prompt, begun = _prompts(name)[0], [7, 9]
    asked = {"input_features": prompt} if reading.features else {"prompt": prompt}
    found = hm.attribute({**asked, "decoder_token_ids": begun}, positions="all")
    inputs = {**prompt_inputs(reading, prompt), "decoder_input_ids": torch.tensor([[2, *begun]])}
    made, rows = by_hand(model, reading, lambda: model(**inputs))
    logits, norm = made.logits[0], model.get_submodule(_LAST_NORM[name])
    names = {"mixer_out": "attn_out", "cross_attn_out": "cross_attn_out", "mlp_out": "mlp_out"}
    expected = {"resid_pre[0]": rows["resid_pre", 0]}
    expected |= {f"{part}[{i}]": rows[point, i] for i in range(LAYERS) for part, point in names.items()}
    end = rows["resid_post", LAYERS - 1]
    if name == "t5":
        scale = (end.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
        scale = scale * (model.config.d_model**-0.5 if model.config.tie_word_embeddings else 1.0)
    else:
        scale = (end.var(-1, keepdim=True, unbiased=False) + norm.eps).rsqrt()
        expected = {part: each - each.mean(-1, keepdim=True) for part, each in expected.items()}
    told = model.get_output_embeddings().weight[logits.argmax(-1)]
    assert set(found.parts) - set(expected) <= {"bias", "rounding"} and set(expected) < set(found.parts)
    for part, each in expected.items():
        by_part = (each * scale * norm.weight * told).sum(-1)
        torch.testing.assert_close(found.values[found.parts.index(part)], by_part, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.values.sum(0), logits.max(-1).values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bart", "marian"])
def test_an_attribution_of_a_stream_that_is_normed_itself_is_refused(name: str) -> None:
    with pytest.raises(SelectionError, match=f"{DECODERS[name].kind}: the blocks norm the stream itself"):
        hookmap.open(build(DECODERS[name])).attribute([5, 6, 7])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "csv", "columns", "dataset"])
def test_files_of_prompts_have_a_column_of_what_the_decoder_begins_with(form: str, tmp_path: Path) -> None:
    hm = hookmap.open(build(DECODERS["t5"]), tokenizer=tiny_tokenizer())
    rows = [
        {"id": "a", "prompt": "one two", "decoder_text": "two and"},
        {"id": "b", "prompt": "three", "decoder_text": None},
    ]
    own: dict[str, Any] = {}
    source: Any = tmp_path / f"prompts.{form}"
    if form == "jsonl":
        rows.append({"id": "c", "prompt": "one", "decoder_token_ids": [7, 9]})
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "csv":
        source.write_text("id,prompt,decoder_text\na,one two,two and\nb,three,\n")
    elif form == "columns":
        own, source = {"decoder": "begins"}, [{**row, "begins": row["decoder_text"], "decoder_text": 3} for row in rows]
    else:
        source = pytest.importorskip("datasets").Dataset.from_list(rows)
    run = hm.capture(hookmap.load_prompts(source, **own), "resid_post", max_new_tokens=0)
    said = hm.tokenizer("two and", add_special_tokens=False)["input_ids"]
    assert run.tokens == [(2, *said), (2,), (2, 7, 9)][: len(run.tokens)]
    assert [sample.id for sample in run.samples] == ["a", "b", "c"][: len(run.tokens)]
    in_python = hm.capture({"prompt": "one two", "decoder_text": "two and"}, "resid_post", max_new_tokens=0)
    torch.testing.assert_close(run.read(0, "resid_post", 1), in_python.read(0, "resid_post", 1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_decoders_column_is_no_label_and_is_refused_by_name_where_it_is_wrong(tmp_path: Path) -> None:
    rows = [{"prompt": "one", "decoder_text": "two", "of": 3}]
    (record,) = hookmap.load_prompts(rows, labels="all")
    assert record.labels == {"of": 3} and record.prompt == {"prompt": "one", "decoder_text": "two"}
    (kept,) = hookmap.load_prompts(rows, labels=["decoder_text"])
    assert kept.prompt == "one" and kept.labels == {"decoder_text": "two"}
    wrong = [
        {"prompt": "one", "decoder_text": [3]},
        {"prompt": "one", "decoder_token_ids": "3"},
        {"prompt": "one", "decoder_text": "a", "decoder_token_ids": [3]},
    ]
    with pytest.raises(hookmap.DataError) as refused:
        hookmap.load_prompts(wrong)
    for number, told in enumerate(
        ("decoder_text: expected a text", "decoder_token_ids: expected a list of token", "expected one of decoder_text")
    ):
        assert f"record {number}: {told}" in str(refused.value)
    with raises(hookmap.DataError, "no column 'begins'"):
        hookmap.load_prompts(rows, decoder="begins")
    plain = hookmap.open(plain_hooks.build("llama"), tokenizer=tiny_tokenizer())
    with raises(TokenizerError, "prompt 0 has decoder_text, which is what the decoder of an encoder-dec"):
        plain.capture(hookmap.load_prompts(rows), "resid_post", max_new_tokens=0)
    with pytest.raises(TokenizerError, match=r"^2 prompts cannot be read:\n  - prompt 0: .*\n  - prompt 2 has "):
        hm = hookmap.open(build(DECODERS["t5"]), tokenizer=tiny_tokenizer())
        hm.encode([{"prompt": 3}, {"prompt": "one"}, {"decoder_text": "two"}])


@pytest.mark.slow
def test_commands_read_the_decoders_column_and_an_answer_as_what_the_decoder_begins_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build(DECODERS["t5"]).save_pretrained("t5")
    tiny_tokenizer().save_pretrained("t5")
    hm = hookmap.open("t5", device="cpu")

    def ran(*arguments: str) -> Any:
        done = CliRunner().invoke(main, [*arguments, "--device", "cpu"])
        assert done.exit_code == 0, done.output
        return done

    Path("prompts.jsonl").write_text('{"prompt": "to be", "begins": "or not"}\n')
    columns = ("--prompts", "prompts.jsonl", "--decoder-column", "begins")
    ran("capture", "t5", *columns, "--points", "resid_post", "--max-new-tokens", "0", "-o", "run")
    prompt = {"prompt": "to be", "decoder_text": "or not"}
    expected = hm.capture(prompt, "resid_post", max_new_tokens=0)
    assert torch.equal(hookmap.open_store("run").read(0, "resid_post", 1), expected.read(0, "resid_post", 1))
    shown = json.loads(ran("lens", "t5", "--prompt", "to be", "--answer", "or not", "--json").stdout)
    assert shown["tokens"] == list(hm.lens(prompt).tokens)
    (clean, corrupted), answer = ("to be", "that is"), "or not"
    both = ("--clean", clean, "--corrupted", corrupted, "--answer", answer, "--point", "cross_attn_out")
    ran("patch", "t5", *both, "--sweep", "--target", "be", "--against", "not", "-o", "sweep")
    swept = hm.sweep(
        *({"prompt": text, "decoder_text": answer} for text in (clean, corrupted)), "be", "not",
        point="cross_attn_out", positions="prompt",
    )  # fmt: skip
    assert torch.allclose(load_grid("sweep.safetensors").values, swept.effect.values, atol=1e-4)


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
