"""The script that a machine with a GPU runs works, tried on the CPU."""

from warm_python import ROOT, run_python


def test_the_whole_check_runs() -> None:
    done = run_python([str(ROOT / "scripts" / "gpu_check.py"), "--device", "cpu", "--size", "tiny"])
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| 20")]
    assert len(rows) == 3 + 4 + 4 and not any("WRONG" in row for row in rows)
