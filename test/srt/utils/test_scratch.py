"""Temporary folders: gone at the end, and after a kill at the next start."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rtp_llm.srt.utils.scratch import PREFIX, ScratchFolder

HOLDER = """
import time
from rtp_llm.srt.utils.scratch import ScratchFolder
folder = ScratchFolder()
(folder.path / "inner").mkdir()
print(folder.path, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_it_is_gone_at_the_end(temporary: Path) -> None:
    with ScratchFolder() as path:
        (path / "file").touch()
        assert path.parent == temporary and path.stat().st_mode & 0o777 == 0o700
    assert list(temporary.iterdir()) == []
    folder = ScratchFolder()
    folder.close()
    folder.close()
    ScratchFolder()  # and nobody keeps it
    assert list(temporary.iterdir()) == []


def test_a_forked_process_removes_nothing(temporary: Path) -> None:
    folder = ScratchFolder()
    pid = os.fork()
    if pid == 0:
        folder.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert folder.path.is_dir()
    folder.close()


def test_what_a_killed_process_left_goes_at_the_next_start(temporary: Path) -> None:
    """And nothing else does: folders in use, of others, or of another kind."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    left = Path(holder.stdout.readline().strip())
    (temporary / f"{PREFIX}mine").mkdir()  # without an owner's lock: not made by us
    (temporary / "other").mkdir()
    (temporary / f"{PREFIX}link").symlink_to(temporary / "other")
    (temporary / f"{PREFIX}file").touch()
    with ScratchFolder() as first:
        assert left.is_dir(), "its process lives"
        holder.kill()
        holder.communicate()
        with ScratchFolder() as second:
            assert not left.exists()
            assert first.is_dir() and second.is_dir()
    assert sorted(path.name for path in temporary.iterdir()) == sorted(
        ["other", f"{PREFIX}file", f"{PREFIX}link", f"{PREFIX}mine"]
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_folders_of_other_users_are_left_alone(temporary: Path) -> None:
    folder = temporary / f"{PREFIX}theirs"
    folder.mkdir()
    (folder / ".owner").touch()
    os.chown(folder, 12345, -1)
    ScratchFolder().close()
    assert folder.is_dir()
