"""Every instruction set that this machine has or can emulate, in turn."""

from collections.abc import Iterator

import pytest

from emulated import compile_quickly, instruction_sets, use
from rtp_llm.srt.devices.cpu import build


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels are those of this instruction set. A test module names what keeps functions in ``FUNCTIONS``."""
    caches = [build.load, *request.module.FUNCTIONS]
    compile_quickly(build.supported_isas(), request.config, monkeypatch)
    use(request.param, monkeypatch)
    for cached in caches:
        cached.cache_clear()
    yield request.param
    for cached in caches:
        cached.cache_clear()
