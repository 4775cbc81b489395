"""One checkpoint and one server of each kind for all tests of a worker."""

from collections.abc import Iterator

import openai
import pytest

from tiny_server import InProcess, Process, in_process, make_checkpoint, own_process


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("tiny-with-tokenizer"))


@pytest.fixture(scope="session")
def server(tiny_checkpoint: str) -> Iterator[InProcess]:
    with in_process(tiny_checkpoint) as running:
        yield running


@pytest.fixture(scope="session")
def server_process(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with own_process(tmp_path_factory.mktemp("server"), tiny_checkpoint) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="session")
def client(server_process: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_process.url}/v1", api_key="none", max_retries=0, timeout=60) as connected:
        yield connected
