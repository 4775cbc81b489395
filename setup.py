"""What pyproject.toml cannot say: a wheel has the CPU kernels, compiled for all instruction sets of its architecture.

``RTP_LLM_WHEEL_KERNELS=0`` leaves them out: such a wheel is for every platform, and compiles them at their first use,
as a source checkout does. So does a wheel that is made where there is no compiler for C++.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

CPU = Path("rtp_llm/srt/devices/cpu")
ASKED = os.environ.get("CXX")
COMPILER = shlex.split(ASKED) if ASKED else [path] if (path := shutil.which("g++")) else []
HAS_KERNELS = bool(COMPILER) and os.environ.get("RTP_LLM_WHEEL_KERNELS") != "0" and sys.platform == "linux"


def kernel_files() -> ModuleType:
    """The module of that name, which imports neither torch nor anything else of the package."""
    spec = importlib.util.spec_from_file_location("kernel_files", Path(__file__).parent / CPU / "kernel_files.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        if HAS_KERNELS and not self.editable_mode:
            folder = Path(self.build_lib) / CPU / "compiled"
            print(f"compiling CPU kernels with {shlex.join(COMPILER)}")
            kernel_files().compile_all(COMPILER, folder, platform.machine(), os.cpu_count() or 1)


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and any Python: kernels are called by ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if HAS_KERNELS else tag


class WithKernels(Distribution):
    def has_ext_modules(self) -> bool:
        return HAS_KERNELS


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel}, distclass=WithKernels)
