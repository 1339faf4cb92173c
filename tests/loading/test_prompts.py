"""What is given as prompts, against transformers' own templates and tokens: each is read whole, once, or refused."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support import plain_hooks
from support.raises import raises
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import hookmap
from hookmap.cli.main import main
from hookmap.datasets.records import PromptRecord
from hookmap.demo import MODEL_PATH
from hookmap.loading.prompts import encode
from hookmap.model import HookedModel

CHAT = [{"role": "user", "content": "two plus two"}]
ANSWERED = [*CHAT, {"role": "assistant", "content": "is four"}]
LONGER = [{"role": "system", "content": "plus"}, *ANSWERED]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}is{% endif %}"
    "{% endif %}"
)
PARTS_ONLY = "{% for m in messages %}<user>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }} {% endif %}{% endfor %}<end>{% endfor %}"  # noqa: E501


def tokenizer(template: str = TEMPLATE) -> Any:
    """Begins each text with <bos>, as Llama's and Gemma's do, and has a template that writes it too."""
    names = "<unk> <bos> <user> <assistant> <system> <end> two plus is four to be or not".split()
    core = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens([name for name in names if name.startswith("<")])
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<end>", unk_token="<unk>")
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def hm() -> HookedModel:
    return hookmap.open(plain_hooks.build("llama"), tokenizer=tokenizer())


def by_transformers(messages: Any, **how: Any) -> tuple[int, ...]:
    return tuple(tokenizer().apply_chat_template(messages, tokenize=True, return_dict=False, **how))


def fed(hm: HookedModel, prompt: Any, new: int, **how: Any) -> tuple[int, ...]:
    """The prompt's tokens as a run was fed them."""
    (sample,) = hm.capture(prompt, "resid_post", 1, max_new_tokens=new, **how).samples
    return sample.token_ids[: sample.prompt_tokens]


# Special tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [CHAT, ANSWERED, LONGER])
def test_what_a_template_wrote_is_begun_once_also_as_text(hm: HookedModel, messages: Any) -> None:
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = by_transformers(messages, add_generation_prompt=True)
    assert expected[:2] == (1, 4 if messages is LONGER else 2), "one that begins it, and no second"
    for new in (0, 2):
        assert fed(hm, text, new) == expected
        assert fed(hm, messages, new, add_generation_prompt=True) == expected
    assert fed(hm, text + "is", 0) == (*expected, 8), "the recipe: a template's text and words behind it"


def test_a_text_that_brings_no_beginning_gets_the_tokenizers(hm: HookedModel) -> None:
    assert fed(hm, "two plus", 0) == (1, 6, 7) == tuple(tokenizer()("two plus")["input_ids"])
    assert fed(hm, "two <bos> plus", 0) == (1, 6, 1, 7), "in the middle it begins nothing"
    assert fed(hm, [1, 1, 6], 0) == (1, 1, 6), "token ids are read as they are"


