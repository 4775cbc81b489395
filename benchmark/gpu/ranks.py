"""Part f: sums of two ranks that read each other's memory, beside torch.distributed's.

With one GPU, both ranks are on it and take turns: that shows whether sums are right, and not how long they take.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmark.gpu.machine import Machine, Row, Rows
from rtp_llm.srt.devices.cuda.exchange import SAME_DEVICE, share_memory
from rtp_llm.srt.distributed.parallel_state import TENSOR, RankGroup, WorldShape, destroy_world, init_world
from rtp_llm.srt.distributed.unsummed import plain
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.layers.norm import RMSNorm

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120.0
SHAPES = ((1, 4096), (8, 4096), (64, 4096), (16, 8192))
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


def check_ranks(machine: Machine) -> Rows:
    num_gpus = 0 if machine.is_dry else torch.cuda.device_count()
    what = f"two ranks on {min(2, num_gpus)} GPUs"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), SAME_DEVICE: "1" if num_gpus == 1 else "0"}
    meeting = machine.folder / "ranks"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmark.gpu.ranks", str(rank), str(meeting), str(num_gpus)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
    except subprocess.TimeoutExpired:
        yield Row(what, f"no end after {TIMEOUT_S:.0f} s", False)
        return
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(rank.returncode for rank in ranks):
        yield Row(what, f"ended with an error: {' '.join(outputs[0].split()[-30:])}", False)
        return
    for found in json.loads(outputs[0].splitlines()[-1]):
        yield Row(f"{what}, {found['what']}", found["result"], found["right"])


def run_rank(rank: int, meeting: str, num_gpus: int) -> None:
    """In a process of its own; rank 0 prints a line of JSON."""
    device = torch.device("cuda" if num_gpus else "cpu")
    if num_gpus:
        torch.cuda.set_device(rank % num_gpus)
    backend = "nccl" if num_gpus > 1 else "gloo"  # NCCL takes no two ranks of one GPU
    group = init_world(rank, WorldShape(2), backend, f"file://{meeting}", 60.0, device).group(TENSOR)
    group.shared = share_memory(group)
    found = [dict(what="sums", result="the ranks do not reach each other's memory", right=None)]
    if group.shared is not None:
        found = [each for dtype in TOLERANCE for shape in SHAPES for each in _compared(group, dtype, shape, num_gpus)]
    if rank == 0:
        print(json.dumps(found))
    destroy_world()


@torch.inference_mode()
def _compared(group: RankGroup, dtype: torch.dtype, shape: tuple[int, int], num_gpus: int) -> list[dict[str, Any]]:
    torch.manual_seed(group.rank)
    x = torch.randn(shape, device=group.device).to(dtype)
    torch.manual_seed(9)
    residual, norm = torch.randn(shape, device=group.device).to(dtype), RMSNorm(shape[1])
    norm.weight.data = torch.randn(shape[1], device=group.device).to(dtype)
    plainly = RankGroup(group.rank, group.world_size, group.device)
    total = plainly.all_reduce(x.float())
    expected = reference.add_rms_norm(total.to(dtype), residual, norm.weight, norm.variance_epsilon)
    name, rows = f"{str(dtype).removeprefix('torch.')} {list(shape)}", []
    for _ in range(3):  # in places that are used in turns
        found = {"sums": [plain(group.all_reduce(x.clone()))], "norms of sums": norm(group.all_reduce(x), residual)}
    for what, theirs in (("sums", [total]), ("norms of sums", expected)):
        pairs = zip(found[what], theirs, strict=True)
        error = max((ours.float() - other.float()).abs().max().item() for ours, other in pairs)
        size = max(1.0, *(other.abs().max().item() for other in theirs))
        row = dict(what=f"{what}, {name}", result=f"largest error {error:.1e}", right=error <= TOLERANCE[dtype] * size)
        if num_gpus > 1:
            seconds = [
                _seconds(lambda each=each: norm(each.all_reduce(x.clone()), residual)) for each in (group, plainly)
            ]
            row["result"] += f"; with the norm {seconds[0] * 1e6:.0f} us, NCCL {seconds[1] * 1e6:.0f} us"
        rows.append(row)
    return rows


def _seconds(work: Any, repeats: int = 50) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(5):
        work()
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
