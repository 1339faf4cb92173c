"""vLLM as the engine: maps of its own modules, rows of its steps, taps that survive compilation.

Nothing here imports vLLM before it is asked for; the extra `hookmap[vllm]` brings it.
"""
