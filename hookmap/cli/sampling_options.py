"""The options that say how tokens are sampled."""

from typing import Any

import click

from hookmap.cli.options import FiniteRange, amount, count, option_group
from hookmap.cli.settings import typed_or_set

_SAMPLES = ("temperature", "top_p", "top_k")

sampling_options = option_group(
    amount("--temperature", "T", "Sample at this temperature; greedy if not given, or 0.", least=0),
    click.option(
        "--top-p",
        type=FiniteRange(0, 1, min_open=True),
        metavar="P",
        help="Sample from the likeliest tokens of this mass.",
    ),
    count(
        "--top-k",
        "Sample from this many likeliest tokens; 0: all.  [default: the model's own, else 50]",
        least=0,
        unit="K",
    ),
    click.option("--seed", type=int, metavar="N", help="Makes sampling repeatable."),
)


def sampling(given: dict[str, Any], settings: dict[str, Any], generates: bool) -> dict[str, Any]:
    """What the options or the settings say, as `HookedModel.capture` takes it. `given` loses the options.

    Where nothing is generated, the settings do not count, and options are wrong usage. Raises click.UsageError.
    """
    typed = typed_or_set(given, {}, *_SAMPLES, "seed")
    if not generates and typed and typed != {"temperature": 0}:
        raise click.UsageError(
            "--max-new-tokens 0 generates nothing: leave --temperature, --top-p, --top-k and --seed out"
        )
    found = {name: settings[name] for name in (*_SAMPLES, "seed") if name in settings} | typed if generates else typed
    if found.get("temperature") == 0:  # greedy, as every server understands it
        rivals = typed if typed.get("temperature") == 0 else found
        if "top_p" in rivals or "top_k" in rivals:
            raise click.UsageError("--temperature 0 is greedy: leave --top-p and --top-k out")
        found = {name: value for name, value in found.items() if name not in _SAMPLES}
    return {"do_sample": any(name in found for name in _SAMPLES), **found}
