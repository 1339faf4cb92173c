"""Prompts out of data sets: with the caller's ids and labels, from files, tables and Hugging Face's hub."""

from hookmap.datasets.records import PromptRecord, load_prompts

__all__ = ["PromptRecord", "load_prompts"]
