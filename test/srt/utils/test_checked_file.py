"""Files with checksums: what is read is what was written, whatever pieces it was written in, or an error."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from rtp_llm.srt.utils import checked_file
from rtp_llm.srt.utils.checked_file import ALIGNMENT, FIRST_SECTION, CheckedFile, DamagedFileError, write_checked


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_file, "PIECE_BYTES", 1000)


def written(path: Path, sections: list[list[bytes]]) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    buffers = [[memoryview(buffer) for buffer in section] for section in sections]
    assert write_checked(fd, {"of": ["a", 1, None]}, buffers) == path.stat().st_size
    os.close(fd)


def read(path: Path, num_threads: int = 2) -> list[bytes]:
    file = CheckedFile.open(path)
    try:
        assert file.description == {"of": ["a", 1, None]}
        targets = [bytearray(length) for length in file.lengths]
        file.read_into([memoryview(target) for target in targets], num_threads)
        return [bytes(target) for target in targets]
    finally:
        file.close()


def parts(rng: random.Random, length: int) -> list[bytes]:
    """Random bytes, in buffers of random sizes."""
    data, cuts = rng.randbytes(length), sorted(rng.randrange(length + 1) for _ in range(rng.randrange(4)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, length], strict=True)]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_read_was_written(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    lengths = [rng.choice([0, 1, 999, 1000, 1001, rng.randrange(5000)]) for _ in range(rng.randrange(5))]
    sections = [parts(rng, length) for length in lengths]
    written(tmp_path / "file", sections)
    assert read(tmp_path / "file", rng.randrange(4)) == [b"".join(section) for section in sections]


def test_any_changed_byte_of_any_section_is_noticed(tmp_path: Path) -> None:
    rng = random.Random(1)
    path = tmp_path / "file"
    written(path, [parts(rng, 2500), parts(rng, 70)])
    whole = path.read_bytes()
    second = FIRST_SECTION + -(-2500 // ALIGNMENT) * ALIGNMENT
    for place in [*rng.sample(range(FIRST_SECTION, FIRST_SECTION + 2500), 40), second, second + 69]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedFileError, match="are not those that were written"):
            read(path)


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-1], lambda data: data + b" ", lambda data: data[:10], lambda data: data[:-3] + b"000"]
)
def test_other_damage(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "file"
    written(path, [[b"abc"]])
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DamagedFileError):
        read(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    written(path, [[bytes(5000)]])
    file = CheckedFile.open(path)
    os.truncate(path, FIRST_SECTION + 100)
    with pytest.raises(DamagedFileError, match="it ends early"):
        file.read_into([memoryview(bytearray(5000))], 1)
    file.close()


def test_links_are_not_followed(tmp_path: Path) -> None:
    written(tmp_path / "file", [])
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match="symbolic links"):
        CheckedFile.open(tmp_path / "link")
