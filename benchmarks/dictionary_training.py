"""Rows per second of training a dictionary, beside SAELens's trainer.

    python benchmarks/dictionary_training.py MODEL [--layer 15] [--rows 20000] [--threads N]

The trainers learn the same rows, of the same sizes, one after the other in turn; the median of the rounds is told.
SAELens's runs where it is installed (pip install sae-lens).
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from machine import describe

import hookmap
from hookmap.analysis.dictionaries.trainer import Learning, Trainer


def ours(rows: torch.Tensor, features: int, k: int, batch: int) -> float:
    trainer = Trainer(Learning("topk", features, k, len(rows), batch, 3e-4, 10**6, 0), rows[:batch])
    begun = time.perf_counter()
    trainer.learn(rows)
    return len(rows) / (time.perf_counter() - begun)


def theirs(rows: torch.Tensor, features: int, k: int, batch: int) -> float:
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    class Batches:
        def __init__(self) -> None:
            self.left: Iterator[torch.Tensor] = iter(rows.split(batch))

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> torch.Tensor:
            return next(self.left)

    config = sae_lens.TopKTrainingSAEConfig(d_in=rows.shape[1], d_sae=features, k=k)
    total = len(rows) // batch * batch
    asked = SAETrainerConfig(total, batch, lr_end=3e-5, logger=LoggingConfig(log_to_wandb=False))
    trainer: Any = SAETrainer(asked, sae_lens.TopKTrainingSAE(config), Batches())
    begun = time.perf_counter()
    trainer.fit()
    return total / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    hm = hookmap.open(given.model)
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    texts = [part for page in pages for part in page.read_text().split("\n\n") if len(part) > 200]
    print(describe())
    sizes = (given.features, given.k, given.batch)
    found: list[torch.Tensor] = []
    for text in texts:  # as many texts as give so many rows
        found.append(
            hm.capture([text], "resid_post", given.layer, 0).rows("resid_post", given.layer).values[1:].float()
        )
        if sum(map(len, found)) >= given.rows:
            break
    rows = torch.cat(found)[: given.rows]
    trainers: dict[str, Any] = {"hookmap": ours}
    try:
        import sae_lens

        trainers[f"SAELens {sae_lens.__version__}"] = theirs
    except ImportError:
        print("SAELens is not installed here")
    speeds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(given.rounds):
        for name, train in trainers.items():
            speeds[name].append(train(rows, *sizes))
    print(f"{len(rows)} rows of {rows.shape[1]}, {given.features} features, k {given.k}, batches of {given.batch}:")
    for name, each in speeds.items():
        print(f"  {name}: {statistics.median(each):.0f} rows/s")


if __name__ == "__main__":
    main()
