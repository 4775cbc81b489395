"""Which processors and how many of them compute: told by trees of files as the system has them."""

from pathlib import Path
from subprocess import CompletedProcess

import pytest

from rtp_llm.srt import platform
from rtp_llm.srt.devices.cpu import build


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def siblings(*cores: list[int]) -> dict[str, str]:
    """Files of a machine with these physical cores, each a list of its logical processors."""
    folder = "sys/devices/system/cpu"
    return {
        f"{folder}/cpu{cpu}/topology/thread_siblings_list": ",".join(map(str, core)) for core in cores for cpu in core
    }


def test_one_thread_for_each_physical_core(tmp_path: Path) -> None:
    root = write(tmp_path, siblings([0, 4], [1, 5], [2, 6], [3, 7]))
    assert platform.compute_cores(range(8), root) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert platform.compute_cores([1, 2, 4, 5, 6], root) == [[1, 5], [2, 6], [4]]  # as a cpuset allows


def test_where_the_system_tells_nothing_every_processor_counts(tmp_path: Path) -> None:
    assert platform.compute_cores([0, 1, 2], tmp_path) == [[0], [1], [2]]
    assert platform.cpu_quota(tmp_path) is None


def test_the_fast_cores_of_a_hybrid_processor(tmp_path: Path) -> None:
    """Two cores with two threads each are fast, four with one thread each are slow, as on Intel's."""
    cores = siblings([0, 1], [2, 3], [4], [5], [6], [7])
    root = write(tmp_path, cores | {"sys/devices/cpu_core/cpus": "0-3", "sys/devices/cpu_atom/cpus": "4-7"})
    assert platform.compute_cores(range(8), root) == [[0, 1], [2, 3]]
    assert platform.fast_cpus(range(8), root) == [0, 1, 2, 3]
    assert platform.compute_cores([5, 6], root) == [[5], [6]]  # nothing else is allowed


def test_the_fast_cores_of_an_arm_processor(tmp_path: Path) -> None:
    capacity = {0: 325, 1: 325, 2: 870, 3: 870, 4: 1024}
    files = {f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity": str(value) for cpu, value in capacity.items()}
    root = write(tmp_path, siblings([0], [1], [2], [3], [4]) | files)
    assert platform.compute_cores(range(5), root) == [[2], [3], [4]]


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2.5),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        (
            {"proc/self/cgroup": "0::/pod/engine", "sys/fs/cgroup/pod/engine/cpu.max": "max 100000"}
            | {"sys/fs/cgroup/pod/cpu.max": "300000 100000"},
            3.0,
        ),
        (
            {"proc/self/cgroup": "5:memory:/a\n4:cpu,cpuacct:/docker/b"}
            | {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000"}
            | {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000"},
            1.5,
        ),
        (
            {"proc/self/cgroup": "1:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"}
            | {"sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            None,
        ),
    ],
    ids=["v2", "v2-unlimited", "v2-of-a-group-above", "v1", "v1-unlimited"],
)
def test_a_container_has_a_share_of_the_processors(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    root = write(tmp_path, siblings([0], [1], [2], [3]) | files)
    assert platform.cpu_quota(root) == quota
    assert len(platform.compute_cores(range(4), root)) == (4 if quota is None else int(quota))


def test_less_than_a_processor_is_one_thread(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "20000 100000"})
    assert platform.compute_cores(range(4), root) == [[0]]


@pytest.mark.parametrize(
    ("line", "isas"),
    [
        ("Features\t: fp asimd asimddp sve i8mm bf16", ["neon_i8mm", "neon_bf16", "neon_dot", "portable"]),
        ("Features\t: fp asimd evtstrm aes asimdhp asimddp bf16", ["neon_bf16", "neon_dot", "portable"]),
        ("Features\t: fp asimd evtstrm crc32 asimdhp asimddp", ["neon_dot", "portable"]),
        ("Features\t: fp asimd evtstrm crc32 cpuid", ["portable"]),
        ("flags\t\t: fpu sse2 fma f16c avx2 avx_vnni", ["avx2_vnni", "avx2", "portable"]),
    ],
)
def test_instruction_sets_by_the_features_of_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, isas: list[str]
) -> None:
    monkeypatch.setattr(platform, "ROOT", write(tmp_path, {"proc/cpuinfo": f"processor\t: 0\n{line}\nother\t: 1"}))
    monkeypatch.setattr(build, "cpu_flags", platform.cpu_flags.__wrapped__)
    assert build.supported_isas() == isas


def test_features_of_an_apple_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_BF16: 0\nhw.optional.arm.FEAT_I8MM: 1\n"
    monkeypatch.setattr(platform.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform.subprocess, "run", lambda *_, **__: CompletedProcess([], 0, stdout=answer))
    assert platform.cpu_flags.__wrapped__() == {"asimddp", "i8mm"}


def test_numa_nodes_and_their_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of four processors, of which each two are one core; and one that this process may not use."""
    monkeypatch.setattr(platform, "usable_cpus", lambda: list(range(8)))
    for node, cpus in enumerate(("0-1,4-5", "2-3,6-7", "8-9")):
        folder = tmp_path / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus)
    for cpu in range(8):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}")
    nodes = platform.numa_nodes(tmp_path)
    assert nodes == [[0, 1, 4, 5], [2, 3, 6, 7]]
    shares = [[platform.share_of_nodes(nodes, place, count, tmp_path) for place in range(count)] for count in (1, 2, 4)]
    assert shares == [[[0, 1, 4, 5, 2, 3, 6, 7]], nodes, [[0, 4], [1, 5], [2, 6], [3, 7]]]
    assert platform.share_of_nodes(nodes, 2, 3, tmp_path) == [2, 6, 3, 7]
    with pytest.raises(ValueError, match="node 0 has 2 cores for 3 ranks"):
        platform.share_of_nodes(nodes, 0, 6, tmp_path)
    assert platform.numa_nodes(tmp_path / "elsewhere") == [list(range(8))]