# The end of a conversation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "new", "how", "expected"),
    [
        (CHAT, 0, {}, {"add_generation_prompt": True}),
        (CHAT, 2, {}, {"add_generation_prompt": True}),
        (CHAT, 2, {"add_generation_prompt": False}, {}),
        (CHAT, 2, {"continue_final_message": True}, {"continue_final_message": True}),
        (ANSWERED, 0, {}, {}),
        (ANSWERED, 2, {}, {"continue_final_message": True}),
        (ANSWERED, 0, {"add_generation_prompt": True}, {"add_generation_prompt": True}),
        (ANSWERED, 2, {"add_generation_prompt": True}, {"add_generation_prompt": True}),
        (ANSWERED, 2, {"continue_final_message": False}, {"add_generation_prompt": True}),
        (ANSWERED, 2, {"add_generation_prompt": False}, {}),
        (ANSWERED, 0, {"continue_final_message": True}, {"continue_final_message": True}),
        (LONGER, 0, {}, {}),
        (LONGER, 2, {}, {"continue_final_message": True}),
    ],
)
def test_behind_the_last_message_is_what_transformers_writes(
    hm: HookedModel, messages: Any, new: int, how: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert fed(hm, messages, new, **how) == by_transformers(messages, **expected)
    told = hm.estimate(messages, "embed", max_new_tokens=new, **how)
    assert told.rows == len(by_transformers(messages, **expected)) + max(0, new - 1)


def test_the_last_token_of_an_answer_is_where_a_vector_is_made(hm: HookedModel) -> None:
    """Held against a plain hook at the position that transformers' own template gives."""
    other = [*CHAT, {"role": "assistant", "content": "is not"}]
    rows: list[torch.Tensor] = []
    handle = hm.model.model.layers[1].register_forward_hook(lambda *a: rows.append(_tensor(a[2])[0, -1].clone()))
    for messages in (ANSWERED, other):
        with torch.no_grad():
            hm.model(torch.tensor([by_transformers(messages, continue_final_message=True)]))
    handle.remove()
    vector = hm.steering_vector([ANSWERED], [other], layers=1, continue_final_message=True)
    torch.testing.assert_close(vector[1], rows[0] - rows[1], rtol=1e-4, atol=1e-4)


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def test_lens_attribution_sweep_and_source_read_a_conversation_as_a_capture_does(hm: HookedModel) -> None:
    how: dict[str, Any] = {"continue_final_message": True}
    ids = by_transformers(ANSWERED, continue_final_message=True)
    other = [{"role": "user", "content": "two plus be"}, ANSWERED[1]]
    for read, by_ids in (
        (hm.lens(ANSWERED, **how).positions, tuple(range(len(ids)))),
        (hm.attribute(ANSWERED, **how).positions, (len(ids) - 1,)),
        (hm.sweep(ANSWERED, other, 7, 9, **how).grid.positions, tuple(range(len(ids)))),
    ):
        assert read == by_ids
    patch = {"do": "patch", "point": "resid_pre", "layers": 0, "source": {"prompt": ANSWERED}}
    for new, more in ((0, how), (3, {})):
        run, plain = (
            hm.capture(p, "resid_pre", 0, max_new_tokens=new, interventions=edits, **more)
            for p, edits in ((other, [patch]), (ANSWERED, ()))
        )
        torch.testing.assert_close(run.read(0, "resid_pre", 0)[: len(ids)], plain.read(0, "resid_pre", 0)[: len(ids)])


# What a template is told ----------------------------------------------------------------------------------------------


def test_a_template_is_told_what_it_reads_and_nothing_else(hm: HookedModel) -> None:
    off = {"enable_thinking": False}
    expected = by_transformers(CHAT, add_generation_prompt=True, enable_thinking=False)
    assert (
        fed(hm, CHAT, 2, chat_template_kwargs=off)
        == expected
        == (*by_transformers(CHAT, add_generation_prompt=True), 8)
    )
    assert fed(hm, "two plus two", 2, chat=True, chat_template_kwargs=off) == expected
    for wrong, told in (
        ({"enable_thinkin": False}, "reads no enable_thinkin"),
        ({"tokenize": True}, "tokenize cannot be given"),
        ({"tools": []}, "reads no tools"),
    ):
        with pytest.raises(hookmap.TokenizerError, match=told):
            fed(hm, CHAT, 2, chat_template_kwargs=wrong)
    with raises(hookmap.TokenizerError, "Give one of them"):
        fed(hm, CHAT, 2, add_generation_prompt=True, continue_final_message=True)
    with raises(hookmap.TokenizerError, "'auto'", "'yes'"):
        fed(hm, CHAT, 2, chat="yes")


@pytest.mark.parametrize(
    "how",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"add_generation_prompt": False},
        {"continue_final_message": True, "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_what_only_a_template_reads_is_refused_where_none_is_filled(hm: HookedModel, how: dict[str, Any]) -> None:
    for prompts in ("two plus two", ["two", "plus"], [[4, 5]], PromptRecord("two", "a", {})):
        with raises(hookmap.TokenizerError, *how, "chat=True", "leave"):
            hm.capture(prompts, "embed", max_new_tokens=0, **how)
    with raises(hookmap.TokenizerError, *how, "Token ids are read as they are"):
        hm.encode([4, 5], chat=True, **how)
    with raises(hookmap.TokenizerError, *how, "random tokens"):
        hm.head_scores(**how)
    assert len(hm.encode(["two", CHAT], **how)) == 2
    read = hm.encode("two")
    assert hm.encode(read, **how) == read


# Parts of a message ---------------------------------------------------------------------------------------------------


def part(kind: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": kind, **more}, {"type": "text", "text": "two"}]}


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (part("image"), "prompt 0, message 0 has an image, and LlamaForCausalLM reads text only"),
        (part("image_url", image_url={"url": "x"}), "an image"),
        (part("video", video="x.mp4"), "a video"),
        (part("input_audio", input_audio={}), "audio"),
        (part("file"), "a file"),
        (part("text"), "a part of type 'text'|a part of text"),
        (part("thinking", thinking="x"), "a part of thinking"),
        ({"role": "user", "content": [{"image": "x.png"}]}, "an image"),
        ({"role": "user", "content": {"type": "image"}}, "an image"),
        ({"role": "user", "content": "two", "images": ["x.png"]}, "an image"),
        ({"role": "user", "content": [3]}, "a part that is a int"),
        ({"role": "user", "text": "two"}, r"message 0 has no content: .* got \['role', 'text'\]"),
    ],
)
def test_what_is_no_text_is_refused_by_name(hm: HookedModel, message: dict[str, Any], told: str) -> None:
    for call in (
        lambda: hm.capture([message], "embed", max_new_tokens=1),
        lambda: hm.estimate([message], "embed"),
        lambda: hm.steering_vector([[message]], [[message]], layers=1),
        lambda: hm.capture(CHAT, "embed", max_new_tokens=0, interventions=[
            {"do": "patch", "point": "resid_pre", "source": {"prompt": [message]}}]),
    ):  # fmt: skip
        with pytest.raises(hookmap.HookmapError, match=told):
            call()


@pytest.mark.parametrize("template", [TEMPLATE, PARTS_ONLY])
def test_texts_reach_a_template_that_takes_strings_and_one_that_takes_parts(template: str) -> None:
    tok = tokenizer(template)
    listed = [{"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "plus"}]}]
    plain = [{"role": "user", "content": "two plus"}]
    for messages in (listed, plain):
        (prompt,) = encode([messages], tok)
        assert {6, 7} <= set(prompt.token_ids) and 0 not in prompt.token_ids, prompt.text


# Tables and what is no prompt -----------------------------------------------------------------------------------------


def tables() -> list[Any]:
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    columns = {"asked": ["two", "plus two"], "id": [7, 8], "score": [1.5, None]}
    return [pandas.DataFrame(columns), pyarrow.table(columns), pyarrow.RecordBatch.from_pydict(columns)]


def test_a_table_is_read_by_the_column_that_is_named(hm: HookedModel) -> None:
    for table in tables():
        run = hm.capture(table, "embed", max_new_tokens=0, prompt_column="asked")
        assert [(s.prompt, s.id) for s in run.samples] == [("two", "7"), ("plus two", "8")]
        loaded = hookmap.load_prompts(table, prompt="asked", labels=["score"])
        assert [record.labels for record in loaded] == [{"score": 1.5}, {"score": None}]
        assert hm.estimate(table, "embed", max_new_tokens=0, prompt_column="asked").samples == 2
        for call in (lambda t=table: hm.capture(t, "embed"), lambda t=table: hookmap.load_prompts(t)):
            with raises(hookmap.DataError, "columns asked, id, score", "prompt"):
                call()
        with raises(hookmap.DataError, "no column 'question'"):
            hm.capture(table, "embed", prompt_column="question")


def test_a_column_is_a_list_of_prompts_and_what_is_none_is_refused(hm: HookedModel) -> None:
    frame, table, _ = tables()
    for column in (frame["asked"], table["asked"], frame["asked"].to_numpy()):
        assert [s.prompt for s in hm.capture(column, "embed", max_new_tokens=0).samples] == ["two", "plus two"]
    rows = [{"asked": "two"}, {"asked": "plus"}]
    twice = frame[["asked", "asked"]]
    for wrong in ({"two", "plus"}, io.StringIO("two\nplus\n"), rows, iter(rows), {"asked": "two"}, b"two", 3):
        with raises(hookmap.TokenizerError, "expected a string", "hookmap.load_prompts"):
            hm.capture(wrong, "embed", max_new_tokens=0)
    with raises(hookmap.DataError, "'asked' more than once"):
        hm.capture(twice, "embed", prompt_column="asked")


@pytest.mark.parametrize("pairs", ["two plus", CHAT, ANSWERED, [6, 7, 8], []])
def test_one_prompt_is_no_list_of_contrast_pairs(hm: HookedModel, pairs: Any) -> None:
    with pytest.raises(hookmap.SelectionError, match=r"two lists of prompts of one length: got (one prompt|0) and"):
        hm.steering_vector(pairs, pairs, layers=1)


def test_a_name_that_is_no_argument_is_said_with_what_is_near(hm: HookedModel) -> None:
    for new in (0, 2):
        with raises(hookmap.CaptureError, "'layer'", "did you mean layers"):
            hm.capture(CHAT, "embed", max_new_tokens=new, layer=3)
    with raises(hookmap.CaptureError, "'position'", "did you mean positions"):
        hm.steering_vector([CHAT], [ANSWERED], layers=1, position=3)
    with raises(hookmap.CaptureError, "max_new_tokens=0 generates nothing: leave out top_k"):
        hm.capture(CHAT, "embed", max_new_tokens=0, top_k=3)
    with raises(hookmap.CaptureError, "capture: expected what it keeps"):
        hm.generate(CHAT, (), "resid_post")


# The command line -----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize("tokens", ["0", "1"])
@pytest.mark.slow
def test_texts_are_read_as_they_are_and_messages_through_the_template_by_every_command(
    own_folder: None, tokens: str
) -> None:
    file = Path("p.jsonl")
    file.write_text(json.dumps("1+2=") + "\n" + json.dumps([{"role": "user", "content": "1+2="}]) + "\n")
    demo = hookmap.open(MODEL_PATH, device="cpu")
    text, chat = demo.encode("1+2="), demo.encode([{"role": "user", "content": "1+2="}])
    expected = {(): [*text, *chat], ("--chat",): [*chat, *chat]}
    for typed, prompts in expected.items():
        done = run("capture", "--points", "embed", "--prompts", str(file), "--max-new-tokens", tokens, *typed,
                   "-o", f"r{len(typed)}")  # fmt: skip
        assert done.exit_code == 0, done.output
        store = hookmap.open_store(f"r{len(typed)}")
        assert [s.token_ids[: s.prompt_tokens] for s in store.samples] == [p.token_ids for p in prompts]
        assert ("--chat sends each as a user's message" in done.stderr) == (tokens != "0" and not typed)


@pytest.mark.slow
def test_commands_about_one_prompt_follow_the_same_rule(own_folder: None) -> None:
    demo = hookmap.open(MODEL_PATH, device="cpu")
    for command, places in (("lens", "positions"), ("attribute", "positions")):
        more = ["--positions", "all", "--layers", "3"] if command == "lens" else []
        for typed, prompt in (([], "1+2="), (["--chat"], [{"role": "user", "content": "1+2="}])):
            done = run(command, "--prompt", "1+2=", *typed, *more, "--json")
            assert done.exit_code == 0, done.output
            assert json.loads(done.stdout)[places][-1] == len(demo.encode(prompt)[0].token_ids) - 1, (command, typed)
    steered = run("steer", "--intervene", _scale(), "--prompt", "1+2=", "--max-new-tokens", "2", "--json")
    (found,) = json.loads(steered.stdout)
    assert found["without"] == demo.generate("1+2=", max_new_tokens=2).texts[0]


def _scale() -> str:
    Path("edits.yaml").write_text("- {do: scale, point: mlp_out, layers: 3, factor: 1}\n")
    return "edits.yaml"


@pytest.mark.slow
def test_how_a_template_is_filled_can_be_typed_and_stand_in_the_file(own_folder: None) -> None:
    chat = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]
    Path("p.jsonl").write_text(json.dumps(chat) + "\n")
    demo = hookmap.open(MODEL_PATH, device="cpu")
    asked = ("capture", "--points", "embed", "--prompts", "p.jsonl", "--max-new-tokens", "0")
    for number, (typed, file, how) in enumerate((
        ((), "", {}),
        (("--continue-final-message",), "", {"continue_final_message": True}),
        ((), "continue_final_message: true\n", {"continue_final_message": True}),
        (("--no-continue-final-message", "--add-generation-prompt"), "continue_final_message: true\n",
         {"add_generation_prompt": True}),
    )):  # fmt: skip
        Path("hookmap.yaml").write_text(file)
        done = run(*asked, *typed, "-o", f"r{number}")
        assert done.exit_code == 0, done.output
        assert hookmap.open_store(f"r{number}").tokens == [demo.encode(chat, **how)[0].token_ids]
    for typed, file, told in (
        (("--chat-template-kwargs", "{}x"), "", "write a JSON object"),
        (("--chat-template-kwargs", '{"enable_thinking": false}'), "", "reads no enable_thinking"),
        ((), "chat_template_kwargs: {enable_thinking: false}\n", "reads no enable_thinking"),
        ((), "chat_template_kwargs: 3\n", "expected keys and values"),
    ):
        Path("hookmap.yaml").write_text(file)
        done = run(*asked, *typed, "-o", "none")
        assert done.exit_code in (1, 2) and told in done.stderr and not Path("none").exists(), done.output


@pytest.mark.slow
def test_a_picture_in_a_file_of_messages_is_refused(own_folder: None) -> None:
    Path("p.jsonl").write_text(json.dumps([part("image", image="x.png")]) + "\n")
    done = run("capture", "--points", "embed", "--prompts", "p.jsonl", "-o", "none")
    assert done.exit_code == 1 and "prompt 0, message 0 has an image" in done.stderr and not Path("none").exists()
