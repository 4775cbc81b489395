"""Every instruction set that this machine has, in turn."""

from collections.abc import Iterator

import pytest

from rtp_llm.srt.devices.cpu import build


@pytest.fixture(params=build.supported_isas() if build.compiler() else [])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels are those of this instruction set. A test module names what keeps functions in ``FUNCTIONS``."""
    monkeypatch.setattr(build, "isa", lambda: request.param)
    caches = [build.load, *request.module.FUNCTIONS]
    for cached in caches:
        cached.cache_clear()
    yield request.param
    for cached in caches:
        cached.cache_clear()
