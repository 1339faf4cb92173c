"""The peers: where each is installed, how it is asked, and where it is known to say something else than hookmap."""

import math
import os
import subprocess
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent

SEQUENTIAL = (
    "bloom", "deepseek_v3", "falcon_sequential", "gemma", "gemma2", "gemma3", "gpt2", "granite", "jamba", "llama",
    "mistral", "mixtral", "olmo2", "opt", "qwen2", "qwen3", "qwen3_moe",
)  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """Another program, in an environment of its own."""

    name: str
    does_not_load: frozenset[str]
    """families"""
    differs: dict[str, tuple[str, ...]]
    """family -> questions, as patterns, to which its answer is another one; docs/comparison.md says why"""

    @property
    def python(self) -> Path:
        """Its interpreter: of the environment that scripts/setup.py makes, or another that HOOKMAP_PEER_NAME names."""
        default = CHECKOUT / f".venv-peer-{self.name}" / "bin" / "python"
        return Path(os.environ.get(f"HOOKMAP_PEER_{self.name.upper().replace('-', '_')}", default))

    def ask(self, checkpoints: Path, answers: Path) -> None:
        """Writes an answer for each checkpoint. Raises CalledProcessError with what it printed."""
        script = HERE / f"ask_{self.name.replace('-', '_')}.py"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment.pop("PYTHONPATH", None)
        command = [self.python, script, checkpoints, answers]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{script.name} failed ({done.returncode}):\n{done.stderr[-3000:]}")

    def differs_on(self, family: str, question: str) -> bool:
        return any(fnmatch(question, pattern) for pattern in self.differs.get(family, ()))


_FOR_THE_NORM_ALONE = ("steer resid_mid", "patch resid_mid")
_PATTERN_FOR_SCORES = ("read attn_scores *",)

PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "transformer-lens",
            frozenset({"falcon_40b"}),
            {
                **dict.fromkeys(SEQUENTIAL, _FOR_THE_NORM_ALONE),
                "gptj": _PATTERN_FOR_SCORES,
                **dict.fromkeys(("jamba", "opt"), (*_FOR_THE_NORM_ALONE, *_PATTERN_FOR_SCORES)),
                "deepseek_v3": (*_FOR_THE_NORM_ALONE, *_PATTERN_FOR_SCORES, "read ?_rot *", "ablate head"),
                "bert": (
                    "steer resid_mid",
                    "read resid_mid *",
                    "read mixer_out *",
                    "ablate mixer_out",
                    *_PATTERN_FOR_SCORES,
                ),
            },
        ),
        Peer(
            "nnterp",
            frozenset({"bert", "jamba", "mamba", "phi"}),
            {
                "bloom": ("read m*_out_raw *", "ablate *"),
                "cohere": ("lens",),
                "falcon_40b": ("read mlp_out_raw *",),
                "falcon_7b": ("read mlp_out_raw *",),
                "gemma2": ("lens",),
            },
        ),
    )
}


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number; infinite where the sizes do not fit each other."""
    try:
        torch.broadcast_shapes(found.shape, expected.shape)
    except RuntimeError:
        return math.inf
    return float((found - expected).abs().max() / expected.abs().max())


def like(answer: torch.Tensor, question: str, theirs: torch.Tensor) -> torch.Tensor:
    """Our answer in the form of theirs: nnterp's lens is of the last position, and heads may be cut otherwise."""
    if question == "lens":
        return answer[:, -theirs.shape[1] :]
    return answer.reshape(theirs.shape) if question.startswith("read z") else answer
