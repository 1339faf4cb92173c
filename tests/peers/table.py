"""Prints the table of docs/comparison.md: python tests/peers/table.py, where `make test-peers` has made the peers."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import questions as q
from hookmaps_answers import hookmaps_answers
from programs import PEERS, Peer, apart, like
from support import plain_hooks
from support.plain_hooks import FAMILIES
from support.tiny_tokenizer import tiny_tokenizer


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder) / "checkpoints"
        for name in FAMILIES:
            plain_hooks.build(name).save_pretrained(checkpoints / name)
            tiny_tokenizer().save_pretrained(checkpoints / name)
        for peer in PEERS.values():
            (Path(folder) / peer.name).mkdir()
            peer.ask(checkpoints, Path(folder) / peer.name)
        print("| family | " + " | ".join(PEERS) + " |\n|---|" + "---|" * len(PEERS))
        for name in FAMILIES:
            own = hookmaps_answers(checkpoints / name)
            cells = [cell(peer, name, own, q.Answers.load(Path(folder) / peer.name / name)) for peer in PEERS.values()]
            print(f"| {name} | " + " | ".join(cells) + " |")


def cell(peer: Peer, name: str, own: q.Answers, other: q.Answers) -> str:
    if "load" in other.refused:
        return "does not load"
    gaps = {question: apart(tensor, like(own.tensors[question], question, tensor))
            for question, tensor in other.tensors.items() if question in own.tensors}  # fmt: skip
    differ = [question for question in gaps if peer.differs_on(name, question)]
    same = [gap for question, gap in gaps.items() if question not in differ]
    said = f"{len(same)} agree, {same.count(0.0)} of them to the bit"
    return f"{said}; not {', '.join(shortened(differ))}" if differ else said


def shortened(questions: list[str]) -> Iterator[str]:
    """`read mlp_out 0`, `read mlp_out 1`, … as one."""
    yield from dict.fromkeys(f"`{question.rstrip(' 0123456789')}`" for question in questions)


if __name__ == "__main__":
    main()
