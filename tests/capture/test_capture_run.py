"""What a capture does around the numbers: text, stores, interruptions, threads, refusals; and what it leaves behind."""

import gc
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plain_hooks
from support.plain_hooks import FAMILIES
from support.raises import raises
from support.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

import hookmap
from hookmap.capture.options import Progress
from hookmap.loading.sampling import own_seed
from hookmap.model import HookedModel

PROMPTS = ["to be or not", "be", "that is the question to be"]


@pytest.fixture(scope="module")
def hm() -> HookedModel:
    return hookmap.open(plain_hooks.build("qwen3"), tokenizer=tiny_tokenizer())


def test_texts_are_the_generated_part_without_special_tokens(hm: HookedModel) -> None:
    run = hm.capture(PROMPTS, ["resid_mid"], [1], max_new_tokens=6)
    for sample, prompt in zip(run.samples, PROMPTS, strict=True):
        new = sample.token_ids[sample.prompt_tokens :]
        assert sample.prompt == prompt
        assert list(sample.token_ids[: sample.prompt_tokens]) == hm.tokenizer(prompt)["input_ids"]
        assert sample.text == hm.tokenizer.decode(new, skip_special_tokens=True)
        assert sample.rows == len(sample.token_ids) - 1
    assert run.texts == [sample.text for sample in run.samples]


def test_chat_messages_go_through_the_template(hm: HookedModel) -> None:
    messages = [{"role": "user", "content": "to be"}]
    by_messages = hm.capture([messages], ["resid_mid"], [1], max_new_tokens=2)
    assert by_messages.samples[0].prompt == "<user> to be <assistant>"
    assert hm.capture(messages, ["resid_mid"], [1], max_new_tokens=2).tokens == by_messages.tokens
    assert hm.capture("to be", ["resid_mid"], [1], max_new_tokens=2, chat=True).tokens == by_messages.tokens
    assert hm.capture("to be", ["resid_mid"], [1], max_new_tokens=2).samples[0].prompt == "to be"
    with raises(hookmap.TokenizerError, "chat='auto'"):
        hm.capture([messages], ["resid_mid"], [1], chat=False)


def test_a_stop_string_ends_a_row_and_its_rows(hm: HookedModel) -> None:
    free = hm.capture(PROMPTS, ["resid_mid"], [1], max_new_tokens=8)
    word = hm.tokenizer.decode(free.tokens[0][-5:-4])
    run = hm.capture(PROMPTS, ["resid_mid"], [1], max_new_tokens=8, stop=word)
    assert len(run.tokens[0]) == len(free.tokens[0]) - 4
    for number, sample in enumerate(run.samples):
        assert sample.token_ids == free.tokens[number][: len(sample.token_ids)]
        assert torch.equal(run.read(number, "resid_mid", 1), free.read(number, "resid_mid", 1)[: sample.rows])


def test_nothing_is_left_on_the_model(hm: HookedModel) -> None:
    """Hooks, settings, tokenizer, training flags and generators' states are as before; plain generate still agrees."""
    model, tokenizer = hm.model, hm.tokenizer
    model.train()
    model.model.layers[1].eval()
    flags = [part.training for part in model.modules()]
    before = (model.generation_config.to_json_string(), tokenizer.padding_side, tokenizer.pad_token, len(tokenizer))
    state, python = torch.get_rng_state(), random.getstate()
    try:
        run = hm.capture(PROMPTS[0], ["resid_mid"], [1], max_new_tokens=5, do_sample=True, seed=1)
        assert flags == [part.training for part in model.modules()]
    finally:
        model.eval()
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()
    assert before == (
        model.generation_config.to_json_string(), tokenizer.padding_side, tokenizer.pad_token, len(tokenizer)
    )  # fmt: skip
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    torch.manual_seed(1)
    ids = torch.tensor([run.tokens[0][: run.samples[0].prompt_tokens]])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=True, pad_token_id=0)
    assert tuple(plain[0].tolist()) == run.tokens[0]


