"""The tables of docs/comparison.md and docs/comparison-classes.md, from the ledger's lines."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from askers import POINTS, PROGRAMS
from judge import ERROR, SUPPORTED, UNAVAILABLE, UNJUDGED, WRONG

TITLES = {
    "hookmap": "hookmap", "transformer-lens": "TransformerLens", "nnterp": "nnterp", "interp-engine": "interp-engine",
    "torchlens": "TorchLens", "nnsight": "raw nnsight",
}  # fmt: skip
SHORT = {UNAVAILABLE: "unavailable", ERROR: "error", WRONG: "wrong", UNJUDGED: "not judged"}
HEAD = "<!-- Made by `python benchmarks/correctness.py --write`; do not edit. -->\n"
REASONS = 6
Lines = dict[str, dict[str, Any]]


def printed(lines: Lines, every: int) -> str:
    return "\n".join(f"{name}\n\n{text}" for name, text in {**tables(lines, every), "classes": by_class(lines)}.items())


def write(lines: Lines, every: int, docs: Path) -> None:
    """`every`: how many classes there are. Raises SystemExit where a page has no place for a table."""
    for page, found in (
        ("comparison.md", tables(lines, every)),
        ("comparison-classes.md", {"classes": by_class(lines)}),
    ):
        path = docs / page
        text = path.read_text(encoding="utf-8")
        for name, table in found.items():
            marks = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
            text, count = re.subn(
                marks, lambda m, made=table: m[1] + HEAD + "\n" + made + "\n" + m[2], text, flags=re.S
            )
            if count != 1:
                raise SystemExit(f"{path}: expected one table {name}, found {count}")
        path.write_text(text, encoding="utf-8")


def tables(lines: Lines, every: int) -> dict[str, str]:
    asked = {name: line for name, line in lines.items() if line["said"]}
    return {
        "asked": _asked(lines, asked, every),
        "points": _points(asked),
        "wrong": _wrong(asked),
        "refused": _refused(asked),
    }


def _asked(lines: Lines, asked: Lines, every: int) -> str:
    """What ran, in sentences."""
    images = sum(name.endswith("+image") for name in asked)
    recorded = sum(line["recorded"] for line in asked.values())
    versions: dict[str, Counter[str]] = defaultdict(Counter)
    for line in asked.values():
        for program, told in line["versions"].items():
            versions[program][told] += 1
    ran = "; ".join(f"{TITLES[name]} {versions[name].most_common(1)[0][0]}" for name in PROGRAMS if name in versions)
    counts = {name: sum(name in line["said"] for line in asked.values()) for name in PROGRAMS}
    fewer = [f"{TITLES[name]} {count}" for name, count in counts.items() if count < len(asked)]
    left = [f"`{name}`" for name, line in sorted(lines.items()) if "error" in line and not line["said"]]
    told = (
        f"{len(asked)} classes: {len(asked) - images} causal language models, {images} that read images, too. In "
        f"{recorded} of them the blocks that plain hooks find read what transformers records as `hidden_states`. "
        f"{ran}."
    )
    told += f" **Not a whole run: there are {every} classes.**" if len(lines) < every else ""
    told += f" Fewer were asked of some: {', '.join(fewer)}." if fewer else ""
    told += f" Left out, for no plain reference was made ({len(left)}): {', '.join(left)}." if left else ""
    return told + "\n"


def _points(asked: Lines) -> str:
    rows = []
    for point in POINTS:
        cells = []
        for program in PROGRAMS:
            states = Counter(line["said"][program][point][0] for line in asked.values() if program in line["said"])
            cells.append(_counted(states))
        rows.append([f"`{point}`", *cells])
    return _table(["point", *TITLES.values()], rows)


def _counted(states: Counter[str]) -> str:
    if not states:
        return "not asked"
    if set(states) == {UNAVAILABLE}:
        return "—"
    parts = [f"{states[state]} {short}" for state, short in SHORT.items() if states[state]]
    parts = [f"**{part}**" if part.endswith("wrong") else part for part in parts]
    return ", ".join([f"{states[SUPPORTED]} right", *parts])


def _wrong(asked: Lines) -> str:
    """Each program's wrong points, and of which classes."""
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for line in asked.values():
        for program, said in line["said"].items():
            for point, (state, note) in said.items():
                if state == WRONG:
                    found[program, point, re.sub(r"[\d.]+(e-\d+)?(?= from)", "far", note)].append(line["class"])
    order = list(PROGRAMS)
    rows = [
        [TITLES[program], f"`{point}`", note, f"{len(names)}: {_some(names)}"]
        for (program, point, note), names in sorted(found.items(), key=lambda each: (order.index(each[0][0]), each[0]))
    ]
    return _table(["program", "point", "what it gives", "classes"], rows) if rows else "None.\n"


