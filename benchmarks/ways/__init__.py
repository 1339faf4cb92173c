"""The work of benchmarks/beside.py, as each library does it in its own best way."""

from collections.abc import Callable

from ways.bridges import sae_lens, transformer_lens
from ways.by_hand import by_hand
from ways.engines import interp_engine, torchlens
from ways.ours import hookmap
from ways.traces import nnsight, nnterp
from ways.work import Ways, Work

LIBRARIES: dict[str, Callable[[Work], Ways]] = {
    "plain hooks": by_hand, "hookmap": hookmap, "nnsight": nnsight, "transformer_lens": transformer_lens,
    "nnterp": nnterp, "interp_engine": interp_engine, "torchlens": torchlens, "sae_lens": sae_lens,
}  # fmt: skip
PACKAGES = {
    "plain hooks": "torch", "hookmap": "hookmap", "nnsight": "nnsight", "transformer_lens": "transformer-lens",
    "nnterp": "nnterp", "interp_engine": "interp-engine", "torchlens": "torchlens", "sae_lens": "sae-lens",
}  # fmt: skip
