"""A fresh interpreter in which torch and what comes with it cannot be imported, as if they were not installed."""

import os
import subprocess
import sys

HEAVY = (
    "torch", "transformers", "nnsight", "accelerate", "numpy", "safetensors", "huggingface_hub", "fsspec", "rich",
    "yaml", "psutil", "click",
)  # fmt: skip
REFUSED = f"""
import sys
HEAVY = {HEAVY!r}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ImportError(f"{{name}} is not installed")
sys.meta_path.insert(0, Refuse())
"""
ASK = """
from hookmap import light
m = light.load_map(sys.argv[1])
print(m.selectors("resid_mid", 8)[0])
print(light.weights(m, "attn_out", 8)[0].path)
print(*(set(HEAVY) & set(sys.modules)))
"""


def without_heavy(source: str, path: str = "") -> "subprocess.CompletedProcess[str]":
    """What it says of the map of `source`; `path`: where hookmap is, else where this process has it."""
    environment = {**os.environ, "PYTHONPATH": path} if path else None
    command = [sys.executable, "-c", REFUSED + ASK, source]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path or None)
