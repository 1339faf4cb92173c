"""A model that vLLM has compiled: the taps are in its code, and capture and write as in the eager one."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import hookmap
from hookmap.errors import HookmapError
from support.on_vllm import POINTS, SETTINGS, Plain, held_against, prompts

# vLLM keeps compiled code and its settings for a whole process: this one has a process of its own.
folder = sys.argv[1]
plain = Plain.of(folder)
taps = {"resid_pre": "all", "resid_mid": "all", "resid_post": [0, 1, 2], "mixer_out": "all", "mlp_out": "all", "z": [1]}
asked = [*prompts(3, 9), *prompts(2, 40, seed=1)]
edits = [
    {"do": "steer", "point": "resid_mid", "layers": [1], "vector": [0.5] * 64, "strength": 4},
    {"do": "scale", "point": "z", "layers": [1], "heads": [0], "factor": -2.0},
    {"do": "ablate", "point": "mlp_out", "layers": [2], "positions": "generated"},
]
own = hookmap.open(folder, dtype="float32", check=False)
steered = own.generate(asked, edits, {"points": "resid_post"}, max_new_tokens=6, batch_size=1)
with hookmap.open_on_vllm(folder, taps=taps, max_num_batched_tokens=32, **SETTINGS) as model:
    assert model.engine_of_vllm.tapped is not None
    held_against(plain, model.capture(asked, max_new_tokens=6, points=POINTS))
    found = model.generate(asked, edits, {"points": "resid_post"}, max_new_tokens=6)
    assert found.tokens == steered.tokens != [plain.generated(ids, 6) for ids in asked]
    for key in found.keys:
        for sample in range(len(asked)):
            off = (found.store.read(sample, *key) - steered.store.read(sample, *key)).abs().max()
            assert float(off) < 1e-4, (key, sample, float(off))
    assert model.generate(asked, max_new_tokens=6).tokens == [plain.generated(ids, 6) for ids in asked]
    for ask in ({"points": "q"}, {"points": {"z": [0]}}):
        try:
            model.capture(asked, max_new_tokens=2, **ask)
        except HookmapError as error:
            assert "compiled without taps" in str(error)
        else:
            raise AssertionError(ask)
print("all right")
"""


def test_compiled_code_captures_and_writes(checkpoint: Path) -> None:
    tests = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint)], cwd=tests, capture_output=True, text=True, timeout=900
    )
    assert run.stdout.rstrip().endswith("all right"), run.stdout[-2000:] + run.stderr[-4000:]


START = """
import sys
import hookmap
from support.on_vllm import SETTINGS

with hookmap.open_on_vllm(sys.argv[1], taps={"resid_post": "all"}, **SETTINGS):
    from torch._dynamo.utils import counters
    print("hits", counters["inductor"]["fxgraph_cache_hit"], "misses", counters["inductor"]["fxgraph_cache_miss"])
"""


def test_a_second_start_reads_the_code_that_the_first_one_compiled(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    command = [sys.executable, "-c", START, str(checkpoint)]
    runs = [
        subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=900)
        for _ in range(2)
    ]
    said = [run.stdout.splitlines()[-1:] for run in runs]
    assert said == [["hits 0 misses 1"], ["hits 1 misses 0"]], runs[1].stderr[-3000:]
