"""What the residual stream behind the last block is the sum of, where a map says that it is a sum. Pure."""

from hookmap.activations import Key, key_of
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName

_BRANCHES = ("mixer_out", "cross_attn_out", "mlp_out")


def summands(m: ArchitectureMap) -> tuple[Key, ...] | str:
    """What entered block 0 and what each branch of each run of each layer adds, in forward order; or why it is no sum.

    A factor on the stream is not seen here: who adds the tensors up checks that they give the stream.
    """
    first = key_of("resid_pre", 0, None if m.kind_of(0).calls == 1 else 0)
    problems = []
    for kind in m.kinds:
        layers = f"layers {', '.join(map(str, kind.layers))}" if len(kind.layers) < m.num_layers else "the blocks"
        if "stream" in kind.axes:
            problems.append(f"{layers} have several residual streams")
        elif kind.norm_placement == "post" and "resid_mid_sum" in kind.points:
            problems.append(f"{layers} norm the stream itself, so it is no sum of what the branches add")
        for branch in _BRANCHES:
            if branch not in kind.points and getattr(kind, branch.removesuffix("_out")) is not None:
                problems.append(f"{layers} have no {branch}: {kind.unavailable.get(branch, 'unknown')}")
    if problems:
        return "; ".join(problems)
    return first, *(s.key for s in m.selectors([p for p in m.points if PointName.of(p).base in _BRANCHES], "all"))
