"""A config that names another class than the one that would be built: refused, or said."""

from pathlib import Path
from typing import Any

import pytest
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
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
_WHISPER = {**_BART, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_NAMED = {
    "BartForConditionalGeneration": (transformers.BartConfig, _BART, "BartForCausalLM"),
    "WhisperForConditionalGeneration": (transformers.WhisperConfig, _WHISPER, "WhisperForCausalLM"),
    "BertForMaskedLM": (transformers.BertConfig, _BERT, "BertLMHeadModel"),
    "BertForPreTraining": (transformers.BertConfig, _BERT, "BertLMHeadModel"),
}


@pytest.mark.parametrize("name", _NAMED)
def test_one_that_reads_otherwise_is_refused_in_python(name: str) -> None:
    kind, sizes, built = _NAMED[name]
    config = kind(**sizes, architectures=[name])
    for use in (hookmap.discover, verify):
        with pytest.raises(ModelError, match=rf"the config is of {name}, .*hookmap would build {built}"):
            use(config)
    assert hookmap.discover(kind(**sizes)).architecture == built, "a config that names none is as before"
    assert hookmap.discover(kind(**sizes, architectures=[built])).architecture == built


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "BertForMaskedLM"])
def test_a_folder_of_one_is_refused_everywhere(name: str, tmp_path: Path) -> None:
    kind, sizes, built = _NAMED[name]
    getattr(transformers, name)(kind(**sizes)).save_pretrained(tmp_path)
    for use in (hookmap.discover, hookmap.open, hookmap.load_map, verify):
        with pytest.raises(hookmap.HookmapError, match=f"the config is of {name}.*{built}.from_pretrained"):
            use(tmp_path)
    for line in (["discover"], ["show"], ["verify"], ["capture", "--points", "embed", "--prompt", "a", "--model"]):
        if line[-1] == "--model":
            line = ["capture", str(tmp_path), *line[1:-1]]
        else:
            line = [*line, str(tmp_path)]
        done = CliRunner().invoke(main, line)
        assert done.exit_code == 1 and f"the config is of {name}" in done.output + done.stderr, (line, done.output)


def test_the_class_that_is_meant_can_be_given_as_a_module() -> None:
    config = transformers.BertConfig(**_BERT, architectures=["BertForMaskedLM"], is_decoder=True)
    assert hookmap.open(transformers.BertLMHeadModel(config).eval()).map.architecture == "BertLMHeadModel"


def test_a_class_with_the_same_layers_is_read_and_said(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {**_BERT, "num_key_value_heads": 4}
    found = hookmap.discover(transformers.LlamaConfig(**sizes, architectures=["LlamaForSequenceClassification"]))
    assert found.architecture == "LlamaForCausalLM"
    assert caplog.messages == ["the config is of LlamaForSequenceClassification; hookmap reads it as LlamaForCausalLM."]
    caplog.clear()
    hookmap.discover(transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]))
    assert not caplog.messages
