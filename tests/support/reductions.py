"""A run of statistics that a test kills, and goes on with."""

from typing import Any

TEXTS = [[n + 1, n + 2, n + 3, 2 * n + 1] for n in range(12)]
WISH: dict[str, Any] = {
    "points": "resid_post",
    "layers": [1],
    "reductions": ["mean", "kurtosis", "covariance"],
    "batch_size": 2,
    "by": ["sink", "token"],
}