def test_a_given_seed_repeats_and_none_draws_on(hm: HookedModel) -> None:
    def tokens(seed: int | None) -> Any:
        return hm.capture(PROMPTS[:1], ["resid_mid"], [1], max_new_tokens=12, do_sample=True, seed=seed).tokens

    assert tokens(5) == tokens(5)
    assert tokens(5) != tokens(6)
    torch.manual_seed(0)
    assert tokens(None) != tokens(None)  # equal by chance: below 1 in 10^6


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_what_a_sample_draws_does_not_depend_on_the_batch(engine: Any) -> None:
    """Tokens of 12 draws of temperature 1.7; with a generator of the batch, most were others at each size."""
    hm = hookmap.open(plain_hooks.build("llama"))
    prompts = [[5, 17, 3, 60], [11, 2], [48, 7, 7, 90, 1, 2], [5, 17, 3, 60], [9], [3, 3, 3], [5, 17, 3, 60]]
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.7, "engine": engine}

    def drawn(seed: int, size: int) -> list[tuple[int, ...]]:
        run = hm.capture(prompts, ["resid_mid"], [1], seed=seed, batch_size=size, **settings)
        return [sample.token_ids[sample.prompt_tokens :] for sample in run.samples]

    alone = drawn(0, 1)
    assert len({alone[0], alone[3], alone[6]}) == 3  # one prompt, three samples
    for size in (2, 3, 7):
        assert drawn(0, size) == alone
    assert not set(drawn(1, 1)) & set(alone)  # a seed beside is no shift


def test_seeds_of_samples_are_apart() -> None:
    """Of 200 runs with 500 samples each no two samples share one; as seed plus number, they were 699."""
    seeds = {own_seed(seed, number) for seed in range(200) for number in range(500)}
    assert len(seeds) == 200 * 500 and all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert own_seed(7, 0) == 7


def test_names_of_the_callers_frame_do_not_mix_with_the_trace(hm: HookedModel) -> None:
    tracer = cache = sequences = tree = generate = "mine"
    observer, inputs, root = [1], {"a": 2}, None
    hm.capture("to be", ["resid_mid"], [1], max_new_tokens=2)
    assert (tracer, cache, sequences, tree, generate) == ("mine",) * 5
    assert (observer, inputs, root) == ([1], {"a": 2}, None)


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
@pytest.mark.parametrize("step", [2, 6])
@pytest.mark.parametrize("inner", [[7], [7, 8], [7, 8, 9, 10, 11, 12]])
def test_a_progress_callback_may_run_the_model(engine: Any, step: int, inner: list[int]) -> None:
    """After the last token such a pass once was taken for a row of the capture around it."""
    hm = hookmap.open(plain_hooks.build("llama"))
    prompt = [[5, 17, 3, 60]]
    alone = [hm.capture(p, ["resid_pre"], [1], max_new_tokens=new) for p, new in ((prompt, 6), ([inner], 0))]
    inside: list[Any] = []

    def show(progress: Progress) -> None:
        if progress.tokens_done == step:
            hm.model(torch.tensor([inner]))
            if engine == "hooks":
                inside.append(hm.capture([inner], ["resid_pre"], [1], max_new_tokens=0))

    run = hm.capture(prompt, ["resid_pre"], [1], max_new_tokens=6, engine=engine, progress=show)
    for got, expected in zip([run, *inside], alone, strict=False):
        assert torch.equal(got["resid_pre", 1], expected["resid_pre", 1])


