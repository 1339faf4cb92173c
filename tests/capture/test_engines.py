"""Both engines show the same tensors, bit for bit; runs share a model where they can, and halve what does not fit."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from support import plain_hooks
from support.opened import EACH_FAMILY, RAGGED, opened
from support.plain_hooks import FAMILIES
from support.raises import raises
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.capture.engines.model_lock import ModelLock
from hookmap.demo import MODEL_PATH


@pytest.mark.filterwarnings("ignore:Module .* has a submodule named 'output'")  # nnsight's, of BERT
@pytest.mark.parametrize("new", [4, 0])
@pytest.mark.parametrize("name", EACH_FAMILY)
def test_the_engines_are_bit_identical(name: str, new: int) -> None:
    runs = [opened(name).capture(RAGGED, "all", max_new_tokens=new, engine=engine) for engine in ("hooks", "nnsight")]
    assert runs[0].tokens == runs[1].tokens and runs[0].keys == runs[1].keys
    for key in runs[0].keys:
        for number in range(len(RAGGED)):
            assert torch.equal(runs[0].read(number, *key), runs[1].read(number, *key)), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "mamba", "falcon_7b"])
def test_many_tokens_cross_the_blocks_in_which_rows_are_gathered(name: str) -> None:
    """70 steps are two blocks of 32 and a part; rows of the batch end inside the first and the second."""
    hm, family = opened(name), FAMILIES[name]
    free = plain_hooks.generate(hm.model, family, RAGGED, max_new_tokens=70, do_sample=False)
    width = max(map(len, RAGGED))
    ends = [int(free.sequences[1, width + 40])]
    reference = plain_hooks.generate(hm.model, family, RAGGED, max_new_tokens=70, do_sample=False, eos_token_id=ends)
    run = hm.capture(RAGGED, list(family.points), max_new_tokens=70, eos_token_id=ends)
    assert len({sample.rows - sample.prompt_tokens for sample in run.samples}) > 1
    for number, ids in enumerate(RAGGED):
        for point in family.points:
            expected = reference.point(family, point, 1)[number, width - len(ids) :][: run.samples[number].rows]
            assert torch.equal(run.read(number, point, 1), expected), point


def test_auto_takes_nnsight_for_what_came_as_an_nnsight_model() -> None:
    model = plain_hooks.build("qwen3")
    assert opened("qwen3").engine()[0] == "hooks"
    given = hookmap.open(nnsight.TransformersModel(model, tokenizer=tiny_tokenizer()))
    name, why = given.engine()
    assert name == "nnsight" and "nnsight model" in why
    with raises(hookmap.CaptureError, "auto, hooks or nnsight", "'hook'"):
        given.capture(RAGGED, ["resid_pre"], engine="hook")  # type: ignore[arg-type]


def test_runs_with_hooks_go_side_by_side_and_see_only_their_own() -> None:
    """Each of two threads waits in the middle of its run for the other: a lock around a run would never let both in."""
    hm, meet = opened("llama"), threading.Barrier(2, timeout=240)
    alone = [hm.capture([ids], ["resid_mid"], max_new_tokens=4) for ids in RAGGED[:2]]
    runs: dict[int, Any] = {}

    def work(number: int) -> None:
        def wait(where: Any) -> None:
            if 0 < where.tokens_done < 4:
                meet.wait()

        runs[number] = hm.capture([RAGGED[number]], ["resid_mid"], max_new_tokens=4, progress=wait)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert runs[number].tokens == alone[number].tokens
        assert all(torch.equal(runs[number][key], alone[number][key]) for key in alone[number].keys)


def out_of_memory_above(rows: int) -> Any:
    def refuse(_: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[0] > rows:
            raise torch.OutOfMemoryError(f"CUDA out of memory with {kwargs['input_ids'].shape[0]} rows")

    return refuse


@pytest.mark.parametrize("new", [3, 0])
def test_a_batch_that_does_not_fit_is_halved_and_the_rest_goes_on_so(tmp_path: Path, new: int) -> None:
    hm = hookmap.open(plain_hooks.build("llama"))
    prompts = [[n, n + 1, n + 2] for n in range(3, 14)]
    expected = hm.capture(prompts, ["resid_mid"], [1], new, batch_size=2)
    handle = hm.model.register_forward_pre_hook(out_of_memory_above(2), with_kwargs=True)
    try:
        run = hm.capture(prompts, ["resid_mid"], [1], new, batch_size=8, store=tmp_path / "run")
    finally:
        handle.remove()
    assert run.tokens == expected.tokens
    for number in range(len(prompts)):
        torch.testing.assert_close(run.read(number, "resid_mid", 1), expected.read(number, "resid_mid", 1))
    (note,) = json.loads((tmp_path / "run" / "manifest.json").read_text())["runs"]
    assert note["halved"] == [
        "out of memory with 8 prompts at once; going on with 4",
        "out of memory with 4 prompts at once; going on with 2",
    ]
    assert note["engine"] == "hooks" and note["memory"]["peak"] >= note["memory"]["before"] > 0
    assert not hookmap.open_store(tmp_path / "run").verify()


def test_memory_that_runs_out_in_the_middle_of_a_batch_leaves_no_row_of_it() -> None:
    """The third pass fails, when rows of two are there already."""
    hm, passes = hookmap.open(plain_hooks.build("llama")), []
    expected = hm.capture(RAGGED[:2], ["resid_mid"], [1], 5, batch_size=1)

    def refuse(_: Any, args: Any, kwargs: Any) -> None:
        passes.append(1)
        if len(passes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = hm.model.register_forward_pre_hook(refuse, with_kwargs=True)
    run = hm.capture(RAGGED[:2], ["resid_mid"], [1], 5)
    handle.remove()
    assert run.tokens == expected.tokens
    assert all(torch.equal(run.read(n, "resid_mid", 1), expected.read(n, "resid_mid", 1)) for n in range(2))


def test_one_prompt_that_does_not_fit_is_an_error_with_the_next_step() -> None:
    hm = hookmap.open(plain_hooks.build("llama"))
    handle = hm.model.register_forward_pre_hook(out_of_memory_above(0), with_kwargs=True)
    with raises(hookmap.CaptureError, "out of memory on cpu", "6 tokens"):
        hm.capture(RAGGED[:2], ["resid_mid"], [1], 2)
    handle.remove()


def test_a_capture_that_fits_nowhere_is_refused_with_the_flags_that_help(tmp_path: Path) -> None:
    """`pattern` of 97 thousand tokens, and a petabyte of rows."""
    hm = opened("llama")
    many = [[1, 2, 3]] * 1000
    with raises(hookmap.CaptureError, "TB in memory", "store=FOLDER", "positions="):
        hm.capture(many, ["pattern"], max_new_tokens=100_000)
    with raises(hookmap.StoreError, "has room for", "needs up to", "TB:", "keep_dtype="):
        hm.capture(many, ["pattern"], max_new_tokens=100_000, store=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("new", [70, 0])
def test_a_gpu_shows_what_plain_hooks_see_there(new: int) -> None:
    hm, family = hookmap.open(plain_hooks.build("qwen3").cuda()), FAMILIES["qwen3"]
    runs = [hm.capture(RAGGED, list(family.points), max_new_tokens=new, engine=e) for e in ("hooks", "nnsight")]
    for key in runs[0].keys:
        for number in range(len(RAGGED)):
            assert torch.equal(runs[0].read(number, *key), runs[1].read(number, *key))
    if new:
        ids = [torch.tensor(ids).cuda() for ids in RAGGED[:1]]
        reference = plain_hooks.generate(hm.model, family, ids, max_new_tokens=new, do_sample=False)  # type: ignore[arg-type]
        alone = hm.capture(RAGGED[:1], list(family.points), max_new_tokens=new)
        for point in family.points:
            assert torch.equal(alone.read(0, point, 1), reference.point(family, point, 1)[0].cpu())


@pytest.mark.slow
def test_the_estimate_counts_what_one_pass_brings_at_once() -> None:
    """A stream of many short texts holds little of them; one long text comes whole."""
    hm = opened("llama")
    few = hm.estimate([[1, 2, 3]] * 8, ["logits"], max_new_tokens=5)
    assert few.largest == 8 * 3 * 97 * 4 and few.held(True) == few.bytes
    long = hm.estimate([[1] * 1_000_000], ["logits"], max_new_tokens=0)
    short = hm.estimate([[1] * 1_000] * 1_000, ["logits"], max_new_tokens=0)
    assert long.bytes == short.bytes == long.held(True)
    assert short.largest == 4 * 1_000 * 97 * 4 and short.held(True) < short.bytes / 2


WITHOUT_NNSIGHT = """
import sys, hookmap
from hookmap.demo import MODEL_PATH

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "nnsight":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocked())
hm = hookmap.open(MODEL_PATH)
steer = {"do": "steer", "point": "resid_pre", "vector": [1.0] * hm.map.d_model}
hm.capture("2 + 3 =", "all", store=sys.argv[1], max_new_tokens=3, interventions=[steer])
try:
    hm.capture("2 + 3 =", "embed", engine="nnsight")
