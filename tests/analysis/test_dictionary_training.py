"""Training: what a dictionary learns is held against known directions; files against SAELens; runs against kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.opened import RAGGED, opened
from support.raises import raises

import hookmap
from hookmap.analysis.dictionaries.dictionary import About, Dictionary
from hookmap.analysis.dictionaries.evaluating import evaluate
from hookmap.analysis.dictionaries.loading import load_dictionary
from hookmap.analysis.dictionaries.saving import save_dictionary
from hookmap.analysis.dictionaries.trainer import Learning, Trainer
from hookmap.analysis.dictionaries.training import TRAINING, Training, train_dictionary
from hookmap.cli.main import main
from hookmap.demo import DICTIONARY_PATH, MODEL_PATH, sample_problems
from hookmap.errors import SelectionError, StoreError

D, TRUE = 16, 24
DIRECTIONS = torch.nn.functional.normalize(torch.randn(TRUE, D, generator=torch.Generator().manual_seed(1)), dim=1)
TEXTS = [[(7 * n + 3 * place) % 90 + 1 for place in range(12 + n % 5)] for n in range(40)]
SMALL: dict[str, Any] = {"features": 20, "k": 3, "batch_rows": 32, "buffer_rows": 100, "passes": 2}


def sparse_rows(count: int, seed: int) -> torch.Tensor:
    """Sums of two known directions each, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, TRUE, generator=generator).topk(2).indices
    sizes = torch.zeros(count, TRUE).scatter_(1, chosen, torch.rand(count, 2, generator=generator) + 0.5)
    return 30 * (sizes @ DIRECTIONS) + 5


def same(one: Dictionary, other: Dictionary) -> bool:
    return all(torch.equal(each, other.tensors()[name]) for name, each in one.tensors().items())


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_known_directions_are_found(kind: Any) -> None:
    rows = sparse_rows(6000, 2)
    trainer = Trainer(Learning(kind, 36, 2, 3 * len(rows), 64, 1e-2, 2000, 0), rows)
    told = [trainer.learn(rows) for _ in range(3)]
    found = trainer.dictionary(About("resid_post", 1))
    fresh = sparse_rows(2000, 3)
    error = ((found.reconstruct(fresh) - fresh) ** 2).sum() / ((fresh - fresh.mean(0)) ** 2).sum()
    assert error < 0.12 and told[-1].explained_variance > told[0].explained_variance
    active = float((found.encode(fresh) != 0).sum(1).float().mean())
    assert active == 2 if kind == "topk" else 1.4 < active < 2.6
    near = (DIRECTIONS @ torch.nn.functional.normalize(found.decoder, dim=1).T).max(1).values
    assert float((near > 0.9).float().mean()) > 0.9  # of random ones, next to none is: see the line below
    drawn = torch.nn.functional.normalize(torch.randn(36, D, generator=torch.Generator().manual_seed(5)), dim=1)
    assert float(((DIRECTIONS @ drawn.T).max(1).values > 0.9).float().mean()) < 0.2


