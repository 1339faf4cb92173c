"""inspect's own OpenAI provider against `hookmap serve`: the server keeps activations of every answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("inspect_ai", reason='pip install "hookmap[eval]"')
pytest.importorskip("fastapi", reason='pip install "hookmap[server]"')

from support.served import demo, serving

import hookmap

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("collected")]

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_what_the_server_keeps_is_found_from_each_sample(tmp_path: Path) -> None:
    with serving(tmp_path / "sessions") as served:
        environment = {
            **os.environ,
            "HOOKMAP_BASE_URL": f"{served.url}/v1",
            "HOOKMAP_API_KEY": "none",
            "PYTHONPATH": str(CHECKOUT),
        }
        arguments = "eval gsm8k inspect:openai-api/hookmap/hookmap-demo --data demo --samples 2 --parallel 2".split()
        arguments += ["--max-new-tokens", "12", "--points", "resid_post", "--layers", "8", "-o", str(tmp_path / "out")]
        done = subprocess.run(
            [sys.executable, "-m", "hookmap.cli", *arguments], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        for number in (1, 2):
            row = json.loads((tmp_path / "out" / "samples" / f"gsm8k_000{number}.json").read_text("utf-8"))
            session = row["activations"]["session"]
            assert served.get(f"/v1/activations/sessions/{session}").status_code == 200
            store = hookmap.open_store(tmp_path / "sessions" / session)
            (sample,) = store.samples
            assert row["text"].strip() == sample.text.strip() and row["question"] in sample.prompt
            again = demo().capture([list(sample.token_ids[:-1])], ["resid_post"], [8], max_new_tokens=0)
            assert torch.allclose(again.read(0, "resid_post", 8), store.read(0, "resid_post", 8), atol=1e-3)
