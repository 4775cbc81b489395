"""What all tests share: one thread per test process, no network, and the folder of real data."""

import logging
import os
from pathlib import Path

# Before torch and huggingface_hub are imported, which read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def fresh_logging() -> None:
    """An Engine sets the package's log level for the whole process; no test inherits it.

    Undone before each test, not after: a fixture of wider scope may have made an Engine between two tests.
    """
    logger = logging.getLogger("rtp_llm")
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()


@pytest.fixture(autouse=True)
def early_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps are replayed in tests too, whose answers are short."""
    monkeypatch.setattr("rtp_llm.srt.devices.cpu.graphs.RECORD_AT", 2)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real test data, named by ``RTP_LLM_TEST_DATA``; tests that need it are skipped without."""
    folder = Path(os.environ.get("RTP_LLM_TEST_DATA", ROOT / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real test data: {folder} does not exist (RTP_LLM_TEST_DATA names another place)")
    return folder
