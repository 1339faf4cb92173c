"""hookmap and others, asked for the same points of every class, and held against plain hooks.

    python benchmarks/correctness.py [TYPES] [--folder FOLDER] [--programs A,B] [--write]

Of each causal language model class of transformers, and of each that reads images, too, a narrow model with random
weights is made. hookmap, TransformerLens, nnterp, interp-engine, TorchLens and raw nnsight are asked for its points,
each in its own environment (`python scripts/setup.py --peer NAME`) and each model in a process of its own. What they
give is held against plain PyTorch hooks (asked/reference.py), which find the list of blocks, the branches and the heads
by numbers alone. FOLDER has a ledger, a line for each class that is done: a run goes on with it. `--write` writes the
tables of docs/comparison.md and docs/comparison-classes.md; the exit code is 1 where hookmap gives a wrong tensor.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from every_class import quietly, shallow

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent
sys.path += [str(HERE / "asked"), str(CHECKOUT / "tests")]

LAYERS, FEWEST = 8, 3
SECONDS = 400
TOGETHER = 12
"""classes whose checkpoints are on disk at once"""
IMAGE = "+image"
"""behind the name of a model type: the whole model, which reads images, too"""
OWN = ("hookmap", "nnsight")
"""run in this environment"""


def main() -> None:
    from askers import PROGRAMS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help=f"model types, those of images with {IMAGE}; all where none is given")
    parser.add_argument("--folder", type=Path, default=CHECKOUT / "correctness", help="the ledger, and what is asked")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="these alone; the others keep what they said")
    parser.add_argument("--write", action="store_true", help="write the tables of the pages")
    given = parser.parse_args()
    programs = given.programs.split(",")
    given.folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(given.folder / "ledger.jsonl")
    wanted = [name for name in given.types or every_type() if not ledger.has(name, programs)]
    for start in range(0, len(wanted), TOGETHER):
        some(wanted[start : start + TOGETHER], programs, given.folder, ledger)
    from tables import printed, write, wrong_of

    if given.write:
        write(ledger.lines, len(every_type()), CHECKOUT / "docs")
    else:
        print(printed(ledger.lines, len(every_type())))
    if own := wrong_of("hookmap", ledger.lines):
        raise SystemExit(f"hookmap gives another tensor than it says: {', '.join(own)}")


def every_type() -> list[str]:
    """One model type of each class: causal, then those that read images."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from hookmap.sweep.build import classes, speaks_for_its_class

    causal = [name for name in sorted(classes()) if speaks_for_its_class(name)]
    images = sorted(set(classes(True)) & set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
    return causal + [name + IMAGE for name in images if speaks_for_its_class(name, True)]


class Ledger:
    """A line for each class: what was said of it, by program. The last of a class counts, with what it does not ask."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        before = self.lines.get(line["type"], {})
        of_programs = {name: {**before.get(name, {}), **line.get(name, {})} for name in ("said", "versions")}
        self.lines[line["type"]] = {**line, **of_programs}

    def add(self, line: dict[str, Any]) -> None:
        self._take(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def has(self, name: str, programs: list[str]) -> bool:
        line = self.lines.get(name)
        return line is not None and ("error" in line or set(programs) <= set(line["said"]))


def some(types: list[str], programs: list[str], folder: Path, ledger: Ledger) -> None:
    """Makes, asks and judges these; their checkpoints are then removed."""
    checkpoints = folder / "checkpoints"
    if not checkpoints.exists():  # answers of a run that was stopped are of its weights
        forget(programs, folder)
    made = []
    for name, error in pooled(make, [(each, checkpoints / each) for each in types]):
        if error is None:
            made.append(name)
        else:
            ledger.add({"type": name, "said": {}, "error": error})
    for program in programs:
        ask(program, sorted(made), checkpoints, folder / program)
    for name, line in pooled(judge, [(each, folder, programs) for each in sorted(made)]):
        ledger.add({"type": name, **line})
    shutil.rmtree(checkpoints, ignore_errors=True)
    forget(programs, folder)


def forget(programs: list[str], folder: Path) -> None:
    """Removes what the programs answered."""
    for program in programs:
        shutil.rmtree(folder / program, ignore_errors=True)


def pooled(call: Any, tasks: list[Any]) -> Iterator[Any]:
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=TOGETHER) as pool:
        yield from pool.imap_unordered(call, tasks)


def make(task: tuple[str, Path]) -> tuple[str, str | None]:
    """A checkpoint of few layers and narrow width, and what is to be asked of it; or why there is none."""
    from askers import checkpoint, in_a_line
    from reference import Reference
    from support.tiny_tokenizer import tiny_tokenizer

    from hookmap.loading.modules import sequence_length
    from hookmap.loading.narrow import narrow
    from hookmap.sweep.configs import config_of
    from hookmap.verification.verify import redraw

    name, folder = task
    if (folder / "asked.json").exists():
        return name, None
    resource.setrlimit(resource.RLIMIT_AS, (10 * 2**30,) * 2)
    try:
        with quietly(SECONDS):
            model = built(narrow(config_of(name.removesuffix(IMAGE), name.endswith(IMAGE))))
            redraw(model)
            model.config.architectures = [type(model).__name__]
            model.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            tokens = drawn(model, max(10, sequence_length(model.config, model)))
            reference = Reference(checkpoint(folder), tokens)
            if not reference.layers:
                raise ValueError("plain hooks find no list of blocks, each of which runs once and hands the stream on")
            asked = {"tokens": tokens, "layers": list(reference.layers), "blocks": reference.list}
            (folder / "asked.json").write_text(json.dumps({**asked, "places": reference.places()}), encoding="utf-8")
    except Exception as error:  # a model's own code raises what it likes
        shutil.rmtree(folder, ignore_errors=True)
        return name, in_a_line(error)
    return name, None


def built(config: Any) -> Any:
    """At most LAYERS layers, and as few as hold one of each make, where the first layers alone are a model."""
    from reference import first_of_each_make

    from hookmap.loading.configs import build

    def of(layers: int) -> Any:
        return build(shallow(config, layers), "cpu", torch.float32)

    try:
        model = of(LAYERS)
    except Exception:
        return build(config, "cpu", torch.float32)
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    try:
        return of(
            max(FEWEST, *(n + 1 for blocks in lists if len(blocks) == LAYERS for n in first_of_each_make(blocks)))
        )
    except Exception:
        return model


def drawn(model: Any, length: int) -> list[int]:
    """Tokens, none of which the config gives a meaning of its own."""
    special = set(_special(model.config.to_dict()))
    ids = [n for n in range(20, min(model.config.get_text_config().vocab_size, 400)) if n not in special]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))[:length]
    return [ids[int(n)] for n in order]


def _special(settings: dict[str, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _special(value)
        elif str(name).endswith(("token_id", "token_index")):
            yield from value if isinstance(value, list) else [value]


def ask(program: str, types: list[str], checkpoints: Path, answers: Path) -> None:
    answers.mkdir(exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if program in OWN:
        python = Path(sys.executable)
    else:
        environment.pop("PYTHONPATH", None)
        python = interpreter(program)
        if not python.exists():
            raise SystemExit(f"{program} is not installed: python scripts/setup.py --peer {program}")
    command = [python, HERE / "asked" / "worker.py", program, checkpoints, answers, json.dumps(types)]
    subprocess.run(command, env=environment, check=True)


def interpreter(program: str) -> Path:
    """Of the environment that scripts/setup.py makes, or another that HOOKMAP_PEER_NAME names."""
    default = CHECKOUT / f".venv-peer-{program}" / "bin" / "python"
    return Path(os.environ.get(f"HOOKMAP_PEER_{program.upper().replace('-', '_')}", default))


def judge(task: tuple[str, Path, list[str]]) -> tuple[str, dict[str, Any]]:
    from askers import Said, checkpoint, in_a_line
    from judge import judged
    from reference import Reference

    name, folder, programs = task
    try:
        with quietly(SECONDS):
            at = folder / "checkpoints" / name
            tokens = json.loads((at / "asked.json").read_text(encoding="utf-8"))["tokens"]
            reference = Reference(checkpoint(at), tokens)
            said = {
                program: {
                    point: astuple(v) for point, v in judged(reference, Said.load(folder / program / name)).items()
                }
                for program in programs
            }
            versions = {
                program: json.loads((folder / program / "versions.json").read_text(encoding="utf-8"))
                for program in programs
            }
    except Exception as error:
        return name, {"said": {}, "error": in_a_line(error)}
    return name, {
        "class": type(reference.model).__name__,
        "recorded": reference.as_recorded,
        "versions": versions,
        "said": said,
    }


if __name__ == "__main__":
    main()
