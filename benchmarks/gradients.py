"""Gradients against autograd by hand, on every class.

    python benchmarks/gradients.py [TYPES] [--ledger FILE] [--page FILE]

A narrow copy of each causal language model class of transformers, in float64 and of few layers, is opened. Three
texts of unlike lengths run in one batch, and the gradient of a logit difference is taken at every point of each kind of
block, and of the model. By hand: each text alone, zeros added to each point by a plain hook, and their gradient; or
that of the tensor itself, where the model's code has read it before the hook.

The ledger has a line for each class that is done; a run goes on with it. `--page` writes the table of all.
"""

import inspect
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from every_class import compared, quietly, shallow
from torch.utils._python_dispatch import TorchDispatchMode

SECONDS = 900
TEXTS = [[5, 9, 3], [4, 20, 11, 7, 30, 8, 2, 90, 41], [17, 3, 60, 22, 9, 6]]
RIGHT, WRONG = 5, 9
LARGEST = 1e-5
ROUNDED = 1e-4
"""less than this may be float32's rounding, where the model casts to it"""
NOTHING = 1e-14
"""of the largest gradient of a text: rounding of 0, as that of a router that chooses one expert and norms its weight"""
_NO_TENSOR = "the model holds no such tensor"
LAYERS = 8
"""the most layers of a copy, where its config allows it"""


def main(given: list[str]) -> None:
    ledger, page = (_path(given, name) for name in ("--ledger", "--page"))
    types = [name for name in given if not name.startswith("-")]
    told = "".join(f"{line}\n" for line in tell(compared(compare, types, ledger)))
    if page is None:
        print(told)
    else:
        page.write_text(told, encoding="utf-8")


def _path(given: list[str], name: str) -> Path | None:
    if name not in given:
        return None
    value = Path(given.pop(given.index(name) + 1))
    given.remove(name)
    return value


def compare(model_type: str) -> dict[str, Any]:
    """One class, in a process of the pool."""
    from hookmap.loading.narrow import narrow
    from hookmap.sweep.configs import config_of

    try:
        with quietly(SECONDS):
            config = narrow(config_of(model_type))
            fewer = shallow(config, LAYERS)
            try:
                return {"type": model_type, **_of(_opened(fewer))}
            except Exception:
                if fewer is config:
                    raise
                return {"type": model_type, **_of(_opened(config))}  # the first layers alone are no model
    except Exception as error:  # a model's own code raises what it likes
        said = textwrap.shorten(str(error), 200, placeholder=" …")
        return {"type": model_type, "error": f"{type(error).__name__}: {said}"}


def _opened(config: Any) -> Any:
    import hookmap
    from hookmap.loading.configs import build
    from hookmap.verification.verify import redraw

    model = build(config, "cpu", torch.float32)
    redraw(model)
    hm = hookmap.open(model)
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._experts_implementation = "eager"  # the others have no float64
    model.double()
    return hm


def _of(hm: Any) -> dict[str, Any]:
    from hookmap.maps.points import PointName

    numbers = ("router_indices",)
    points = {}
    for kind in hm.map.kinds:
        for name in kind.points:
            if not name.startswith("pattern") and PointName.of(name).base not in numbers:
                points.setdefault(name, set()).update({kind.layers[0], kind.layers[-1]})
    wanted = {name: sorted(layers) for name, layers in points.items()}
    wanted |= dict.fromkeys(hm.map.model_points, "all")
    selectors = [each for each in hm.map.selectors(wanted) if _at_a_module(each)]
    refused: dict[str, str] = {}
    held, worst = Counter[str](), 0.0
    expected = [_by_hand(hm, selectors, ids) for ids in TEXTS]
    largest = [max(float(own.norm()) for own in each.values()) for each in expected]
    for group in _that_have_one(hm, selectors, refused):
        found = hm.gradients(TEXTS, _difference, _wanted(group), calls=_calls(group))
        for selector in group:
            for number in range(len(TEXTS)):
                own = expected[number].get(selector.key)
                if own is None or float(own.norm()) <= NOTHING * largest[number]:
                    held[f"{selector.point}: {'zero' if own is not None else 'not held'}"] += 1
                    continue
                rows = found.read(number, *selector.key).double()
                if not bool(own.isfinite().all()) and torch.equal(own.isfinite(), rows.isfinite()):
                    refused[selector.point] = "it is not finite, by hand and here, at the same places"
                    continue
                error = float((rows - own).norm() / own.norm().clamp_min(1e-300))
                if not error <= LARGEST:
                    rounded = error < ROUNDED and _narrows(hm)
                    why = ", by rounding: the model computes in float32 by itself" if rounded else ""
                    return {"wrong": f"{selector}, text {number}: {error:.1e}{why}"}
                worst = max(worst, error)
            held[selector.point] += all(selector.key in own for own in expected)
    return {"points": len(selectors), "held": dict(held), "refused": refused, "worst": worst}