@pytest.mark.slow
def test_threads_on_the_same_weights_do_not_mix() -> None:
    """Two wrappers over one module, four threads: without a lock nnsight mixes them in silence."""
    model = plain_hooks.build("gpt2")
    opened = [hookmap.open(model), hookmap.open(model)]
    prompts = [[[n + 1, n + 2, n + 3]] for n in range(8)]
    alone = [opened[0].capture(p, ["resid_mid"], [1], max_new_tokens=4) for p in prompts]
    runs: dict[int, Any] = {}

    def work(first: int) -> None:
        for number in range(first, len(prompts), 4):
            runs[number] = opened[number % 2].capture(prompts[number], ["resid_mid"], [1], max_new_tokens=4)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        assert runs[number].tokens == expected.tokens
        assert torch.equal(runs[number]["resid_mid", 1], expected["resid_mid", 1])


def test_a_run_that_ends_while_another_passes_its_hooks_does_not_disturb_it() -> None:
    """PyTorch calls a list of hooks made before some were taken off, and then without the kwargs that they had."""
    model = plain_hooks.build("gpt2")
    hm = hookmap.open(model)
    run = {"prompts": [[1, 2, 3]], "points": ["resid_pre"], "layers": [0], "max_new_tokens": 3}
    expected = hm.capture(**run)
    running, leave = threading.Event(), threading.Event()

    def wait(progress: Progress) -> None:
        if progress.tokens_done == 1:
            running.set()
            leave.wait(240)

    other = threading.Thread(target=lambda: hm.capture(**run, progress=wait))

    def hold(module: Any, args: Any) -> None:
        """Of the caller's own, first in the list: the other run ends while it holds this one."""
        if threading.current_thread() is threading.main_thread():
            leave.set()
            other.join(60)

    handle = model.register_forward_pre_hook(hold)
    other.start()
    assert running.wait(240)
    found = hm.capture(**run)
    handle.remove()
    assert torch.equal(found["resid_pre", 0], expected["resid_pre", 0])


