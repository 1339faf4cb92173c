"""What examples are looked for of: features of a point, directions in its space, norms of heads."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hookmap.activations import Key
from hookmap.analysis.dictionaries.dictionary import Dictionary
from hookmap.errors import SelectionError
from hookmap.stores.ledger import tensor_name

NEURONS, NORMS, DIRECTIONS, DICTIONARY = "neurons", "norms", "directions", "dictionary"


def refuse_featureless(points: Iterable[str]) -> None:
    """Raises SelectionError that names these points, whose rows have no features; nothing where there are none."""
    if named := ", ".join(dict.fromkeys(points)):
        raise SelectionError(
            f"{named}: its rows hold numbers of experts or a weight for each token, and no features. "
            "Choose a point such as mlp_post or resid_post, or choices=True (--choices) for what routers choose."
        )


@dataclass(frozen=True)
class Features:
    """How the features of a row are computed. Made by `features_of`."""

    kind: str = NEURONS
    """NEURONS: the row's own numbers; NORMS: L2 norms over the last axis; DIRECTIONS: products; DICTIONARY: its own"""
    numbers: tuple[int, ...] | None = None
    """which of them; None for all"""
    directions: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """float32 [d]; by name"""
    dictionary: Dictionary | None = None

    def of(self, rows: torch.Tensor, key: Key) -> torch.Tensor:
        """[n, *row] -> [n, features], float32 or the rows' own dtype; sparse where the rows are.

        Raises SelectionError where they do not fit.
        """
        if rows.is_sparse and self.kind != NEURONS:
            raise SelectionError(f"{tensor_name(key)} is sparse: its examples are of its own features.")
        if self.kind == DIRECTIONS:
            flat = rows.flatten(1).float()
            matrix = torch.stack(list(self.directions.values()), 1).to(flat.device)
            if matrix.shape[0] != flat.shape[1]:
                raise SelectionError(
                    f"directions: expected vectors of {flat.shape[1]} numbers, the width of {tensor_name(key)}, got "
                    f"{matrix.shape[0]}."
                )
            return torch.matmul(flat, matrix)
        if self.kind == NORMS:
            found: torch.Tensor = torch.linalg.vector_norm(rows.float(), dim=-1)
            found = found[:, None] if found.ndim == 1 else found.flatten(1)
        elif self.dictionary is not None:
            found = self.dictionary.to(rows.device).encode(rows.flatten(1))
        else:
            found = rows if rows.is_sparse else rows.flatten(1)
        if self.numbers is None:
            return found
        if beyond := [number for number in self.numbers if number >= found.shape[1]]:
            raise SelectionError(
                f"features {beyond[:5]} are not in {tensor_name(key)}: it has 0 to {found.shape[1] - 1}."
            )
        return found.index_select(1, torch.tensor(self.numbers, device=found.device))

    def names(self, count: int) -> list[str]:
        """What each feature is called: its number, or the direction's name."""
        if self.kind == DIRECTIONS:
            return list(self.directions)
        return [str(number) for number in (range(count) if self.numbers is None else self.numbers)]

    def as_json(self) -> dict[str, Any]:
        found = {"kind": self.kind, "numbers": None if self.numbers is None else list(self.numbers)}
        return found if self.dictionary is None else {**found, "dictionary": self.dictionary.digest}


def features_of(
    features: Any = None, norms: bool = False, directions: Any = None, dictionary: Dictionary | None = None
) -> Features:
    """Read what a user gives. Raises SelectionError with every problem at once."""
    problems = []
    numbers: tuple[int, ...] | None = None
    if features is not None and not (isinstance(features, str) and features == "all"):
        given = [features] if isinstance(features, int) else features
        whole = isinstance(given, Sequence | range) and not isinstance(given, str)
        if not whole or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in given):
            problems.append(f'features: expected "all" or numbers from 0 on, got {features!r:.80}.')
        elif len({*given}) < len(given) or not given:
            problems.append(f"features: expected different numbers, each once, got {features!r:.80}.")
        else:
            numbers = tuple(given)
    vectors: dict[str, torch.Tensor] = {}
    if directions is not None:
        each = dict(directions) if isinstance(directions, Mapping) else {"direction": directions}
        vectors = {str(name): torch.as_tensor(value).detach().float().cpu() for name, value in each.items()}
        bad = [name for name, value in vectors.items() if value.ndim != 1 or not bool(value.isfinite().all())]
        if bad or not vectors or len({len(value) for value in vectors.values() if value.ndim == 1}) > 1:
            problems.append(f"directions {', '.join(bad)}: expected vectors [d] of finite numbers, all of one width.")
        if norms or numbers is not None:
            problems.append("directions are features of their own: leave features and norms out.")
    if dictionary is not None and (norms or vectors):
        problems.append("a dictionary has features of its own: leave norms and directions out.")
    if problems:
        raise SelectionError("\n".join(problems))
    if dictionary is not None:
        return Features(DICTIONARY, numbers, dictionary=dictionary)
    return Features(DIRECTIONS if vectors else NORMS if norms else NEURONS, numbers, vectors)