def wrong_of(program: str, lines: Lines) -> list[str]:
    """CLASS POINT of each tensor that is not what the program says."""
    return [
        f"{line['class']} {point}"
        for line in lines.values()
        for point, (state, _) in line["said"].get(program, {}).items()
        if state == WRONG
    ]


def _refused(asked: Lines) -> str:
    """Why a program does not load a class, most frequent first."""
    rows = []
    for program in PROGRAMS:
        reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
        for line in asked.values():
            said = line["said"].get(program, {})
            if len({tuple(each) for each in said.values()}) == 1 and (one := next(iter(said.values())))[0] in (
                ERROR,
                UNAVAILABLE,
            ):
                reasons[one[0], _without_names(one[1])].append(line["class"])
        most = sorted(reasons.items(), key=lambda each: -len(each[1]))
        for (state, reason), names in most[:REASONS]:
            rows.append([TITLES[program], state, reason, f"{len(names)}: {_some(names)}"])
        if rest := most[REASONS:]:
            rows.append([TITLES[program], "", "others", str(sum(len(names) for _, names in rest))])
    return _table(["program", "state", "reason", "classes"], rows) if rows else "None.\n"


def _without_names(reason: str) -> str:
    """The reason, cut: what differs from class to class stands in quotes or in capitals in most messages."""
    reason = re.sub(r"/\S+", "…", reason)
    reason = re.sub(r"(?<!\w)'[^']*'|\"[^\"]*\"|`[^`]*`|\b\w*[a-z]\w*(For|LM|Model|Decoder)\w*\b", "…", reason)
    return reason[:160].replace("|", "\\|")


def by_class(lines: Lines) -> str:
    rows = []
    for _, line in sorted(lines.items()):
        if line["said"]:
            cells = [_of_class(line["said"].get(program)) for program in PROGRAMS]
            rows.append([f"{line['class']}", *cells])
    return _table(["class", *TITLES.values()], rows)


def _of_class(said: dict[str, tuple[str, str]] | None) -> str:
    if said is None:
        return "not asked"
    states = Counter(state for state, _ in said.values())
    if not states[SUPPORTED] and not states[WRONG]:
        return {ERROR: "does not run", UNAVAILABLE: "does not take it"}.get(next(iter(states)), "not judged")
    wrong = [f"`{point}`" for point, (state, _) in said.items() if state == WRONG]
    failed = [f"`{point}`" for point, (state, _) in said.items() if state == ERROR]
    told = f"{states[SUPPORTED]}"
    told += f", {states[UNJUDGED]} not judged" if states[UNJUDGED] else ""
    told += f"; error: {', '.join(failed)}" if failed else ""
    return told + (f"; **wrong: {', '.join(wrong)}**" if wrong else "")


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(sorted(names)[:most]) + (", …" if len(names) > most else "")


def _table(head: list[str], rows: list[list[str]]) -> str:
    def lines() -> Iterator[str]:
        for row in (head, ["---"] * len(head), *rows):
            yield "| " + " | ".join(row) + " |\n"

    return "".join(lines())