@pytest.mark.slow
def test_threads_share_no_seed_and_no_training_flag() -> None:
    """torch's generators and a module's training flags are every thread's: with these, most runs come out wrong."""
    models = [plain_hooks.build("gpt2").train(), plain_hooks.build("llama")]
    opened = [hookmap.open(model) for model in models]

    def run(number: int) -> Any:
        sampling = {"do_sample": True, "seed": number} if number % 4 else {}
        return opened[number % 2].capture([[1, 2, 3]], ["resid_mid"], [1], max_new_tokens=12, **sampling)

    alone = [run(number) for number in range(8)]
    runs: dict[tuple[int, int], Any] = {}

    def work(number: int) -> None:
        for round_ in range(4):
            runs[number, round_] = run(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (number, _), found in runs.items():
        assert found.tokens == alone[number].tokens
        assert torch.equal(found["resid_mid", 1], alone[number]["resid_mid", 1])
    assert len(runs) == 32
    assert all(part.training for part in models[0].modules())


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_saved_and_streamed_runs_read_the_same(hm: HookedModel, tmp_path: Path, kind: str) -> None:
    run = hm.capture(PROMPTS, ["resid_mid", "logits"], [0, 2], max_new_tokens=5)
    if kind == "memory":
        run.save(tmp_path / "run")
    else:
        streamed = hm.capture(PROMPTS, ["resid_mid", "logits"], [0, 2], max_new_tokens=5, store=tmp_path / "run")
        assert streamed.texts == run.texts
    store = hookmap.open_store(tmp_path / "run")
    assert store.keys == run.keys and tuple(store.samples) == tuple(run.samples)
    for key in run.keys:
        assert all(map(torch.equal, store[key], run[key]))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["finished"] and manifest["architecture"] == "Qwen3ForCausalLM"


def test_ctrl_c_keeps_what_is_finished_and_resuming_does_the_rest(hm: HookedModel, tmp_path: Path) -> None:
    """Sampled, so that a resumed batch would differ if it drew other numbers than the whole run."""
    prompts = PROMPTS * 2
    settings = {
        "points": ["resid_mid"],
        "layers": [1],
        "max_new_tokens": 5,
        "do_sample": True,
        "seed": 4,
        "batch_size": 2,
    }
    whole = hm.capture(prompts, **settings)

    def interrupt(where: Progress) -> None:
        if where.samples_done == 2 and where.tokens_done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hm.capture(prompts, **settings, store=tmp_path / "run", progress=interrupt)
    kept = hookmap.open_store(tmp_path / "run")
    assert len(kept.samples) == 2 and not kept.finished
    assert not any(part._forward_hooks for part in hm.model.modules())
    with raises(hookmap.StoreError, "--resume"):
        hm.capture(prompts, **settings, store=tmp_path / "run")
    seen: list[Progress] = []
    resumed = hm.capture(prompts, **settings, store=tmp_path / "run", resume=True, progress=seen.append)
    assert min(p.samples_done for p in seen if p.tokens_done) == 2  # the first two were not done again
    assert resumed.tokens == whole.tokens
    assert all(map(torch.equal, resumed["resid_mid", 1], whole["resid_mid", 1]))


def test_a_resumed_run_must_be_the_same_run(hm: HookedModel, tmp_path: Path) -> None:
    hm.capture("to be", ["resid_mid"], [1], max_new_tokens=2, store=tmp_path / "run")
    with raises(hookmap.StoreError, "max_new_tokens"):
        hm.capture("to be", ["resid_mid"], [1], max_new_tokens=3, store=tmp_path / "run", resume=True)


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.slow
def test_a_stream_to_a_folder_holds_no_more_the_longer_it_gets(tmp_path: Path, folder: bool) -> None:
    """Bytes of the rows alive, at their highest, over one shard (256 rows) and over the two after it.

    In memory they do grow, which shows that this test can fail.
    """
    model = hookmap.open(plain_hooks.build("mamba"))  # no cache of keys and values that would grow
    alive: dict[int, int] = {}

    def held() -> int:
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.ndim >= 2 and o.shape[-1] == 32]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    gc.collect()
    before = held()  # by this model, and by other tests in this process

    def count(where: Progress) -> None:
        if where.tokens_done % 75 == 0:  # each look goes through every object there is
            alive[where.tokens_done] = held() - before

    store = tmp_path / "run" if folder else None
    # All points: some 2 kB a token, so that what waits for the writer's thread is less than the first shard.
    model.capture([[1, 2, 3]], "all", max_new_tokens=900, store=store, progress=count)
    first = max(size for step, size in alive.items() if 0 < step <= 450)
    later = max(size for step, size in alive.items() if step > 450)
    assert (later < 1.1 * first) == folder, (first, later)


def test_the_estimate_is_the_size(hm: HookedModel) -> None:
    chosen = {"points": ["resid_mid", "resid_pre", "logits"], "layers": [0, 2], "max_new_tokens": 5}
    estimate = hm.estimate(PROMPTS, **chosen, batch_size=2)
    run = hm.capture(PROMPTS, **chosen)
    tensors = [run.read(number, *key) for key in run.keys for number in range(len(PROMPTS))]
    assert estimate.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert (estimate.samples, estimate.tensors, estimate.forward_passes) == (3, 5, 10)
    assert str(estimate).endswith("kB")


class _Skipping(torch.nn.Module):
    """A module that the model calls on some passes only, or twice."""

    def __init__(self, inner: torch.nn.Module, calls: list[int]) -> None:
        super().__init__()
        self.inner = inner
        self.calls = calls

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for _ in range(self.calls.pop(0) if self.calls else 1):
            out = self.inner(hidden)
        return out if "out" in locals() else hidden


