"""The V2 model runner, vLLM's default on GPUs, gives the rows and edits that V1 gives: the same tests, run on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ("test_rows.py", "test_opening.py", "test_interventions.py", "test_compiled.py")


@pytest.mark.slow
def test_what_holds_on_v1_holds_on_v2() -> None:
    import torch

    environment = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "1"}
    if not torch.cuda.is_available():  # its kernels are Triton's, which compiles for GPUs; here it interprets them
        interpreted = str(HERE.parent / "support" / "triton_on_cpu")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [interpreted, os.environ.get("PYTHONPATH")]))
        environment["TRITON_INTERPRET"] = "1"
    left_out = "a_model_that_vllm_loads or a_second_start"  # of no runner's doing
    if not torch.cuda.is_available():
        left_out += " or sampling_needs_no_other_setting"  # Triton 3.9 does not interpret vLLM's kernel of top-k
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-W", "default", "-n", "0", "-q", "-k", f"not ({left_out})", *FILES],
        cwd=HERE, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
