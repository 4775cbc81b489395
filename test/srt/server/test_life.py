"""How a server in its own process starts and ends: nothing is lost, nothing is left."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tiny_server import ROOT, Process, free_port, own_process, python_process, wait_for
from warm_python import run_python

pytestmark = pytest.mark.xdist_group("server-process")

LONG = {"prompt": "the cat", "max_tokens": 480, "ignore_eos": True, "stream": True, "temperature": 0}


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def maps_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def read_stream(server: Process, started: threading.Event, lines: list[str]) -> None:
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as response:
        for line in response.iter_lines():
            if line:
                lines.append(line)
                started.set()


def begin_stream(server: Process) -> tuple[threading.Thread, list[str]]:
    started, lines = threading.Event(), []
    thread = threading.Thread(target=read_stream, args=(server, started, lines))
    thread.start()
    assert started.wait(30)
    return thread, lines


def test_sigterm_lets_streams_finish(tiny_checkpoint: str, tmp_path: Path) -> None:
    """This server is a new interpreter, as users start it; those of most other tests are warm."""
    with own_process(tmp_path, tiny_checkpoint, anew=True) as server:
        server.wait_ready()
        children = server.children()
        thread, lines = begin_stream(server)
        assert [
            pid for pid in (server.process.pid, *children) if maps_torch(pid)
        ] == children  # it is not in memory twice
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        refused = httpx.post(f"{server.url}/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert server.process.wait(60) == 0
        thread.join()
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert children and not any(map(is_alive, children))
        log = server.log.read_text()
        assert "serves tiny at http://127.0.0.1:" in log and "Traceback" not in log


@pytest.mark.slow
def test_what_does_not_finish_in_time_is_aborted(tiny_checkpoint: str, tmp_path: Path) -> None:
    with own_process(tmp_path, tiny_checkpoint, "--shutdown-timeout", "0") as server:
        server.wait_ready()
        thread, lines = begin_stream(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        thread.join()
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
        assert lines[-1] == "data: [DONE]"


def test_two_interrupts_end_at_once(tiny_checkpoint: str, tmp_path: Path) -> None:
    with own_process(tmp_path, tiny_checkpoint) as server:
        server.wait_ready()
        children = server.children()
        thread, _ = begin_stream_that_breaks(server)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(15) == 130
        thread.join()
        wait_for(lambda: not any(map(is_alive, children)))


def begin_stream_that_breaks(server: Process) -> tuple[threading.Thread, list[str]]:
    started, lines = threading.Event(), []

    def read() -> None:
        try:
            read_stream(server, started, lines)
        except httpx.TransportError:
            lines.append("broken")

    thread = threading.Thread(target=read)
    thread.start()
    assert started.wait(30)
    return thread, lines


def test_an_address_in_use_is_told_before_loading(tiny_checkpoint: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_python(["-m", "rtp_llm", "serve", "--model", tiny_checkpoint, "--port", str(port)])
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    done = run_python(["-m", "rtp_llm", "serve", "--model", str(tmp_path / "no"), "--port", str(free_port())])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("rtp-llm: error: model path")


@pytest.mark.slow
def test_a_killed_core_breaks_no_stream(tiny_checkpoint: str, tmp_path: Path) -> None:
    with own_process(tmp_path, tiny_checkpoint) as server:
        server.wait_ready()
        undisturbed = httpx.post(f"{server.url}/v1/completions", json=LONG | {"stream": False}, timeout=60).json()
        thread, lines = begin_stream(server)
        [core] = server.children()
        os.kill(core, signal.SIGKILL)
        thread.join()
        text = "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1])
        assert text == undisturbed["choices"][0]["text"]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


@pytest.mark.slow
def test_a_script_without_a_guard(tiny_checkpoint: str, tmp_path: Path) -> None:
    port = free_port()
    script = tmp_path / "script.py"
    script.write_text(
        "from rtp_llm.srt.entrypoints.http_server import launch_server\n"
        "from rtp_llm.srt.configs.server_args import ServerArgs\n"
        f"launch_server(ServerArgs(model_path={tiny_checkpoint!r}, device='cpu', max_total_tokens=1024, port={port}))\n"
    )
    log = tmp_path / "log"
    with log.open("wb") as file:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, str(script)], stdout=file, stderr=file, env=environment)
    server = Process(process, f"http://127.0.0.1:{port}", log)
    try:
        server.wait_ready()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("start", ["module", "console script"])
def test_files_beside_the_weights_are_not_imported(tiny_checkpoint: str, tmp_path: Path, start: str) -> None:
    """Neither by the server nor by the core and its workers, though it is started in the checkpoint's folder."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    for name in ("zmq", "msgspec", "torch", "numpy", "rtp_llm_extras", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'told')!r}, 'a').write({name!r})\n")
    command = ["-m", "rtp_llm"]
    if start == "console script":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "rtp-llm").write_text("import sys\nfrom rtp_llm.cli import main\nsys.exit(main())\n")
        command = [str(tmp_path / "bin" / "rtp-llm")]
    port = free_port()
    command += ["serve", "--model-path", ".", "--port", str(port), "--device", "cpu", "--max-total-tokens", "1024"]
    with python_process(folder, [*command, "--tp-size", "2"], port, anew=True) as server:
        server.wait_ready()
        body = {"text": "the cat", "sampling_params": {"max_new_tokens": 2}}
        assert httpx.post(f"{server.url}/generate", json=body, timeout=60).status_code == 200
    assert not (tmp_path / "told").exists(), (tmp_path / "told").read_text()


@pytest.mark.slow
def test_a_story(data_dir: Path, tmp_path: Path) -> None:
    model = data_dir / "models/stories260K-hf"
    golden = json.loads((model / "golden_greedy.json").read_text())["text"]
    with own_process(tmp_path, str(model)) as server:
        server.wait_ready()
        body = {"prompt": "", "max_tokens": 60, "echo": True}
        text = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
        assert len(text) > 50 and golden.startswith(text)
