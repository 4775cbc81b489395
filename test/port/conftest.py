"""A folder that looks like the other engine's, with model files of these tests' own writing."""

from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_file import HEAD, WHOLE

from rtp_llm.port.porter import Ported, port

Porter = Callable[..., Ported]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """An empty folder of models."""
    folder = tmp_path / "vllm" / "model_executor" / "models"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def ported(models: Path) -> Porter:
    """Port a file of the given text, below the usual imports, among siblings of the given names and texts."""

    def run(text: str, architecture: str | None = None, head: str = HEAD, **siblings: str) -> Ported:
        for name, sibling in siblings.items():
            (models / f"{name}.py").write_text(HEAD + sibling)
        (models / "harbor.py").write_text(head + text)
        return port(models / "harbor.py", architecture)

    return run


@pytest.fixture
def whole_model() -> str:
    """A model of all usual parts, without imports."""
    return WHOLE
