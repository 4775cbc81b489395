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

from warm_python import warm_children

ROOT = Path(__file__).resolve().parents[1]
# What takes longest of what one worker of pytest-xdist has to run by itself: begun first, so that no worker is left
# with it at the end.
LONG_GROUPS = (
    "server-process", "server-in-process", "test/docs/test_docs.py", "test/srt/devices/cpu/test_cpu_linear.py",
    "test/srt/devices/cpu/test_attention.py", "tensor-parallel", "hostile", "test/srt/layers/test_layers_models.py",
    "test/srt/models/test_bfloat16.py", "test/srt/engine/test_engine_core.py", "test/srt/models/test_engine_random.py",
    "test/srt/models/test_cpu_graph.py", "test/srt/server/test_supervisor.py", "test/srt/server/test_demo_model.py",
    "test/tools/test_gpu_check.py", "test/srt/models/test_generation_models.py", "test/tools/test_verify.py",
    "test/srt/devices/cuda/test_product_kernels.py", "test/srt/devices/cuda/test_attention_kernels.py",
    "test/tools/test_one_batch.py", "test/tools/test_cli_chat.py", "test/tools/test_bench_serving.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        config.option.loadscopereorder = False  # by their numbers of tests, which say little


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--dist loadgroup``, a file is run by one worker: what its tests share is made once, and pytest-xdist,
    which looks through all groups after each test, has few of them."""
    if not getattr(config.option, "loadgroup", False):
        return
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(ROOT).as_posix()))
        _name_group(item)
    items.sort(key=_place_of)


def _group_of(item: pytest.Item) -> str:
    mark = item.get_closest_marker("xdist_group")
    assert mark is not None
    return str(mark.args[0])


def _name_group(item: pytest.Item) -> None:
    """Let the group follow the test's id after an "@", where pytest-xdist looks for it. It writes that itself, but
    where pytest from 9.2 on does not read it."""
    if hasattr(item, "_id"):
        item._id = type(item._id).parse(f"{item.nodeid}@{_group_of(item)}")


def _place_of(item: pytest.Item) -> int:
    group = _group_of(item)
    return LONG_GROUPS.index(group) if group in LONG_GROUPS else len(LONG_GROUPS)


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


@pytest.fixture
def warm_processes() -> Iterator[None]:
    """The cores and workers that this test's engines start need not import everything anew."""
    with warm_children():
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real test data, named by ``RTP_LLM_TEST_DATA``; tests that need it are skipped without."""
    folder = Path(os.environ.get("RTP_LLM_TEST_DATA", ROOT / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real test data: {folder} does not exist (RTP_LLM_TEST_DATA names another place)")
    return folder
