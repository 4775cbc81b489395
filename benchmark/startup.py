"""How long a server takes from its command to the first token, and how much memory it takes at most.

    python benchmark/make_checkpoint.py --size 0.6b --dtype bfloat16 --out checkpoint
    python benchmark/startup.py --model-path checkpoint
    python benchmark/startup.py --model-path checkpoint --first -- --quantization int8

Starts `rtp-llm serve` on a free port of this machine, waits until the port is open, until the server is ready, and for
the first token of a streamed request; prints the seconds of each phase. Meanwhile the memory of all its processes is
summed up (proportional set size: what processes share is counted once) every --sample-s seconds. Afterwards the server
is stopped. With --rounds the first round also warms up the file cache and the kernels' cache; with --first it is that
of a machine that has never run this program: kernels are compiled, and weight files are read from the disk.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

READY_WITHIN_S = 600
STOPPED_WITHIN_S = 60
POLL_S = 0.02
MIB = 1 << 20

T = TypeVar("T")


class MemorySampler(threading.Thread):
    """The largest sum of proportional set sizes over a process and its descendants, and what was part of it then."""

    def __init__(self, pid: int, interval_s: float) -> None:
        super().__init__(daemon=True)
        self._pid, self._interval_s = pid, interval_s
        self._stopped = threading.Event()
        self.peak: dict[int, int] = {}  # per process, bytes
        self.names: dict[int, str] = {}

    def run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            sizes = {pid: proportional_bytes(pid) for pid in process_tree(self._pid)}
            if sum(sizes.values()) > sum(self.peak.values()):
                self.peak = sizes
                self.names |= {pid: command_of(pid) for pid in sizes}

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def process_tree(pid: int) -> list[int]:
    """The process and its descendants, as far as they still run."""
    pids = [pid]
    for parent in pids:  # grows as we go
        for task in Path(f"/proc/{parent}/task").glob("*"):
            pids += [int(child) for child in read(task / "children").split()]
    return pids


def proportional_bytes(pid: int) -> int:
    lines = read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def command_of(pid: int) -> str:
    parts = read(Path(f"/proc/{pid}/cmdline")).split("\0")
    return " ".join(parts[1:4])


def read(path: Path) -> str:
    """Empty for a process that has ended."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_for(probe: Callable[[], T | None], what: str, process: subprocess.Popen, log: Path) -> T:
    deadline_s = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline_s:
        result = probe()
        if result is not None:
            return result
        if process.poll() is not None:
            raise SystemExit(f"the server ended with status {process.returncode}:\n{log.read_text()}")
        time.sleep(POLL_S)
    raise SystemExit(f"{what} took over {READY_WITHIN_S} s:\n{log.read_text()}")


def port_is_open(port: int) -> bool | None:
    with socket.socket() as sock:
        return True if sock.connect_ex(("127.0.0.1", port)) == 0 else None


def is_ready(port: int) -> bool | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/health")
        return True if connection.getresponse().status == 200 else None
    except OSError:
        return None
    finally:
        connection.close()


def first_token(port: int, args: argparse.Namespace) -> None:
    """Returns when the first event of a streamed answer is here, and reads the rest."""
    body = {
        "input_ids": list(range(1, 1 + args.input_len)),
        "sampling_params": {"max_new_tokens": args.output_len, "temperature": 0, "ignore_eos": True},
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=READY_WITHIN_S)
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    line = response.readline()
    if response.status != 200 or not line.startswith(b"data: {"):
        raise SystemExit(f"the server answered {response.status}: {line.decode(errors='replace')}")
    args.first_token_s = time.monotonic()
    response.read()
    connection.close()


def stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOPPED_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def drop_from_memory(model_path: str) -> None:
    """Make the system forget the weight files that it keeps in memory, as far as it can."""
    for file in Path(model_path).glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def weight_bytes(model_path: str) -> int:
    return sum(file.stat().st_size for file in Path(model_path).glob("*.safetensors"))


def measure(args: argparse.Namespace, folder: Path) -> None:
    port, log = free_port(), folder / "server.log"
    command = [sys.executable, "-m", "rtp_llm", "serve", "--model-path", args.model_path, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", args.dtype, "--max-total-tokens", str(args.max_total_tokens)]
    start_s = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen([*command, *args.server_args], stdout=output, stderr=output, env=os.environ)
    sampler = MemorySampler(process.pid, args.sample_s)
    sampler.start()
    try:
        times = {}
        wait_for(lambda: port_is_open(port), "opening the port", process, log)
        times["until the port is open"] = time.monotonic() - start_s
        wait_for(lambda: is_ready(port), "becoming ready", process, log)
        times["until it is ready"] = time.monotonic() - start_s
        first_token(port, args)
        times["until the first token"] = args.first_token_s - start_s
    finally:
        sampler.stop()
        stop(process)
    for name, seconds in times.items():
        print(f"  {seconds:7.2f} s  {name}")
    print_memory(args, sampler, log)


def print_memory(args: argparse.Namespace, sampler: MemorySampler, log: Path) -> None:
    peak = sum(sampler.peak.values())
    print(f"  {peak / MIB:7.0f} MiB at most, in {len(sampler.peak)} processes:")
    for pid, size in sorted(sampler.peak.items(), key=lambda item: -item[1]):
        print(f"    {size / MIB:7.0f} MiB  {sampler.names[pid]}")
    weights = weight_bytes(args.model_path)
    print(f"  {(peak - weights) / MIB:7.0f} MiB beside the {weights / MIB:.0f} MiB of the checkpoint's weight files")
    for line in log.read_text().splitlines():
        if "GiB of cache" in line:
            print(f"  {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a server's start: seconds by phase, and its peak memory.")
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-total-tokens", type=int, default=4096, help="tokens that the cache holds")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--first", action="store_true", help="begin as on a machine that has never run this program")
    parser.add_argument("--sample-s", type=float, default=0.05, help="time between two looks at the memory")
    parser.add_argument("server_args", nargs="*", help="further arguments of the server, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as kernels:
        if args.first:
            os.environ["RTP_LLM_KERNEL_CACHE"] = kernels
            drop_from_memory(args.model_path)
        for number in range(1, args.rounds + 1):
            print("first start:" if args.first and number == 1 else f"round {number}:", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                measure(args, Path(folder))


if __name__ == "__main__":
    main()
