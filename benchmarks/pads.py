"""Padded against alone, on every class: `python benchmarks/pads.py [TYPES] [--jobs N] [--ledger FILE]`.

A narrow copy of each causal language model class of transformers, with all its layers and random weights under which
each branch adds about as much as the stream holds, captures prompts of unlike lengths together and one by one, while it
generates and in a harvest. Said of each: how far its rows are apart where its prompts are padded whatever hookmap
thinks of it, whether hookmap pads them, and how far apart the rows and tokens are that a person then gets.

The ledger has a line for each class that is done; a run goes on with it, and prints the table of all.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from every_class import compared, quietly

from hookmap.loading.float64 import in_float64

SECONDS = 600
LENGTHS = (2, 9, 70)
NEW = 3
WINDOW = 32
"""of attention that looks so far back, so that the prompts are longer"""
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size")
LAST_BITS = 1e-4


def main(given: list[str]) -> None:
    jobs = int(given.pop(given.index("--jobs") + 1)) if "--jobs" in given else 1
    ledger = Path(given.pop(given.index("--ledger") + 1)) if "--ledger" in given else None
    types = [name for name in given if not name.startswith("-")]
    tell(compared(compare, types, ledger, jobs))


def compare(model_type: str) -> dict[str, Any]:
    """One class, in a process of the pool."""
    import hookmap
    from hookmap.loading.configs import build
    from hookmap.loading.narrow import narrow
    from hookmap.sweep.configs import config_of
    from hookmap.verification.verify import redraw

    try:
        with quietly(SECONDS):
            config = narrow(config_of(model_type))
            _look_less_far(config)
            model = build(config, "cpu", torch.float32)
            redraw(model)
            hm = hookmap.open(model)
            return {"type": model_type, "generation": _of(hm, NEW), "harvest": _of(hm, 0)}
    except Exception as error:  # a model's own code raises what it likes
        return {"type": model_type, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _of(hm: Any, new: int) -> dict[str, Any]:
    reason = hm.pads.why_not(harvest=not new)
    try:
        alone = _rows(hm, new, 1)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    found = {"reason": reason, "got": _apart(_rows(hm, new, 8), alone)}
    if not _right(found["got"]):
        # A choice of experts may be within rounding: in float64 it falls as it falls alone. Where the model does not
        # run in float64, two like prompts side by side, without a pad, say what rounding does.
        try:
            with in_float64(hm.root):
                found["float64"] = _apart(_rows(hm, new, 8), _rows(hm, new, 1))
        except RuntimeError:
            found["twins"] = _apart(_rows(hm, new, 2, twins=True), alone)
    if reason is not None:
        hm.pads._found[not new, False] = None  # pad all the same
        try:
            found["padded"] = _apart(_rows(hm, new, 8), alone)
        except Exception as error:
            found["padded"] = type(error).__name__
        found["again"] = _apart(_rows(hm, new, 1), alone)
    return found


def _rows(hm: Any, new: int, together: int, twins: bool = False) -> tuple[Any, dict[Any, torch.Tensor]]:
    """Tokens, and each layer's stream, of each prompt. twins: of each prompt beside itself."""
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, hm.vocabulary - 8, (length,), generator=draw).tolist() for length in LENGTHS]
    generation = {"min_new_tokens": new} if new else {}
    every = [prompt for prompt in prompts for _ in range(1 + twins)]
    run = hm.capture(every, ["resid_post"], max_new_tokens=new, batch_size=together, **generation)
    numbers = range(0, len(every), 1 + twins)
    rows = {(n, key): run.read(m, *key).flatten(1).double() for n, m in enumerate(numbers) for key in run.keys}
    return run.tokens[:: 1 + twins], rows


def _apart(found: Any, alone: Any) -> list[Any]:
    """The largest relative distance of a row, and whether the tokens are the same. Rows of other tokens are no rows."""
    worst = 0.0
    for (number, key), expected in alone[1].items():
        same = next(
            (n for n, (a, b) in enumerate(zip(found[0][number], alone[0][number], strict=False)) if a != b), None
        )
        rows = found[1][number, key][:same]
        expected = expected[: len(rows)]
        apart = ((rows - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).max()
        worst = max(worst, float("inf") if apart.isnan() else float(apart))
    return [worst, list(map(list, found[0])) == list(map(list, alone[0]))]


def _look_less_far(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _look_less_far(value)
        elif name in WINDOWS and isinstance(value, int) and value > WINDOW:
            setattr(config, name, WINDOW)


def tell(found: list[dict[str, Any]]) -> None:
    ran = [each for each in found if "error" not in each]
    ways = ("generation", "harvest")
    captured = [(each["type"], way, each[way]) for each in ran for way in ways if "failed" not in each[way]]
    together = [sum(way == of and what["reason"] is None for _, of, what in captured) for way in ways]
    close = [each for each in captured if not _right(each[2]["got"]) and _rounded(each[2])]
    wrong = [each for each in captured if not _right(each[2]["got"]) and each not in close]
    print(
        f"{len(ran)} of {len(found)} classes ran. Prompts of unlike lengths share a batch on {together[0]} of them "
        f"while they generate, and on {together[1]} in a harvest; on the others they run apart:\n"
    )
    print("| model type | generation: pads before | harvest: pads behind |\n|---|---|---|")
    for each in ran:
        if any(each[way].get("reason") is not None or "failed" in each[way] for way in ways):
            print(f"| {each['type']} | {' | '.join(map(_said, (each[way] for way in ways)))} |")
    for name, way, what in close:
        by = (
            f"{what['float64'][0]:.0e} in float64"
            if "float64" in what
            else f"{what['twins'][0]:.1e} beside itself, unpadded"
        )
        print(f"\n{name}, {way}: rounding moves a row by {what['got'][0]:.1e} ({by}).")
    print(f"\nRows or tokens that batching changed beyond last bits ({LAST_BITS:g} of a row): {len(wrong)}")
    for name, way, what in wrong:
        print(f"- {name}, {way}: {what}")
    print()
    for each in found:
        if "error" in each:
            print(f"did not run: {each['type']}: {each['error']}")
        for way in ways:
            if "failed" in each.get(way, {}):
                print(f"not captured, {way}: {each['type']}: {each[way]['failed']}")


def _right(got: list[Any]) -> bool:
    return bool(got[0] <= LAST_BITS and got[1])


def _rounded(way: dict[str, Any]) -> bool:
    """Whether what was seen is rounding: it is gone in float64, or a like prompt beside it does as much."""
    if "float64" in way:
        return _right(way["float64"])
    return bool(way["got"][1] and way["got"][0] <= 8 * way["twins"][0])


def _said(way: dict[str, Any]) -> str:
    if "failed" in way:
        return "cannot be captured"
    if way["reason"] is None:
        return "together"
    if not _right(way["again"]):
        return "apart: two runs of one prompt differ"
    if isinstance(way["padded"], str):
        return f"apart: padded it fails ({way['padded']})"
    if way["reason"].startswith("its forward"):
        return f"apart: {way['reason'].removeprefix('its ')}"
    distance, same = way["padded"]
    if not distance:  # another rule keeps lengths apart as well
        return f"apart: {way['reason']}"
    return f"apart: pads would change rows by {distance:.0e}" + ("" if same else ", and tokens")


if __name__ == "__main__":
    main(sys.argv[1:])
