"""What is sent of a row, piece by piece, is its whole text before the stop string, however tokens cut it."""

import functools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

pytest.importorskip("fastapi")

from hookmap.demo import MODEL_PATH
from hookmap.loading.stopping import Ending
from hookmap.services.server.text import Cutter, Decoder, RowText

SPECIAL = "<|end|>"
CORPUS = ["the cat sat on the mat, and that was that. ", "größer naïve 日本語のテキスト 👩‍👩‍👧 ", "\n\nUser: stop"] * 20
TEXTS = st.text(st.one_of(st.sampled_from("ab the.\nUser: é日👩‍�"), st.characters(codec="utf-8")), max_size=40)


@functools.cache
def tokenizer(kind: str) -> Any:
    """`bytes`: one token for each byte; `byte-level`: merges as GPT-2's and Qwen's; `metaspace`: as Llama 2's."""
    if kind == "bytes":
        return AutoTokenizer.from_pretrained(MODEL_PATH)
    core, alphabet = Tokenizer(models.BPE(unk_token=SPECIAL)), pre_tokenizers.ByteLevel.alphabet()
    core.pre_tokenizer = pre_tokenizers.Metaspace() if kind == "metaspace" else pre_tokenizers.ByteLevel(False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[SPECIAL],
        initial_alphabet=[] if kind == "metaspace" else alphabet,
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    core.decoder = decoders.ByteLevel()
    if kind == "metaspace":  # what has no token of its own is written in bytes
        learned = json.loads(core.to_str())["model"]
        vocabulary = learned["vocab"] | {f"<0x{byte:02X}>": 1000 + byte for byte in range(256)}
        merges = [tuple(merge) for merge in learned["merges"]]
        core.model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token=SPECIAL)
        fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        core.decoder = decoders.Sequence(fallback)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIAL)


def pieces(text: RowText | Decoder, tokens: list[int]) -> list[str]:
    return [*(text.add(token) for token in tokens), text.end()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "byte-level", "metaspace"])
def test_the_pieces_of_any_text_are_the_text(kind: str) -> None:
    tok = tokenizer(kind)

    @given(TEXTS)
    def holds(text: str) -> None:
        tokens = tok(text, add_special_tokens=False)["input_ids"]
        assert "".join(pieces(Decoder(tok), tokens)) == tok.decode(tokens, skip_special_tokens=True)

    holds()


@pytest.mark.parametrize("kind", ["bytes", "byte-level"])
def test_the_pieces_of_any_tokens_are_their_text_half_characters_and_special_tokens_too(kind: str) -> None:
    """Not so of Llama 2's: there a half character changes how the whole ones before it are decoded."""
    tok = tokenizer(kind)

    @given(st.lists(st.integers(0, len(tok) - 1), max_size=30))
    def holds(tokens: list[int]) -> None:
        found = pieces(Decoder(tok), tokens)
        assert "".join(found) == tok.decode(tokens, skip_special_tokens=True)
        assert not any(piece.endswith("�") for piece in found[:-1]), "what is sent does not change any more"

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "byte-level", "metaspace"])
def test_text_ends_before_the_stop_string_wherever_tokens_cut_it(kind: str) -> None:
    tok = tokenizer(kind)

    @given(TEXTS, st.text(min_size=1, max_size=6), TEXTS)
    def holds(before: str, stop: str, after: str) -> None:
        tokens = tok(before + stop + after, add_special_tokens=False)["input_ids"]
        whole = tok.decode(tokens, skip_special_tokens=True)
        row = RowText(tok, [stop])
        assert "".join(pieces(row, tokens)) == whole.split(stop)[0]
        assert row.stopped == (stop in whole)
        assert RowText(tok, [stop]).whole(tokens) == whole.split(stop)[0]

    holds()


@given(st.lists(st.text("abc", max_size=4), max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4))
def test_of_several_stop_strings_the_first_that_is_complete_ends_the_text(parts: list[str], stops: list[str]) -> None:
    cutter = Cutter(stops)
    sent = "".join([*(cutter.add(part) for part in parts), cutter.end()])
    known = ""
    for part in parts:
        known += part
        if places := [known.find(stop) for stop in stops if stop in known]:
            assert sent == known[: min(places)] and cutter.stopped
            return
    assert sent == known and not cutter.stopped


@given(st.text("abc", max_size=12), st.text("abc", min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stop: str) -> None:
    cutter = Cutter([stop])
    sent = cutter.add(text)
    held = text[len(sent) :]
    assert cutter.stopped or (stop.startswith(held) and held != stop)


@pytest.mark.parametrize("kind", ["bytes", "byte-level", "metaspace"])
def test_a_row_ends_with_the_token_that_completes_a_stop_string(kind: str) -> None:
    """The model stops where the text stops: neither a token later nor earlier."""
    tok = tokenizer(kind)

    @given(TEXTS, st.text(st.sampled_from("ab the.\nUser: é日"), min_size=1, max_size=6), TEXTS)
    def holds(before: str, stop: str, after: str) -> None:
        tokens = tok(before + stop + after, add_special_tokens=False)["input_ids"]
        ending, row = Ending(GenerationConfig(), [stop], tok), RowText(tok, [stop])
        for count, token in enumerate(tokens, 1):
            row.add(token)
            if ending.at(tokens[:count][-ending.reach :]):
                row.end()
                assert row.stopped
                return
            assert not row.stopped
        assert stop not in tok.decode(tokens, skip_special_tokens=True)

    holds()