except hookmap.CaptureError as error:
    print(error)
"""


@pytest.mark.slow
def test_the_default_engine_works_where_nnsight_cannot_be_imported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_NNSIGHT, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "No module named 'nnsight'" in done.stdout and "nnsight>=0.8.1" in done.stdout
    stored, hm = hookmap.open_store(tmp_path / "run"), hookmap.open(MODEL_PATH)
    steer = {"do": "steer", "point": "resid_pre", "vector": [1.0] * hm.map.d_model}
    here = hm.capture("2 + 3 =", "all", max_new_tokens=3, interventions=[steer])
    assert stored.keys == here.keys
    assert all(torch.equal(stored.read(0, *key), here.read(0, *key)) for key in here.keys)


@pytest.mark.parametrize(
    ("first", "second"), [("shared", "exclusive"), ("exclusive", "shared"), ("exclusive", "exclusive")]
)
def test_a_thread_that_waits_for_a_model_gets_it_when_the_other_leaves(first: str, second: str) -> None:
    lock, inside = ModelLock(), threading.Event()

    def work() -> None:
        with getattr(lock, second)():
            inside.set()

    with getattr(lock, first)():
        threading.Thread(target=work, daemon=True).start()
        assert not inside.wait(0.1)
    assert inside.wait(20)
