"""Compiling, keeping and loading CPU kernels."""

import ctypes
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from rtp_llm.srt.device.choice import building_for, pick, provider_named
from rtp_llm.srt.devices.cpu import build, kernel_files
from rtp_llm.srt.kernels import reference

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
ISAS = build.supported_isas()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for compiled kernels."""
    monkeypatch.setenv("RTP_LLM_KERNEL_CACHE", str(tmp_path / "kernels"))
    build.load.cache_clear()
    yield tmp_path / "kernels"
    build.load.cache_clear()


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@needs_compiler
@pytest.mark.parametrize("isa", ISAS)
def test_exponentials(isa):
    x = torch.cat([torch.randn(1001) * 40, torch.tensor([0.0, -0.0, -87.4, -1e30, -torch.inf, torch.nan])])
    y = torch.empty_like(x)
    build.load("probe", isa).exponentials(pointer(x), pointer(y), ctypes.c_int64(len(x)))
    expected = x.double().exp()
    usual = (x > -87) & (x < 88)
    assert ((y.double() - expected).abs() / expected)[usual].max() < 3e-7
    assert (y[x < -87.4] == 0).all()
    assert y[-1].isnan()


@needs_compiler
@pytest.mark.parametrize("isa", ISAS)
def test_rounding_as_torch(isa):
    x = torch.cat([torch.randn(4001) * 10.0 ** torch.randint(-30, 30, (4001,)), torch.tensor([torch.inf, torch.nan])])
    halves = torch.arange(1 << 15, dtype=torch.int32).mul(1 << 16).add(1 << 15).view(torch.float32)  # all ties
    x = torch.cat([x, halves, -halves])
    x = x[x.isnan() | (x.abs() > 1e-37)]  # the processor may take what is smaller for zero
    y = torch.empty(len(x), dtype=torch.bfloat16)
    build.load("probe", isa).round_to_bf16(pointer(x), pointer(y), ctypes.c_int64(len(x)))
    assert torch.equal(y.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))


@needs_compiler
def test_there_is_one_pool_of_threads():
    before = torch.get_num_threads()
    try:
        for count in (2, 1):
            torch.set_num_threads(count)
            assert build.load("probe").num_threads() == count
    finally:
        torch.set_num_threads(before)


OTHER_OPENMP = """
import ctypes, shutil, sys
from rtp_llm.srt.devices.cpu import build
if "with" in sys.argv:
    other = shutil.copy(build.openmp_library(), sys.argv[1])
    build.openmp_library.cache_clear()
    ctypes.CDLL(other, ctypes.RTLD_GLOBAL)
    assert "libgomp-other" in open("/proc/self/maps").read()
