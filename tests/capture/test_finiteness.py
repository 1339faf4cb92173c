"""A stream that is not finite is named: where first, and what helps; nothing is computed of it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plain_hooks
from support.enlarged import enlarged
from support.raises import raises

import hookmap
from hookmap.analysis.patching import sweep
from hookmap.errors import CaptureError, InterventionError, SelectionError

IDS = [5, 6, 7, 8, 9]
OTHER = [5, 6, 4, 8, 9]


def overflowing() -> Any:
    """float16; what block 1's MLP adds is beyond it, with finite weights."""
    model: Any = enlarged(6e4)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 100
    assert all(weight.half().isfinite().all() for weight in model.parameters())
    return model.half()


@pytest.fixture(scope="module")
def hm() -> Any:
    return hookmap.open(overflowing())


FIRST = r"mlp_out\.1 is the first to hold an infinity or nan, at position \d"
HELPS = r"computes in float16, up to 65504: open it in bfloat16 or float32"


def test_the_first_place_is_where_plain_hooks_find_it(hm: Any) -> None:
    model, seen = overflowing(), {}

    def look(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(look(f"mixer_out.{number}"))
        layer.mlp.register_forward_hook(look(f"mlp_out.{number}"))
    with torch.no_grad():
        model(torch.tensor([IDS]))
    first = next(name for name in sorted(seen, key=lambda n: (n[-1], n)) if not seen[name].isfinite().all())
    position = int((~seen[first][0].isfinite().all(-1)).nonzero()[0])
    assert first == "mlp_out.1"
    with pytest.raises(CaptureError, match=rf"mlp_out\.1 is the first .* at position {position}\..*{HELPS}"):
        hm.steering_vector([IDS], [OTHER], "resid_post", [2])


@pytest.mark.parametrize("method", ["mean_difference", "pca"])
def test_no_vector_of_it(hm: Any, method: str) -> None:
    with pytest.raises(CaptureError, match=rf"no steering vector \(prompt 0, layer 1\): .*{FIRST}.*{HELPS}"):
        hm.steering_vector([IDS], [OTHER], method=method)


def test_no_lens_no_attribution_and_no_sweep_of_it(hm: Any) -> None:
    with pytest.raises(CaptureError, match=rf"no lens: .*{FIRST}.*{HELPS}"):
        hm.lens(IDS)
    with pytest.raises(CaptureError, match=rf"{FIRST}.*{HELPS}"):
        hm.attribute(IDS)
    with pytest.raises(InterventionError, match=rf"resid_pre is not written:\n  - layers 0–2: .*{FIRST}.*{HELPS}"):
        sweep(hm, IDS, OTHER, 1, 2)


def test_an_edit_says_why_it_is_not_written(hm: Any) -> None:
    zero = [{"do": "ablate", "point": "mixer_out", "layers": [2]}]
    with pytest.raises(InterventionError, match=rf"mixer_out of layer 2 is not written: .*{FIRST}.*{HELPS}"):
        hm.capture(IDS, "resid_post", 2, max_new_tokens=1, interventions=zero)


def test_verification_says_so_and_nothing_else() -> None:
    (check,) = hookmap.verify(overflowing()).checks
    assert (check.name, check.layers, check.passed) == ("finite", (1,), False)
    assert re.search(f"{FIRST}.*{HELPS}", check.detail)


def test_a_broken_weight_is_named() -> None:
    model = plain_hooks.build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 3] = torch.nan
    with raises(CaptureError, "mixer_out.1", "position 0. The weight model.layers.1.self_attn.o_proj.weight"):
        hookmap.open(model).lens(IDS)


def infinite_capture(tmp_path: Path) -> tuple[Any, Any]:
    """A sound float32 model, and a capture of it whose rows of layer 1 are infinite for keep_dtype alone."""
    sound = hookmap.open(enlarged(1e8))
    how: dict[str, Any] = {"max_new_tokens": 0, "keep_dtype": "float16", "store": tmp_path / "run"}
    sound.capture([IDS, OTHER], "resid_post", [0, 1, 2], **how)
    return sound, hookmap.open_store(tmp_path / "run")


def test_a_capture_that_lost_numbers_is_no_source(tmp_path: Path) -> None:
    sound, store = infinite_capture(tmp_path)
    why = r"resid_post\.1 of sample 1, first at position \d\. Its rows were kept in float16.*bfloat16"
    with pytest.raises(CaptureError, match=f"no lens: {why}".replace("no lens: ", "no lens: the capture holds .* in ")):
        sound.lens(store, layers=[0, 1], sample=1)
    with raises(CaptureError, "resid_post.2 of sample 0"):  # its KL divergence is from this one
        sound.lens(store, layers=[0])
    patch = {"do": "patch", "point": "resid_post", "layers": 1, "source": {"store": str(tmp_path / "run"), "sample": 1}}
    with raises(InterventionError, "infinity or nan", "source"):
        sound.capture(IDS, "resid_post", 2, max_new_tokens=0, interventions=[patch])


@pytest.mark.parametrize("pool", ["last", "mean", "each"])
def test_a_probe_names_the_sample_and_the_position(tmp_path: Path, pool: str) -> None:
    from hookmap.analysis.probes.run import probe
    from hookmap.loading.prompts import Prompt

    prompts = [Prompt("", (5, 6, 7, n), labels={"right": n % 2 == 0}) for n in range(10, 40)]
    hookmap.open(enlarged(1e8)).capture(
        prompts, "resid_post", 1, max_new_tokens=0, keep_dtype="float16", store=tmp_path / "probed"
    )
    with pytest.raises(SelectionError, match=r"resid_post\.1 of sample 0 is not finite, first at position \d"):
        probe(hookmap.open_store(tmp_path / "probed"), "right", pool=pool)


@pytest.mark.slow
def test_a_sweep_within_its_noise_is_refused_and_cells_within_it_are_flagged() -> None:
    """In bfloat16 two prompts whose answers are alike differ by rounding only."""
    model = plain_hooks.build("llama").to(torch.bfloat16)
    hm = hookmap.open(model)
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, -1].float() for ids in (IDS, OTHER)]
    step = (logits[0].abs() + logits[1].abs()).max() * torch.finfo(torch.bfloat16).eps
    apart = (logits[0][:, None] - logits[0]) - (logits[1][:, None] - logits[1])
    alike = ((apart.abs() > 0) & (apart.abs() < step / 8)).nonzero()[0].tolist()
    with raises(InterventionError, "its noise is", "nothing to bring back", "float32"):
        sweep(hm, IDS, OTHER, *alike)
    most = divmod(int(apart.abs().argmax()), plain_hooks.VOCABULARY)
    found = sweep(hm, IDS, OTHER, *most, point="resid_pre")
    right, wrong = logits[0][list(most)], logits[1][list(most)]
    assert 0 < found.noise < abs(found.clean - found.corrupted)
    assert found.noise >= float((right.abs().sum() + wrong.abs().sum()) * torch.finfo(torch.bfloat16).eps / 2)
    assert not found.above_noise[:, :2].any(), "before the difference nothing differs"
    assert found.above_noise[0, 2] and found.above_noise[2, 4]