def _at_a_module(selector: Any) -> bool:
    """Whether a plain hook of a module shows the tensor, with a row for each token."""
    return not selector.has_keys and not any(term.is_inside for term in selector.terms)


def _narrows(hm: Any) -> bool:
    """Whether the model converts float64 to float32 in its own forward."""
    seen: list[bool] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype == torch.float32:
                seen.append(any(isinstance(each, torch.Tensor) and each.dtype == torch.float64 for each in args))
            return found

    with Watch(), torch.no_grad():
        hm.model(torch.tensor([TEXTS[0]]), use_cache=False)
    return any(seen)


def _that_have_one(hm: Any, selectors: Sequence[Any], refused: dict[str, str]) -> list[list[Any]]:
    """The points that have a gradient, in groups of one call; `refused` gets the reasons of the others."""
    from hookmap.errors import HookmapError

    groups = []
    for call in dict.fromkeys(each.call or 0 for each in selectors):
        own = [each for each in selectors if (each.call or 0) == call]
        parts = {name: [each for each in own if each.point == name] for name in dict.fromkeys(e.point for e in own)}
        good = []
        for name, chosen in {None: own, **parts}.items():
            try:
                hm.gradients([TEXTS[0]], _difference, _wanted(chosen), calls=_calls(chosen))
                good += chosen
                if name is None:
                    break
            except HookmapError as error:
                if name is not None:
                    said = textwrap.shorten(str(error), 200, placeholder=" …")
                    refused[name + (f" (call {call})" if call or chosen[0].call is not None else "")] = said
        if good:
            groups.append(good)
    return groups


def _wanted(selectors: Sequence[Any]) -> dict[str, Any]:
    """These points and layers, as a selection."""
    found: dict[str, Any] = {}
    for each in selectors:
        if each.layer is None:
            found[each.point] = "all"
        else:
            found.setdefault(each.point, []).append(each.layer)
    return found


def _calls(selectors: Sequence[Any]) -> Any:
    return [next((each.call for each in selectors if each.call is not None), 0)]


def _difference(logits: torch.Tensor, at: Any) -> torch.Tensor:
    return logits[-1, RIGHT] - logits[-1, WRONG]


