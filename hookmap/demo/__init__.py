"""The bundled demo model: a tiny Qwen3 that answers one- and two-step word problems."""

from pathlib import Path

from hookmap.demo.problems import Problem, sample_problems

__all__ = ["DICTIONARY_PATH", "MODEL_PATH", "Problem", "sample_problems"]

#: Folder of the bundled model, loadable with ``AutoModelForCausalLM`` and ``AutoTokenizer``.
MODEL_PATH: Path = Path(__file__).resolve().parent / "model"

#: Folder of a dictionary of its `resid_post`, layer 8: 256 features, 12 of them active; for ``load_dictionary``.
DICTIONARY_PATH: Path = Path(__file__).resolve().parent / "dictionary"