@pytest.mark.slow
def test_it_streams_from_the_model_and_leaves_its_files(tmp_path: Path) -> None:
    hm = opened("gpt2")
    told: list[Any] = []
    made = hm.train_dictionary(TEXTS, "resid_post", 1, store=tmp_path / "sae", tell=told.append, **SMALL)
    rows = sum(len(text) - 1 for text in TEXTS)  # the first token of each is left out
    assert made.trainer is not None and made.trainer.seen == 2 * rows and told == made.log
    assert {path.name for path in (tmp_path / "sae").iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    read = load_dictionary(tmp_path / "sae")
    assert same(read, made.dictionary) and read.reads == ("resid_post", 1) and (read.features, read.k) == (20, 3)
    assert read.about.context == max(map(len, TEXTS)) and read.about.skip == 1
    assert evaluate(hm, RAGGED, read).skip == 1
    with raises(StoreError, "already holds a dictionary"):
        hm.train_dictionary(TEXTS, "resid_post", 1, store=tmp_path / "sae", **SMALL)
    again = hm.train_dictionary(TEXTS, "resid_post", 1, **SMALL)
    assert same(again.dictionary, made.dictionary)
    heads = hm.train_dictionary(TEXTS, "z", 1, **SMALL).dictionary
    assert heads.d_in == hm.map.d_model
    own = evaluate(hm, RAGGED, read, skip=0)
    assert own.l0 <= 3 and own.tokens == sum(map(len, RAGGED))


@pytest.mark.slow
def test_a_training_that_stopped_goes_on(tmp_path: Path) -> None:
    hm = opened("gpt2")

    class Stop(Exception):
        pass

    def stops(state: Any) -> None:
        if state.rows > 700:  # in the second pass
            raise Stop

    run: dict[str, Any] = {**SMALL, "kind": "jumprelu", "store": tmp_path / "sae", "batch_size": 4}
    whole = hm.train_dictionary(TEXTS, "resid_post", 1, **{**run, "store": None}).dictionary
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr("hookmap.analysis.kept.SECONDS", 0.0)
        hm.train_dictionary(TEXTS, "resid_post", 1, tell=stops, **run)
    held = TRAINING.open(tmp_path / "sae")
    assert held.passes == 1 and 0 < len(held.samples) < len(TEXTS)
    with raises(StoreError, "another run", "rate"):
        hm.train_dictionary(TEXTS, "resid_post", 1, resume=True, learning_rate=0.1, **run)
    with raises(StoreError, "another run", "settings.prompts"):
        hm.train_dictionary(TEXTS[1:] + TEXTS[:1], "resid_post", 1, resume=True, **run)
    with raises(StoreError, "already holds", "--resume"):
        hm.train_dictionary(TEXTS, "resid_post", 1, **run)
    made = hm.train_dictionary(TEXTS, "resid_post", 1, resume=True, **run)
    assert same(made.dictionary, whole) and not (tmp_path / "sae" / TRAINING.file).exists()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / TRAINING.file).write_bytes(b"\x10\0\0\0\0\0\0\0 nothing")
    with raises(StoreError, "broken"):
        hm.train_dictionary(TEXTS, "resid_post", 1, resume=True, **{**run, "store": tmp_path / "broken"})


@pytest.mark.slow
def test_a_killed_training_goes_on(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"prompt": p.question}) + "\n" for p in sample_problems(400, seed=1)))
    command = ["dictionary", "train", "--prompts", str(texts), "--layer", "3", "--features", "40", "--k", "4"]
    command += ["--buffer-rows", "500", "--batch-rows", "50"]
    code = "import hookmap.analysis.kept as k; k.SECONDS = 0.0; from hookmap.cli.main import main; main()"
    started = [sys.executable, "-c", code, *command, "-o"]
    child = subprocess.Popen([*started, str(tmp_path / "sae")], stderr=subprocess.DEVNULL, env={**os.environ})
    for _ in range(1200):
        time.sleep(0.1)
        if (tmp_path / "sae" / TRAINING.file).exists() and TRAINING.open(tmp_path / "sae").trainer is not None:
            break
    assert child.poll() is None, "it ended before it was killed"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert 0 < len(TRAINING.open(tmp_path / "sae").samples) < 400
    for folder, more in (("sae", ["--resume"]), ("whole", [])):
        said = CliRunner().invoke(main, [*command, "-o", str(tmp_path / folder), *more])
        assert said.exit_code == 0, said.output
    assert same(load_dictionary(tmp_path / "sae"), load_dictionary(tmp_path / "whole"))