def _by_hand(hm: Any, selectors: Sequence[Any], ids: list[int]) -> dict[Any, torch.Tensor]:
    """The gradient of zeros added to each point, for one text alone: key -> [pos, ...]."""
    from hookmap.capture.interventions.writable import mode_of, passed_on

    zeros: dict[Any, tuple[Any, torch.Tensor, torch.Tensor, bool]] = {}
    calls = Counter[Any]()

    def add(selector: Any, term: Any, args: Any, kwargs: Any, output: Any) -> Any:
        call = calls[selector.key, term]
        calls[selector.key, term] += 1
        if term.call not in (None, call):
            return None
        given = (args, kwargs, output)
        tensor = replace(term, heads=None).resolve(*given)
        own = torch.zeros_like(tensor, requires_grad=True)
        zeros[selector.key] = (term, own, tensor, len(selector.terms) > 1)
        if mode_of(selector) == "in place" or (len(selector.terms) > 1 and term.side == "input"):
            tensor += own
            return None
        return passed_on(term, given, tensor + own)

    def on_input(do: Any, _: Any, args: Any, kwargs: Any) -> Any:
        passed = do(args, kwargs, None)
        return None if passed is None else passed[:2]

    def on_output(do: Any, _: Any, args: Any, output: Any) -> Any:
        passed = do((), {}, output)
        return None if passed is None else passed[2]

    first: dict[Any, Any] = {}
    handles = []
    for selector in selectors:
        if len(selector.terms) > 1 and first.setdefault(selector.terms, selector) is not selector:
            continue  # attn_out is mixer_out
        for term in selector.terms:
            module = hm.root if not term.module else hm.model.get_submodule(term.module)
            do = partial(add, selector, term)
            if term.side == "input":
                handles.append(module.register_forward_pre_hook(partial(on_input, do), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(partial(on_output, do)))
    wanted = [parameter for parameter in hm.model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        given = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "use_cache": False,
        }
        takes = inspect.signature(hm.root.forward).parameters
        further = any(each.kind is each.VAR_KEYWORD for each in takes.values())
        logits = hm.model(**{name: value for name, value in given.items() if further or name in takes}).logits
    finally:
        for handle in handles:
            handle.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)
    metric = _difference(logits[0], None)
    found = torch.autograd.grad(metric, [own for _, own, *_ in zeros.values()], allow_unused=True, retain_graph=True)
    expected = {}
    for (key, (term, _, tensor, summed)), gradient in zip(zeros.items(), found, strict=True):
        read_before = (
            gradient is None or summed
        )  # a sum's last term may be a tensor that a module has read, and hands on
        if read_before and tensor.requires_grad:
            (gradient,) = torch.autograd.grad(metric, tensor, allow_unused=True, retain_graph=True)
        if gradient is not None:
            split = replace(term, side="output", index=None).resolve((), {}, gradient)
            expected[key] = term.arrange(split, 1, len(ids))[0] / term.scale
    same = {selector.key: first.get(selector.terms, selector).key for selector in selectors}
    return {key: expected[place] for key, place in same.items() if place in expected}


def tell(found: list[dict[str, Any]]) -> list[str]:
    """The page."""
    import transformers

    ran = [each for each in found if "held" in each]
    wrong = [each for each in found if "wrong" in each]
    worst = max((each["worst"] for each in ran), default=0.0)
    points = sum(count for each in ran for name, count in each["held"].items() if ":" not in name)
    nowhere = {point for each in ran for point, why in each["refused"].items() if _NO_TENSOR in why}
    named = sorted({f"`{point.partition(' ')[0]}`" for point in nowhere})
    unheld = Counter(name for each in ran for name in each["held"] if name.endswith(": not held"))
    made = "Made by `python benchmarks/gradients.py --page docs/gradients-table.md` with transformers"
    lines = [
        "# Gradients of every architecture",
        "",
        f"{made} {transformers.__version__}; do not edit it. A narrow copy of",
        "each class, in float64 and of few layers, takes the gradient of a logit difference at every point of",
        "each kind of block, in a padded batch. By hand: each text alone, zeros added to the point by a plain hook,",
        "and their gradient; or that of the tensor itself, where the model has read it before the hook. Whole numbers,",
        "attention weights and what no module's boundary shows are left out.",
        "",
        f"{len(ran)} of {len(found)} classes ran; {points} tensors were held, and the largest relative error is",
        f"{worst:.0e}. {len(wrong)} classes differ by more than {LARGEST:g}.",
        "",
        f"No model has a gradient of {', '.join(named)}: it holds no such tensor."
        + "".join(f" By hand `{name.partition(':')[0]}` has none in {n} classes." for name, n in unheld.items()),
        "",
        "| model type | no gradient, and why |",
        "|---|---|",
    ]
    for each in ran:
        refused = {point: why for point, why in each["refused"].items() if point not in nowhere}
        if refused:
            told = "; ".join(f"`{point}`: {why.partition('. ')[0]}" for point, why in refused.items())
            lines.append(f"| {each['type']} | {told} |")
    lines += [f"| {each['type']} | differs: {each['wrong']} |" for each in wrong]
    lines += [f"| {each['type']} | did not run: {each['error']} |" for each in found if "error" in each]
    left = sorted(_types() - {each["type"] for each in found})
    if left:
        lines += ["", f"Not held yet, {len(left)} classes: {', '.join(left)}."]
    return lines


def _types() -> set[str]:
    """Of every causal language model class."""
    from hookmap.sweep.build import classes

    return {*{architecture: name for name, architecture in classes().items()}.values()}  # one of each class


if __name__ == "__main__":
    main(sys.argv[1:])
