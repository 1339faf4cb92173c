"""What Triton asks of a backend's compiler: it is never called."""

from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget


class NoCompiler(BaseBackend):
    """Every kernel is interpreted."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict[str, Any]) -> Any:
        raise NotImplementedError("kernels are interpreted: TRITON_INTERPRET=1")

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any) -> None:
        raise NotImplementedError("kernels are interpreted: TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        raise NotImplementedError("kernels are interpreted: TRITON_INTERPRET=1")

    def get_module_map(self) -> dict[str, Any]:
        raise NotImplementedError("kernels are interpreted: TRITON_INTERPRET=1")