def test_it_learns_from_a_store(tmp_path: Path) -> None:
    hm = opened("gpt2")
    hm.capture(TEXTS, "resid_post", 1, 0, store=tmp_path / "run")
    store = hookmap.open_store(tmp_path / "run")
    run: dict[str, Any] = {**SMALL, "point": "resid_post", "layer": 1}
    made = train_dictionary(None, store, **run)
    assert made.trainer is not None and made.trainer.seen == 2 * sum(len(text) - 1 for text in TEXTS)

    class Stop(Exception):
        pass

    def stops(state: Any) -> None:
        if state.rows > 700:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr("hookmap.analysis.kept.SECONDS", 0.0)
        train_dictionary(None, store, store=tmp_path / "sae", tell=stops, **run)
    gone_on = train_dictionary(None, store, store=tmp_path / "sae", resume=True, **run)
    assert same(gone_on.dictionary, made.dictionary)
    typed = ["--features", "20", "--k", "3", "--batch-rows", "32", "--buffer-rows", "100", "--passes", "2"]
    command = ["dictionary", "train", "--store", str(tmp_path / "run"), "--layer", "1", "-o", str(tmp_path / "cli")]
    said = CliRunner().invoke(main, [*command, *typed])
    assert said.exit_code == 0, said.output
    assert same(load_dictionary(tmp_path / "cli"), made.dictionary)
    hm.capture(TEXTS, "resid_post", 1, 0, mean=True, store=tmp_path / "means")
    with raises(SelectionError, "means"):
        train_dictionary(None, hookmap.open_store(tmp_path / "means"), "resid_post", 1)
    with raises(SelectionError, "save"):
        train_dictionary(None, hm.capture(TEXTS, "resid_post", 1, 0), "resid_post", 1)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    hm = opened("gpt2")
    with raises(SelectionError, "kind", "k:", "passes", "learning_rate"):
        hm.train_dictionary(TEXTS, "resid_post", 1, kind="relu", k=0, passes=-1, learning_rate=7)
    with raises(SelectionError, "k: expected 4"):
        hm.train_dictionary(TEXTS, "resid_post", 1, features=4, k=9)
    with raises(SelectionError, "name the layer"):
        hm.train_dictionary(TEXTS, "resid_post")
    with raises(SelectionError, "no vectors"):
        hm.train_dictionary(TEXTS, "pattern", 1)
    with raises(SelectionError, "0 rows behind their first 1"):
        hm.train_dictionary([[5], [6]], "resid_post", 1)
    with raises(SelectionError, "need a model"):
        train_dictionary(None, TEXTS, "resid_post", 1)
    with raises(SelectionError, "diverged", "learning_rate"):
        rows = torch.full((64, 8), 1e30)
        Trainer(Learning("topk", 8, 2, 64, 16, 1e-3, 10, 0), torch.ones(4, 8)).learn(rows)
    said = CliRunner().invoke(main, ["dictionary", "train", "--layer", "1", "-o", str(tmp_path / "sae")])
    assert said.exit_code == 2 and "--prompts" in said.output and "--store" in said.output


def test_rows_that_are_not_finite_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    rows[3, 2], rows[9] = torch.nan, torch.inf
    training = Training(Learning("topk", 8, 2, 64, 16, 1e-3, 10, 0), About(), {})
    training.learn(rows, None)
    assert training.trainer is not None and training.trainer.seen == 62
    assert "2 rows are not finite" in caplog.text
    training.learn(torch.full((5, 8), torch.nan), None)
    assert training.trainer.seen == 62


@pytest.mark.slow
def test_the_demo_models_dictionary_explains_it() -> None:
    assert sum(path.stat().st_size for path in DICTIONARY_PATH.iterdir()) < 300_000
    sae = load_dictionary(DICTIONARY_PATH)
    hm = hookmap.open(MODEL_PATH)
    texts = [
        [{"role": "user", "content": each.question}, {"role": "assistant", "content": each.answer_text}]
        for each in sample_problems(12, seed=1234)
    ]
    found = evaluate(hm, texts, sae, add_generation_prompt=False, continue_final_message=False)
    assert found.explained_variance > 0.9 and found.ce_loss_score > 0.95 and found.l0 <= 12


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_saelens_reads_it_and_is_read(kind: Any, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens has an environment of its own: pip install sae-lens")
    rows = sparse_rows(2000, 2)
    trainer = Trainer(Learning(kind, 36, 2, len(rows), 256, 5e-3, 5000, 0), rows)
    trainer.learn(rows)
    ours = trainer.dictionary(About("resid_post", 1, model="tiny", prepend_bos=False, context=16))
    theirs = sae_lens.SAE.load_from_disk(save_dictionary(ours, tmp_path / "ours"))
    torch.testing.assert_close(theirs.encode(rows).to_dense(), ours.encode(rows), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs(rows), ours.reconstruct(rows), atol=1e-3, rtol=1e-4)
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    config = {
        "topk": lambda: sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=36, k=2),
        "jumprelu": lambda: sae_lens.JumpReLUTrainingSAEConfig(d_in=D, d_sae=36),
    }[kind]()
    trained = sae_lens.registry.get_sae_training_class(config.architecture())[0](config)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8)).abs()
    trained.save_inference_model(tmp_path / "theirs")
    read = load_dictionary(tmp_path / "theirs")
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "theirs")
    torch.testing.assert_close(read.encode(rows), loaded.encode(rows).to_dense(), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(read.reconstruct(rows), loaded(rows), atol=1e-2, rtol=1e-4)
