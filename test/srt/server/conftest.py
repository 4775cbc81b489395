"""One checkpoint and one server of each kind for all tests of a worker."""

import subprocess
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


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Files of a certificate for 127.0.0.1, and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl here to make a certificate with")
    return cert, key
