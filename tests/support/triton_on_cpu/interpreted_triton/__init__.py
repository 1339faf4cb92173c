"""A backend of Triton named `cpu` that compiles nothing: with TRITON_INTERPRET=1, Triton's interpreter runs kernels.

vLLM's V2 model runner wants Triton, and on a CPU a Triton with a backend of this name, which no published wheel has.
With this folder in PYTHONPATH vLLM finds one, and runs its runner, its kernels and its CPU worker unchanged; nothing
of vLLM is replaced here. What a kernel's compiled code would do wrong is not seen: the interpreter runs its source.
"""