@pytest.mark.parametrize(("calls", "message"), [([1, 1, 0], "did not reach 1 of 1"), ([1, 2], "more than once")])
def test_a_visit_too_few_or_too_many_is_refused(calls: list[int], message: str) -> None:
    """nnsight itself would shift the rows, or lose the later ones, in silence."""
    model = plain_hooks.build("llama")
    opened = hookmap.open(model)
    skipping = _Skipping(model.model.layers[1].self_attn.o_proj, calls)
    model.model.layers[1].self_attn.o_proj = skipping
    point = opened.map.kinds[0].points["mixer_out"]
    term = point.terms[0].model_copy(update={"module": "model.layers.{i}.self_attn.o_proj.inner", "index": None})
    kind = opened.map.kinds[0]
    points = {**kind.points, "mixer_out": point.model_copy(update={"terms": (term,)})}
    by_hand = opened.map.model_copy(update={"kinds": (kind.model_copy(update={"points": points}),)})
    with pytest.raises(hookmap.CaptureError, match=message):
        HookedModel(model, None, by_hand).capture([[1, 2, 3]], ["mixer_out"], [1], max_new_tokens=4)
    # The model is usable afterwards.
    skipping.calls.clear()
    assert HookedModel(model, None, by_hand).capture([[1, 2, 3]], ["mixer_out"], [1], max_new_tokens=4).tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 needs do_sample=True"),
        ({"num_return_sequences": 0, "do_sample": True}, "num_return_sequences: expected a whole number"),
        ({"temperature": 0.5}, "do_sample=True"),
        ({"temprature": 0.5}, "did you mean temperature"),
        ({"max_new_tokens": -1}, "at least 0"),
        ({"max_new_tokens": 0, "seed": 3}, "generates nothing: leave out seed"),
        ({"batch_size": 0}, "at least 1"),
        ({"stop_strings": ["a"]}, "stop="),
        ({"max_new_tokens": 1.5}, "max_new_tokens: expected a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens: expected a whole number"),
        ({"batch_size": 1.5}, "batch_size: expected a whole number"),
        ({"temperature": 0.0, "do_sample": True}, "strictly positive"),
        ({"return_dict_in_generate": True}, "points="),
        ({"max_length": 9}, "max_new_tokens="),
        ({"seed": "one", "do_sample": True}, "seed: expected"),
        ({"seed": 2**70, "do_sample": True}, "64 bits"),
        ({"stop": ""}, "at least one whole character"),
        ({"stop": ["a", 3]}, "at least one whole character, got 3"),
        ({"resume": True}, "store=FOLDER"),
    ],
)
def test_settings_that_have_no_row_for_each_token_are_refused(
    hm: HookedModel, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(hookmap.CaptureError, match=message):
        hm.capture(PROMPTS, ["resid_mid"], [1], **settings)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([[]], "no tokens"),
        ([""], "no tokens"),
        ([[1, 2, 500]], "vocabulary is 0 to 96. Give this model's own tokenizer, or ids that it made"),
        ([3.5], "expected a string"),
        ([[{"content": "no role"}]], "expected a string"),
        (None, "got NoneType"),
        (3, "got int"),
        ({"role": "user", "content": "one message, and no list"}, "got dict"),
        (b"bytes", "got bytes"),
        ([b"bytes"], "got bytes"),
        ("half \ud800", "surrogate"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(hm: HookedModel, prompts: Any, message: str) -> None:
    with pytest.raises(hookmap.TokenizerError, match=message):
        hm.capture(prompts, ["resid_mid"], [1])


def test_token_ids_come_as_lists_arrays_or_tensors(hm: HookedModel) -> None:
    rows = torch.tensor([[5, 17, 3], [4, 4, 4]])
    for prompts in (rows, rows.numpy(), rows.tolist(), list(rows), [list(row.numpy()) for row in rows]):
        assert [t[:3] for t in hm.capture(prompts, ["resid_mid"], [1], max_new_tokens=2).tokens] == [
            (5, 17, 3),
            (4, 4, 4),
        ]
    assert hm.capture(rows[0], ["resid_mid"], [1], max_new_tokens=2).tokens[0][:3] == (5, 17, 3)


@pytest.mark.parametrize("where", [3, None, ("resid_mid", 1, 0, 2), ("resid_mid", slice(None)), ("resid_mid", "1")])
def test_what_stands_between_the_brackets_is_a_point_and_a_layer(hm: HookedModel, where: Any) -> None:
    run = hm.capture([[5, 17, 3]], ["resid_mid"], [1], max_new_tokens=2)
    for read in (run, run.store):
        with raises(hookmap.SelectionError, 'expected ["point"]'):
            read[where]
        with raises(hookmap.SelectionError, "has no call 2"):
            read["resid_mid", 1, 2]


def test_text_without_a_tokenizer_and_chat_without_a_template_are_refused() -> None:
    model = plain_hooks.build("gpt2")
    with raises(hookmap.TokenizerError, "tokenizer=..."):
        hookmap.open(model).capture("to be", ["resid_mid"], [1])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with raises(hookmap.TokenizerError, "chat template"):
        hookmap.open(model, tokenizer=tokenizer).capture("to be", ["resid_mid"], [1], chat=True)


def test_a_template_that_refuses_is_reported() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}" + CHAT_TEMPLATE
    with raises(hookmap.TokenizerError, "roles must alternate"):
        hookmap.open(plain_hooks.build("gpt2"), tokenizer=tokenizer).capture("to be", ["resid_mid"], [1], chat=True)


def test_more_tokens_than_positions_is_a_sentence() -> None:
    with raises(hookmap.CaptureError, "128 positions"):
        hookmap.open(plain_hooks.build("gpt2")).capture([[1] * 126], ["resid_mid"], [1], max_new_tokens=8)


def test_layer_99_and_an_unavailable_point_are_reported_together() -> None:
    with pytest.raises(hookmap.SelectionError) as error:
        hookmap.open(plain_hooks.build("gpt_neox")).capture([[1]], ["resid_mid", "resid_pre"], [99, 1])
    assert "layer 99" in str(error.value) and "parallel" in str(error.value)


def test_a_pad_token_is_not_needed() -> None:
    """A batch is padded with the end token, and the tokenizer still has no pad token afterwards."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    model = plain_hooks.build("qwen3")
    model.generation_config.pad_token_id = model.config.pad_token_id = None
    model.generation_config.eos_token_id = 96
    run = hookmap.open(model, tokenizer=tokenizer).capture(PROMPTS, ["resid_mid"], [1], max_new_tokens=3)
    assert tokenizer.pad_token is None and model.generation_config.pad_token_id is None
    assert len(run) == 3


def test_a_setting_that_looks_back_at_tokens_sees_no_pads() -> None:
    """transformers' repetition_penalty counts pads as tokens of the row: the pad, often the end, would be penalised."""
    model = plain_hooks.build("llama")
    hm = hookmap.open(model)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [1, 2]]
    for setting in ({"repetition_penalty": 30.0}, {"no_repeat_ngram_size": 1}):
        model.generation_config.pad_token_id = next(iter(hm.capture([prompts[1]], (), max_new_tokens=1).tokens))[-1]
        together = hm.capture(prompts, ["resid_mid"], [1], max_new_tokens=6, **setting)
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            alone = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, **setting
            )
            assert together.tokens[number] == tuple(alone[0].tolist())


@pytest.mark.slow
def test_families_have_distinct_numbers() -> None:
    """The reference itself can tell a wrong tensor. What a branch reads may be the bare stream, or both branches'."""
    for name, family in FAMILIES.items():
        reference = plain_hooks.generate(
            plain_hooks.build(name), family, [[1, 2, 3]], max_new_tokens=2, do_sample=False
        )
        names = [point for point in family.points if point not in ("mixer_in", "mlp_in")]
        tensors = [reference.point(family, point, 1) for point in names]
        for number, a in enumerate(tensors):
            assert all(not torch.allclose(a, b, atol=1e-2) for b in tensors[:number]), name