print(build.openmp_library(), build.library_id("probe"))
"""


@needs_compiler
@pytest.mark.skipif(build.openmp_library() is None, reason="torch has no OpenMP library of its own")
def test_kernels_use_the_threads_of_torch_whatever_else_is_loaded(tmp_path: Path):
    """Another package's copy of OpenMP, such as scikit-learn's, neither serves kernels nor makes other ones of them."""

    def run(*args: str) -> str:
        command = [sys.executable, "-c", OTHER_OPENMP, str(tmp_path / "libgomp-other.so.1"), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout

    assert run() == run("with")


@pytest.fixture
def plain_clang(cache, monkeypatch, tmp_path):
    """A compiler that says it is clang, and that knows no OpenMP, as Apple's; here it is the machine's own."""
    script = tmp_path / "clang++"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--version*) echo "clang version 99.0"; exit;; esac\n'
        'case "$*" in *-fopenmp*) echo "unsupported option \'-fopenmp\'" >&2; exit 1;; esac\n'
        f'exec {build.compiler()} "$@"\n'
    )
    script.chmod(0o755)
    cached = build.compiler, build._compiler_version, build._openmp
    monkeypatch.setenv("CXX", str(script))
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@needs_compiler
def test_a_compiler_without_openmp_makes_kernels_of_one_thread(plain_clang, caplog):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        probe = build.load("probe")
        assert probe.num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert "has no OpenMP, so that CPU kernels compute on one thread" in caplog.text
    x = torch.randn(101)
    y = torch.empty_like(x)
    probe.exponentials(pointer(x), pointer(y), ctypes.c_int64(len(x)))
    torch.testing.assert_close(y, x.exp())


@needs_compiler
def test_what_was_compiled_is_kept(cache, monkeypatch):
    """For this user alone, whatever the umask."""
    before = os.umask(0)
    try:
        build.load("probe")
    finally:
        os.umask(before)
    modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in cache.iterdir()}
    assert (stat.S_IMODE(cache.stat().st_mode), modes) == (0o700, {".so": 0o700, ".lock": 0o600})
    (made,) = cache.glob("probe-*.so")
    build.load.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    build.load("probe")
    assert list(cache.glob("probe-*.so")) == [made]


@needs_compiler
def test_another_source_is_another_kernel(cache, monkeypatch, tmp_path):
    build.load("probe")
    sources = shutil.copytree(build.SOURCES, tmp_path / "sources")
    with (sources / "probe.cpp").open("a") as file:
        file.write("KERNEL int answer() { return 42; }\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    build.load.cache_clear()
    assert build.load("probe").answer() == 42
    assert len(list(cache.glob("probe-*.so"))) == 2


@needs_compiler
def test_copies_of_the_sources_share_a_kernel(cache, monkeypatch, tmp_path):
    build.load("probe")
    monkeypatch.setattr(build, "SOURCES", shutil.copytree(build.SOURCES, tmp_path / "sources"))
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    build.load.cache_clear()
    build.load("probe")


@needs_compiler
@pytest.mark.parametrize("part", ["attention.cpp", "attention_wide.h", "attention_arguments.h", "common.h"])
def test_every_file_that_a_kernel_includes_counts(part, monkeypatch, tmp_path):
    sources = shutil.copytree(build.SOURCES, tmp_path / "sources")
    monkeypatch.setattr(build, "SOURCES", sources)
    before = {name: build._key(name, "portable") for name in ("attention", "gemm")}
    with (sources / part).open("a") as file:
        file.write("// changed\n")
    assert build._key("attention", "portable") != before["attention"]
    assert (build._key("gemm", "portable") == before["gemm"]) == part.startswith("attention")


@needs_compiler
def test_a_lock_of_a_dead_process_holds_nobody_up(cache):
    cache.mkdir(mode=0o700)
    path = cache / f"probe-{build.isa()}-{build._key('probe', build.isa())}.lock"
    holder = multiprocessing.get_context("fork").Process(target=_die_with_lock, args=(path,))
    holder.start()
    holder.join()
    assert holder.exitcode == 7
    assert build.load("probe").num_threads() >= 1


def _die_with_lock(path: Path) -> None:
    with build._lock(path):
        os._exit(7)


@needs_compiler
def test_two_processes_compile_once(cache, caplog):
    context = multiprocessing.get_context("fork")
    builders = [context.Process(target=build.load, args=("probe",)) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
        assert builder.exitcode == 0
    assert len(list(cache.glob("probe-*.so"))) == 1


def _loosen(folder: Path) -> None:
    folder.chmod(0o777)


def _group_writes(folder: Path) -> None:
    folder.chmod(0o770)


def _loosen_above(folder: Path) -> None:
    folder.parent.chmod(0o777)


def _give_away(folder: Path) -> None:
    os.chown(folder, 12345, -1)


def _give_away_above(folder: Path) -> None:
    os.chown(folder.parent, 12345, -1)


def _link(folder: Path) -> None:
    """To a folder of somebody else's making."""
    target = folder.rename(folder.parent / "target")
    target.chmod(0o777)
    folder.symlink_to(target)


def _no_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


@pytest.fixture
def planted(cache: Path) -> Path:
    """A library in the cache, under the name that the next load looks for."""
    cache.mkdir(mode=0o700)
    path = cache / f"probe-{build.isa()}-{build._key('probe', build.isa())}.so"
    path.write_bytes(b"not to be loaded")
    path.chmod(0o600)
    build._warn_of_cache.cache_clear()
    return path


@pytest.mark.parametrize(
    "spoil", [None, _loosen, _group_writes, _loosen_above, _give_away, _give_away_above, _link, _no_folder]
)
def test_a_folder_that_others_can_write_to_is_no_cache(planted, cache, caplog, spoil):
    if spoil in (_give_away, _give_away_above) and os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    if spoil is not None:
        spoil(cache)
    with caplog.at_level("WARNING", logger="rtp_llm"):
        found = [build._sound_cache(), build._sound_cache()]
    assert found == ([cache, cache] if spoil is None else [None, None])
    assert caplog.text.count("neither loaded from the cache nor kept") == (spoil is not None)


@needs_compiler
def test_without_a_sound_cache_each_process_compiles_for_itself(planted, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _loosen(cache)
    assert build.load("probe").num_threads() >= 1
    assert planted.read_bytes() == b"not to be loaded" and list(tmp_path.glob("rtp-llm-*")) == []


@pytest.mark.parametrize("kind", ["sound", "others write", "of another user", "link"])
def test_a_file_that_others_could_have_written_is_compiled_anew(planted, cache, tmp_path, monkeypatch, caplog, kind):
    if kind == "others write":
        planted.chmod(0o666)
    elif kind == "of another user":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(planted, 12345, -1)
    elif kind == "link":
        planted.symlink_to(planted.rename(tmp_path / "elsewhere.so"))
    compiled = []
    monkeypatch.setattr(build, "_compile", lambda name, target, path: compiled.append(path))
    with caplog.at_level("WARNING", logger="rtp_llm"):
        assert build._built_in(cache, "probe", build.isa()) == planted
    assert compiled == ([] if kind == "sound" else [planted])
    assert caplog.text.count("is not loaded but compiled anew") == len(compiled)


@needs_compiler
def test_a_library_is_put_in_place_whole(planted, cache):
    """Over one that is there, and over what an interrupted build left."""
    planted.chmod(0o666)
    planted.with_suffix(".new").symlink_to("/dev/null")
    build.load("probe")
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so"]
    assert stat.S_IMODE(planted.stat().st_mode) == 0o700


def test_a_compiler_in_the_working_directory_is_no_compiler(monkeypatch, tmp_path):
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join((".", "")))
    assert build.compiler.__wrapped__() is None


