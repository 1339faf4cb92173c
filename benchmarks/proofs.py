"""What is proved beyond reading, on every class: `python benchmarks/proofs.py [TYPES] [--jobs N]`.

A narrow copy of each causal language model class of transformers, with all its layers and random weights under which
each branch adds about as much as the stream holds, is opened; asked for the lens, an attribution, and whether each
point of each kind of block may be written. hookmap answers with a proof on that very model or with a reason.
"""

import logging
import multiprocessing
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

SECONDS = 600
TOKENS = [5, 9, 3, 4, 20, 11]


def main(given: list[str]) -> None:
    from hookmap.sweep.build import classes

    jobs = int(given.pop(given.index("--jobs") + 1)) if "--jobs" in given else 2
    types = [name for name in given if not name.startswith("-")]
    of = {architecture: model_type for model_type, architecture in classes().items()}
    wanted = types or sorted(of.values())
    found: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=8) as pool:
        for each in pool.imap_unordered(prove, wanted):
            print(each["type"], each.get("error") or each["lens"], file=sys.stderr, flush=True)
            found.append(each)
    tell(sorted(found, key=lambda each: str(each["type"])))


def prove(model_type: str) -> dict[str, Any]:
    """One class, in a process of the pool."""
    import hookmap
    from hookmap.analysis.unembedding import unembedding_of
    from hookmap.loading.configs import build
    from hookmap.loading.narrow import narrow
    from hookmap.sweep.configs import config_of
    from hookmap.verification.verify import redraw

    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build(narrow(config_of(model_type)), "cpu", torch.float32)
            redraw(model)
            hm = hookmap.open(model)
            lens = _reason(lambda: unembedding_of(hm))
            sums = _reason(lambda: hm.attribute(TOKENS, target=7))
            places = [s for k in hm.map.kinds for s in hm.map.selectors(list(k.points), [k.layers[0]])]
            writes = {s.point: reason for s in places if (reason := hm.proofs.of(s).reason) is not None}
            return {"type": model_type, "lens": lens, "sums": sums, "points": len(places), "refused": writes}
    except Exception as error:  # a model's own code raises what it likes
        return {"type": model_type, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    finally:
        signal.alarm(0)


def _stop(*_: Any) -> None:
    raise TimeoutError(f"not done after {SECONDS} s")


def _reason(ask: Callable[[], Any]) -> str:
    from hookmap.errors import HookmapError

    try:
        ask()
        return ""
    except HookmapError as error:
        return " ".join(str(error).split()).partition(". ")[0]


def tell(found: list[dict[str, Any]]) -> None:
    ran = [each for each in found if "error" not in each]
    lens, sums = ([each for each in ran if not each[name]] for name in ("lens", "sums"))
    refused = Counter(point.partition(".")[0] for each in ran for point in each["refused"])
    print(f"{len(ran)} of {len(found)} classes ran: a lens on {len(lens)}, attributions that sum on {len(sums)}.")
    print(f"{sum(each['points'] for each in ran)} points of kinds of blocks; refused: {dict(refused.most_common())}\n")
    print("| model type | no lens | no attribution | not written, besides `pattern` |\n|---|---|---|---|")
    for each in ran:
        writes = [f"`{p}`: {why}" for p, why in each["refused"].items() if not p.startswith("pattern")]
        if each["lens"] or each["sums"] or writes:
            print(f"| {each['type']} | {each['lens']} | {each['sums']} | {'; '.join(writes)} |")
    print()
    for each in found:
        if "error" in each:
            print(f"did not run: {each['type']}: {each['error']}")


if __name__ == "__main__":
    main(sys.argv[1:])
