"""What capturing, steering, harvesting, gradients, sweeps and dictionaries cost beside other libraries, in one run.

    python benchmarks/beside.py MODEL … [--qwen] --peer transformer_lens=PYTHON --peer nnterp=PYTHON \\
        --peer interp_engine=PYTHON --peer torchlens=PYTHON --peer sae_lens=PYTHON [--rounds 3] [--write]

MODEL is a folder; `--qwen` adds a full-size Qwen3-0.6B with random weights, made in a temporary folder. Each library
does its own best (benchmarks/ways) in a process of its own, a peer's with its environment's Python, float32,
one thread. A figure is the median over rounds of processor time over that of the model itself, without a library,
doing the same in the same process and round. What each library finds is held against plain hooks, to 10⁻³ of the
largest number: a figure of another answer is not shown. `--write` puts the tables into docs/benchmarks.md.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from machine import describe
from ways import LIBRARIES, PACKAGES, Work
from ways.by_hand import bare
from ways.work import dictionary_weights, plain

WAYS = {
    "capture": "`resid_post` of 3 layers while generating 16 tokens",
    "steering": "a vector added at one layer while generating 16 tokens",
    "harvest": "`resid_post` of all layers, 4 texts of 64 tokens, one pass",
    "gradients": "of a logit by `resid_post` of all layers, 32 tokens",
    "sweep": "`resid_pre` of 6 layers patched at each of 8 tokens",
    "sweep, its own": "the same by a function that the library has for it",
    "features": "4,608 of a dictionary at one layer, 4 texts of 64 tokens",
}
OVER = {
    "capture": "generate", "steering": "generate", "harvest": "forward", "gradients": "backward", "sweep": "passes",
    "sweep, its own": "passes", "features": "forward",
}  # fmt: skip
FEATURES = 4608
CLOSE = 1e-3
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- made by benchmarks/beside.py: do not edit -->\n", "<!-- end -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--qwen", action="store_true", help="a full-size Qwen3-0.6B with random weights, too")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--rounds", type=int, default=3, help="0: only hold the answers against plain hooks")
    parser.add_argument("--ways", default="/".join(OVER), help="these alone, with slashes between")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(*given.serve)
    own = dict.fromkeys(("plain hooks", "hookmap", "nnsight"), sys.executable)
    pythons = own | dict(each.split("=") for each in given.peer)
    with tempfile.TemporaryDirectory() as scratch:
        models = {Path(folder).name: folder for folder in given.models}
        if given.qwen:
            models["Qwen3-0.6B, random weights"] = qwen(Path(scratch) / "qwen")
        tables = [
            table(name, measured(folder, pythons, given.ways.split("/"), given.rounds, Path(scratch) / str(number)))
            for number, (name, folder) in enumerate(models.items())
        ]
    text = "\n".join(tables)
    print(text)
    if given.write:
        page = PAGE.read_text(encoding="utf-8")
        made = f"\n{describe()}\n\n{text}\n"
        PAGE.write_text(re.sub(f"(?<={re.escape(BEGIN)}).*(?={END})", lambda _: made, page, flags=re.DOTALL), "utf-8")


def qwen(folder: Path) -> str:
    """A checkpoint of Qwen3-0.6B's shape, with a tokenizer of numbered words: libraries want one."""
    from narrow import build
    from peer import tokenizer

    model = build("full")
    model.save_pretrained(folder)
    tokenizer(model.config.vocab_size).save_pretrained(folder)
    return str(folder)


def a_dictionary(folder: str, into: Path) -> Work:
    """What is asked of a model, with a dictionary of random directions, each active on some 1 % of its tokens."""
    from transformers import AutoConfig

    from hookmap.analysis.dictionaries.dictionary import About, Dictionary
    from hookmap.analysis.dictionaries.saving import save_dictionary

    work = Work(folder, AutoConfig.from_pretrained(folder).num_hidden_layers, str(into / "dictionary"))
    model = plain(folder)
    with torch.no_grad():
        rows = model.model(work.batch, use_cache=False, output_hidden_states=True).hidden_states[work.at + 1]
    width = rows.shape[-1]
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(FEATURES, width), dim=1)
    bias = -torch.quantile(rows.reshape(-1, width) @ vectors.T, 0.99, dim=0)
    save_dictionary(
        Dictionary(vectors.T.contiguous(), vectors, bias, torch.zeros(width), about=About("resid_post", work.at)),
        work.dictionary,
    )
    assert {"W_enc", "b_enc"} <= dictionary_weights(work).keys()
    return work


