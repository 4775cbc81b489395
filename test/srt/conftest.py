"""What all tests share: one thread per test process, no network, and the folder of real data."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch and huggingface_hub are imported, which read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """An Engine sets the package's log level for the whole process; the next test must not inherit it."""
    logger = logging.getLogger("rtp_llm")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real test data, named by ``RTP_LLM_TEST_DATA``; tests that need it are skipped without."""
    folder = Path(os.environ.get("RTP_LLM_TEST_DATA", ROOT / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real test data: {folder} does not exist (RTP_LLM_TEST_DATA names another place)")
    return folder
