"""The engines that are compared: where each lives, and what its process needs."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
DEFAULT_INTO = HERE / ".envs"
OURS = "ours"
BEFORE = "before"


@dataclass(frozen=True)
class Peer:
    """An engine: the module of its adapter, and the variables that its process needs, given its environment."""

    name: str
    title: str
    adapter: str
    variables: Callable[[Path], dict[str, str]] = lambda environment: {}
    repository: Path = REPOSITORY  # whose code, and whose adapters, the process imports

    def python(self, into: Path) -> Path:
        """The interpreter of the engine's environment; ours, of any commit, runs in that of the caller."""
        return Path(sys.executable) if self.name in (OURS, BEFORE) else into / self.name / "bin" / "python"

    def process_variables(self, into: Path, threads: int) -> dict[str, str]:
        """The whole environment of the engine's process: ours, the same threads for all, no hub."""
        return (
            {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            | {"PYTHONPATH": str(self.repository), "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
            | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            | self.variables(into / self.name)
        )


def llama_cpp_libraries(environment: Path) -> Path:
    return environment / "llama.cpp" / "bin"


def _llama_cpp_variables(environment: Path) -> dict[str, str]:
    return {"LLAMA_CPP_LIB_PATH": str(llama_cpp_libraries(environment))}


def _vllm_variables(environment: Path) -> dict[str, str]:
    """As vLLM's page about CPUs advises: its OpenMP preloaded. One process, threads not bound to particular cores."""
    return {
        "LD_PRELOAD": str(environment / "lib" / "libiomp5.so"),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


PEERS = {
    peer.name: peer
    for peer in (
        Peer(OURS, "rtp_llm", "ours"),
        Peer("llama.cpp", "llama.cpp", "llama_cpp", _llama_cpp_variables),
        Peer("openvino", "OpenVINO GenAI", "openvino"),
        Peer("vllm", "vLLM CPU", "vllm", _vllm_variables),
        Peer("transformers", "transformers", "transformers_"),
    )
}


def add_before(checkout: Path) -> None:
    """Make a checkout of another commit of this repository a peer."""
    PEERS[BEFORE] = Peer(BEFORE, "rtp_llm before", "ours", repository=checkout.resolve())
