"""The bundled demo model: a tiny Qwen3 that answers one- and two-step word problems."""

from pathlib import Path

from hookmap.demo.problems import Problem, sample_problems

__all__ = ["DICTIONARY_PATH", "MODEL_PATH", "Problem", "bundled", "sample_problems"]

#: Folder of the bundled model, loadable with ``AutoModelForCausalLM`` and ``AutoTokenizer``.
MODEL_PATH: Path = Path(__file__).resolve().parent / "model"

#: Folder of a dictionary of its `resid_post`, layer 8: 256 features, 12 of them active; for ``load_dictionary``.
DICTIONARY_PATH: Path = Path(__file__).resolve().parent / "dictionary"


def bundled(source: str | Path) -> str | Path:
    """The bundled model where `source` is `hookmap/demo/model`, as in a checkout, and no such folder is here.

    Any other source comes back as it is. No hub id has three parts, so the name means nothing else.
    """
    return str(MODEL_PATH) if Path(source) == Path("hookmap/demo/model") and not Path(source).exists() else source