@needs_compiler
def test_a_file_that_does_not_compile_says_why(cache, monkeypatch, tmp_path):
    sources = shutil.copytree(build.SOURCES, tmp_path / "sources")
    (sources / "probe.cpp").write_text('#include "common.h"\nKERNEL int broken( {}\n')
    monkeypatch.setattr(build, "SOURCES", sources)
    with pytest.raises(build.KernelBuildError, match=r"does not compile the CPU kernel probe(.|\n)*broken"):
        build.load("probe")


@needs_compiler
def test_the_usual_kernels_are_compiled_several_at_once(cache, monkeypatch):
    compiling, together = set(), threading.Barrier(2, timeout=30)

    def compile_one(name, target, path):
        together.wait()  # which passes only if two are compiled at the same time
        compiling.add(name)
        path.write_bytes(b"")
        path.chmod(0o700)

    monkeypatch.setattr(build, "_compile", compile_one)
    monkeypatch.setattr(build, "num_cpus", lambda: 2)
    kernels = ("moe", "gemm", "attention", "sampling")
    before = set(threading.enumerate())
    build.compile_ahead(kernels)
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    assert compiling == set(kernels) == {path.name.split("-")[0] for path in cache.glob("*.so")}


@pytest.fixture
def carried(tmp_path, monkeypatch) -> Path:
    """The folder of compiled libraries of a package, with one of them; no compiler is found after that."""
    compiler, flags = build.compiler(), kernel_files.welcome_flags("probe", build.isa(), build.cpu_flags())
    library = kernel_files.compile_carried([compiler], tmp_path, "probe", build.isa(), flags)
    monkeypatch.setattr(build, "COMPILED", tmp_path)
    monkeypatch.setattr(build, "compiler", lambda: None)
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled though it is there"))
    return library


@needs_compiler
def test_a_library_that_came_with_the_package_needs_no_compiler(carried, cache):
    before = torch.get_num_threads()
    try:
        for count in (2, 1):
            torch.set_num_threads(count)
            assert build.load("probe").num_threads() == count  # there is one pool of threads
    finally:
        torch.set_num_threads(before)
    assert not cache.exists()


@needs_compiler
def test_a_library_of_other_sources_or_a_newer_system_is_not_taken(carried, cache, monkeypatch, caplog):
    carried.write_bytes(b"no library")
    with caplog.at_level("WARNING", logger="rtp_llm"):
        assert build._open_carried("probe", build.isa()) is None
    assert "that came with the package does not load" in caplog.text
    monkeypatch.setattr(kernel_files, "FLAGS", (*kernel_files.FLAGS, "-DANOTHER"))
    assert build._carried("probe", build.isa()) is None


def test_only_kernels_that_use_them_are_compiled_for_further_flags():
    assert kernel_files.welcome_flags("gemm_codes", "avx512", kernel_files.WELCOME) == kernel_files.WELCOME
    assert kernel_files.welcome_flags("gemm_codes", "avx2", kernel_files.WELCOME) == ()
    assert kernel_files.welcome_flags("probe", "avx512", kernel_files.WELCOME) == ()


def test_without_a_compiler_the_reference_runs(cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    caches = (build.compiler, build._compiler_version, build.kernels_work)
    for cached in caches:
        cached.cache_clear()
    try:
        with caplog.at_level("WARNING", logger="rtp_llm"):
            assert pick("rms_norm") is reference.rms_norm
        assert "there is no C++ compiler" in caplog.text
        assert "several times slower" in caplog.text
    finally:
        monkeypatch.undo()
        for cached in caches:
            cached.cache_clear()


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("RTP_LLM_CPU_ISA", "sve2")
    with pytest.raises(ValueError, match="RTP_LLM_CPU_ISA is 'sve2', but this processor has"):
        build.isa.__wrapped__()


def test_layers_for_the_reference_take_no_kernels():
    with building_for(provider_named("reference")):
        assert pick("rms_norm") is reference.rms_norm


def test_the_module_lists_the_instruction_sets_of_this_processor() -> None:
    command = [sys.executable, "-m", "rtp_llm.srt.devices.cpu.build"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert listed == ISAS and listed[-1] == "portable"
