"""A config that names its class: that one is built, mapped and opened."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

import hookmap
from hookmap.cli.main import main
from hookmap.errors import ModelError
from hookmap.verification.verify import verify

_SMALL: dict[str, Any] = {"vocab_size": 97, "max_position_embeddings": 64}
_BERT = {**_SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_BART = {
    **_SMALL, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0,
}  # fmt: skip
_T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_WHISPER = {
    **_BART,
    "max_source_positions": 30,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_NAMED = {
    "BartForConditionalGeneration": (transformers.BartConfig, _BART, "BartForCausalLM"),
    "BartModel": (transformers.BartConfig, _BART, "BartForCausalLM"),
    "WhisperForConditionalGeneration": (transformers.WhisperConfig, _WHISPER, "WhisperForCausalLM"),
    "BertForMaskedLM": (transformers.BertConfig, _BERT, "BertLMHeadModel"),
    "BertForPreTraining": (transformers.BertConfig, _BERT, "BertLMHeadModel"),
    "BertForSequenceClassification": (transformers.BertConfig, _BERT, "BertLMHeadModel"),
    "BertForTokenClassification": (transformers.BertConfig, _BERT, "BertLMHeadModel"),
    "T5ForConditionalGeneration": (transformers.T5Config, _T5, None),
    "LlamaForSequenceClassification": (transformers.LlamaConfig, {**_BERT, "pad_token_id": 0}, "LlamaForCausalLM"),
    "LlamaModel": (transformers.LlamaConfig, _BERT, "LlamaForCausalLM"),
}


@pytest.mark.parametrize("name", _NAMED)
@pytest.mark.slow
def test_the_class_that_the_config_names_is_the_one_that_is_mapped(name: str) -> None:
    kind, sizes, causal = _NAMED[name]
    config = kind(**sizes, architectures=[name])
    assert hookmap.discover(config).architecture == name
    assert verify(config).passed
    if causal is not None:
        assert hookmap.discover(kind(**sizes)).architecture == causal, "a config that names none is of a causal one"
        assert hookmap.discover(kind(**sizes, architectures=[causal])).architecture == causal


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "BertForMaskedLM", "LlamaForSequenceClassification"])
@pytest.mark.slow
def test_a_folder_is_opened_as_the_class_that_it_names(name: str, tmp_path: Path) -> None:
    kind, sizes, _ = _NAMED[name]
    made = getattr(transformers, name)(kind(**sizes))
    made.save_pretrained(tmp_path)
    opened = hookmap.open(tmp_path)
    assert type(opened.root).__name__ == opened.map.architecture == name
    weights = dict(made.state_dict())
    assert all(torch.equal(tensor, weights[key]) for key, tensor in opened.root.state_dict().items())
    for command in ("discover", "show", "verify"):
        done = CliRunner().invoke(main, [command, str(tmp_path)])
        assert done.exit_code == 0 and name in done.output + done.stderr, (command, done.output)


@pytest.mark.parametrize("kind", [transformers.T5Config, transformers.DistilBertConfig])
def test_a_config_of_no_causal_model_is_of_what_there_is(kind: Any) -> None:
    found = hookmap.discover(
        kind(**(_T5 if kind is transformers.T5Config else {"vocab_size": 97, "dim": 32, "n_heads": 4}))
    )
    assert found.architecture in ("T5ForConditionalGeneration", "DistilBertForMaskedLM")


def test_what_reads_no_token_ids_is_said_to_be_no_language_model() -> None:
    with pytest.raises(ModelError, match=r"Wav2Vec2Config .wav2vec2. is no language model"):
        hookmap.discover(transformers.Wav2Vec2Config(hidden_size=32))


def test_the_class_that_is_meant_can_be_given_as_a_module() -> None:
    config = transformers.BertConfig(**_BERT, architectures=["BertForMaskedLM"], is_decoder=True)
    assert hookmap.open(transformers.BertLMHeadModel(config).eval()).map.architecture == "BertLMHeadModel"


def test_a_class_that_transformers_does_not_have_is_read_as_the_causal_one_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = {**_BERT, "num_key_value_heads": 4}
    found = hookmap.discover(transformers.LlamaConfig(**sizes, architectures=["LlamaForRanking"]))
    assert found.architecture == "LlamaForCausalLM"
    assert caplog.messages == ["the config is of LlamaForRanking; hookmap reads it as LlamaForCausalLM."]
    caplog.clear()
    hookmap.discover(transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]))
    assert not caplog.messages
