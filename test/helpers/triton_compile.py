"""What launchers of Triton kernels would launch, compiled for GPUs that this machine does not have."""

import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

# most shared memory of a block (CUDA's guide, 2025)
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int8: "i8",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One specialization of a kernel, as Triton makes it of the arguments of a launch."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__name__} {dict(self.constants)} {dict(self.options)}"


@dataclass(frozen=True)
class Compiled:
    ptx: str
    shared_bytes: int
    registers: int
    stack_bytes: int  # of a thread: what was spilled


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record launches instead of making them."""
    from triton.runtime.jit import JITFunction

    launches: dict[Launch, None] = {}
    found: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = _launch(self, args, kwargs)
        if launch not in launches:
            launches[launch] = None
            found.append(launch)

    with patch.object(JITFunction, "run", run):
        yield found


def launches_of(call: Callable[[], Any]) -> list[Launch]:
    with recorded_launches() as found:
        call()
    return found


def _launch(kernel: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Launch:
    parameters = inspect.signature(kernel.fn).parameters
    own = {name: value for name, value in kwargs.items() if name in parameters}
    options = tuple(sorted((name, value) for name, value in kwargs.items() if name not in parameters))
    bound = inspect.signature(kernel.fn).bind(*args, **own)
    bound.apply_defaults()
    signature, constants, aligned = [], [], []
    for i, (name, value) in enumerate(bound.arguments.items()):
        form, is_aligned = _form(value, kernel.params[i].is_constexpr)
        signature.append((name, form))
        if form == "constexpr":
            constants.append((name, value))
        if is_aligned:
            aligned.append(i)
    return Launch(kernel, tuple(signature), tuple(constants), tuple(aligned), options)


def _form(value: Any, is_constexpr: bool) -> tuple[str, bool]:
    if is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return "*" + NAMES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        if value == 1:
            return "constexpr", False
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64", value % 16 == 0
    return "fp32", False


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compile for ``sm_{capability}``, and read what the assembler made."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    registers, stack = _resources(made.asm["cubin"])
    return Compiled(made.asm["ptx"], made.metadata.shared, registers, stack)


def _resources(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found, done.stdout
    return int(found[1]), int(found[2])


def check_compiled(launch: Launch, capability: int, instruction: str | None = None) -> Compiled:
    """Compile, and assert that nothing is spilled, that shared memory suffices, and that ``instruction`` is used."""
    made = compile_for(launch, capability)
    assert made.stack_bytes == 0 and ".local" not in made.ptx, f"{launch.name} spills {made.stack_bytes} bytes"
    assert made.shared_bytes <= SHARED_BYTES[capability], f"{launch.name} needs {made.shared_bytes} bytes of shared"
    if instruction is not None:
        assert instruction in made.ptx, f"{launch.name}: no {instruction}"
    return made
