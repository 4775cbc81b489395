"""A wheel of this package, and what runs from it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rtp_llm.srt.devices.cpu import build, kernel_files

REPOSITORY = Path(__file__).parents[2]
ANSWER = """
from rtp_llm import Engine
from rtp_llm.srt.devices.cpu import build
assert build.compiler() is None and build.kernels_work() and build.COMPILED.is_dir()
with Engine(dtype="bfloat16", quantization="int8", inline=True) as engine:
    print(build.__file__, len(engine.generate("2 + 3 =", {"max_new_tokens": 4, "temperature": 0})["text"]))
"""


def copied(folder: Path) -> Path:
    """A copy of what a wheel is made of."""
    shutil.copytree(REPOSITORY / "rtp_llm", folder / "rtp_llm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
def test_a_wheel_computes_without_a_compiler(tmp_path: Path) -> None:
    """Its kernels are those of every instruction set; none is compiled, and no cache is made."""
    sources = copied(tmp_path / "sources")  # where the build may leave what it likes
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(sources)]
    subprocess.run([*command, "--wheel-dir", str(tmp_path)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")
    installed, cache = tmp_path / "installed", tmp_path / "cache"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    libraries = {
        tuple(path.name.split("-")[:2]) for path in (installed / "rtp_llm/srt/devices/cpu/compiled").glob("*.so")
    }
    assert {(name, isa) for name in kernel_files.kernel_names() for isa in build.supported_isas()} <= libraries
    variables = {"PYTHONPATH": str(installed), "PATH": str(tmp_path), "RTP_LLM_KERNEL_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", ANSWER], check=True, capture_output=True, text=True, cwd=tmp_path, env=variables
    )
    file, length = done.stdout.split()
    assert Path(file).is_relative_to(installed) and int(length) > 0
    assert not cache.exists()
