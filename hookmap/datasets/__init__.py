"""Prompts out of data sets: with the caller's ids and labels, from files, tables and Hugging Face's hub."""

from hookmap.datasets.pairs import Pair, load_pairs, save_pairs
from hookmap.datasets.records import PromptRecord, load_prompts

__all__ = ["Pair", "PromptRecord", "load_pairs", "load_prompts", "save_pairs"]