def measured(
    folder: str, pythons: dict[str, str], ways: list[str], rounds: int, into: Path
) -> dict[str, tuple[str, dict[str, str]]]:
    """Library -> its version, and its figure by way."""
    into.mkdir()
    work = a_dictionary(folder, into)
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for name, python in pythons.items():  # one after the other: two copies of the model each
        library = None
        try:
            library = Library(name, python, work, into)
            said = figures(library, ways, rounds, into)
        except RuntimeError as error:
            said = dict.fromkeys(ways, f"error: {error}")
        found[name] = (library.version if library else "", said)
        print(f"{Path(folder).name} {name}: {said}", file=sys.stderr, flush=True)
    return found


def figures(library: "Library", ways: list[str], rounds: int, into: Path) -> dict[str, str]:
    """Way -> its figure, or the state that stands in its place."""
    ratios: dict[str, list[float]] = {}
    states: dict[str, str] = {}
    for number in range(rounds + 1):  # the first warms up, and its answers are looked at
        needed = dict.fromkeys(OVER[way] for way in ways) if rounds else ()
        bases = {base: library.seconds(base) for base in needed}
        for way in (one for one in ways if one not in states):
            took = library.seconds(way)
            if isinstance(took, str):
                states[way] = took
            elif number == 0 and (why := differs(into, library.name, way)):
                states[way] = why
            elif number:
                ratios.setdefault(way, []).append(took / float(bases[OVER[way]]))
    library.end()
    return {
        way: states.get(way) or (f"{statistics.median(ratios[way]):.2f}" if way in ratios else "right") for way in ways
    }


def differs(into: Path, name: str, way: str) -> str:
    """Why an answer is not that of plain hooks; nothing where it is."""
    expected, got = (
        torch.load(into / f"{who} {one}.pt").float()
        for who, one in (("plain hooks", way.partition(",")[0]), (name, way))
    )
    if expected.shape != got.shape:
        return f"another answer: {list(got.shape)}, expected {list(expected.shape)}"
    far = float((expected - got).abs().max() / expected.abs().max())
    return "" if far <= CLOSE else f"another answer: {far:.1e} of the largest number"


def table(name: str, found: dict[str, tuple[str, dict[str, str]]]) -> str:
    heads = [
        one if one == "plain hooks" else f"{PACKAGES[one]} {version}".strip() for one, (version, _) in found.items()
    ]
    ways = list(next(iter(found.values()))[1])
    rows = [
        f"| {way}: {WAYS[way]} | {OVER[way]} | " + " | ".join(figures[way] for _, figures in found.values()) + " |"
        for way in ways
    ]
    return "\n".join(
        [f"{name}:", "", f"| | over | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads), *rows, ""]
    )


def serve(name: str, folder: str, dictionary: str, into: str) -> None:
    """Runs the ways that it reads, one a line, and answers with the seconds of each, or with why there are none."""
    from transformers import AutoConfig

    torch.set_num_threads(1)
    work = Work(folder, AutoConfig.from_pretrained(folder).num_hidden_layers, dictionary)
    ways, alone = LIBRARIES[name](work), bare(work, plain(folder))
    print("ready", sys.modules["hookmap"].__version__ if name == "hookmap" else version(PACKAGES[name]), flush=True)
    for line in sys.stdin:
        way = line.strip()
        begun = time.process_time()
        try:
            if way in alone:
                alone[way]()
                print(f"took {time.process_time() - begun}", flush=True)
                continue
            if way not in ways:
                print("state –", flush=True)
                continue
            answer = ways[way]()
            took = time.process_time() - begun
            file = Path(into) / f"{name} {way}.pt"
            if not file.exists():
                torch.save(answer().detach().clone(), file)
            print(f"took {took}", flush=True)
        except Exception as error:
            print(f"{name} {way}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            print("state error:", type(error).__name__, flush=True)


class Library:
    """A library's process."""

    def __init__(self, name: str, python: str, work: Work, into: Path) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, __file__, "--serve", name, work.folder, work.dictionary, str(into)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version = self._answer("ready").split()[1]

    def seconds(self, way: str) -> float | str:
        """Of processor time; or what stands in place of a figure."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{way}\n")
        self._process.stdin.flush()
        word, _, rest = self._answer("took", "state").strip().partition(" ")
        return float(rest) if word == "took" else rest

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self, *words: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # a library may print words of its own first
            if line.startswith(words):
                return line
        raise RuntimeError(f"{self.name} has ended")


if __name__ == "__main__":
    main()
