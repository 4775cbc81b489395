"""Reading GGUF files, and refusing damaged ones."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rtp_llm.srt.gguf import header
from rtp_llm.srt.gguf.file import GGUFFile, parts_of
from rtp_llm.srt.gguf.header import GGUFError

ARRAYS = {
    "norm": np.arange(8, dtype=np.float32),
    "halves": np.arange(12, dtype=np.float16).reshape(3, 4),
    "experts": np.random.default_rng(1).standard_normal((2, 3, 64), dtype=np.float32),
}


def write(path: Path, *, keys=None, arrays=ARRAYS, kind=GGMLQuantizationType.Q8_0, **writer_args) -> Path:
    writer = GGUFWriter(path, "toy", **writer_args)
    for key, (value, value_type) in (keys or {}).items():
        writer.add_key_value(key, value, value_type, sub_type=None)
    for name, array in arrays.items():
        if array.ndim == 3:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KEYS = {
    "toy.small": (7, GGUFValueType.UINT8),
    "toy.negative": (-7, GGUFValueType.INT16),
    "toy.eps": (1e-5, GGUFValueType.FLOAT32),
    "toy.exact": (1e-5, GGUFValueType.FLOAT64),
    "toy.flag": (False, GGUFValueType.BOOL),
    "toy.name": ("Ein Öl", GGUFValueType.STRING),
    "toy.huge": (2**63, GGUFValueType.UINT64),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "toy.gguf", keys=KEYS)


def test_metadata_and_tensors_are_those_of_the_package(file):
    ours, theirs = GGUFFile.open(file), GGUFReader(file)
    assert ours.architecture == "toy" and ours.paths == (file,)
    assert {key: ours.metadata[key] for key in KEYS} == {key: value for key, (value, _) in KEYS.items()}
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.type == tensor.tensor_type and mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert bytes(mine.data.numpy().tobytes()) == tensor.data.tobytes()
    assert tuple(ours.tensors["experts"].data.shape) == (2, 3, 68)
    assert np.array_equal(ours.tensors["halves"].data.numpy().view(np.float16), ARRAYS["halves"])


def test_lists_keep_their_values(tmp_path):
    writer = GGUFWriter(tmp_path / "toy.gguf", "toy")
    lists = {"toy.texts": ["", "a", "é"], "toy.floats": [0.5, -1.0], "toy.ints": [1, -2], "toy.flags": [True, False]}
    for key, values in lists.items():
        writer.add_array(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GGUFFile.open(tmp_path / "toy.gguf").metadata
    assert {key: metadata[key] for key in lists} == lists


def test_a_vocabulary_may_be_left_out(tmp_path):
    writer = GGUFWriter(tmp_path / "toy.gguf", "toy")
    lists = {
        "toy.ints": [1, 2],
        "tokenizer.texts": ["", "a", "é"],
        "tokenizer.ints": [1, -2],
        "tokenizer.flags": [True],
    }
    for key, values in lists.items():
        writer.add_array(key, values)
    writer.add_string("tokenizer.model", "gpt2")
    writer.add_tensor("a", ARRAYS["halves"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole, part = (GGUFFile.open(tmp_path / "toy.gguf", with_vocabulary=kept) for kept in (True, False))
    assert {key: whole.metadata[key] for key in lists} == lists
    left = {key: [] if key.startswith("tokenizer.") else values for key, values in lists.items()}
    assert {key: part.metadata[key] for key in lists} == left
    assert part.metadata["tokenizer.model"] == "gpt2"
    assert torch.equal(part.tensors["a"].data, whole.tensors["a"].data)


def test_a_view_outlives_its_file(file):
    tensor = GGUFFile.open(file).tensors["norm"]
    file.unlink()
    assert np.array_equal(tensor.data.numpy().view(np.float32), ARRAYS["norm"])
    tensor.data.zero_()  # in a private mapping


def split(folder: Path) -> list[Path]:
    write(
        folder / "toy.gguf",
        arrays={f"t{i}": np.full((32,), i, dtype=np.float32) for i in range(5)},
        split_max_tensors=2,
    )
    return sorted(folder.glob("*.gguf"))


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_of_a_split_file_stands_for_all(tmp_path, given):
    parts = split(tmp_path)
    file = GGUFFile.open(parts[given])
    assert [path.name for path in file.paths] == [f"toy-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert file.architecture == "toy"
    assert [int(tensor.data.numpy().view(np.float32)[0]) for tensor in file.tensors.values()] == [0, 1, 2, 3, 4]


def test_missing_parts_are_named(tmp_path):
    parts = split(tmp_path)
    parts[0].unlink()
    parts[2].unlink()
    with pytest.raises(GGUFError, match=r"2 of the 3 parts .* missing: toy-00001-of-00003.gguf, toy-00003-of-00003"):
        GGUFFile.open(parts[1])
    with pytest.raises(GGUFError, match="there is no part 4 of 3"):
        parts_of(tmp_path / "toy-00004-of-00003.gguf")


def test_renamed_parts_are_refused(tmp_path):
    parts = split(tmp_path)
    alone = parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(GGUFError, match=r"one of 3 parts \(`split.count`\)"):
        GGUFFile.open(alone)
    alone.rename(tmp_path / "spare")
    parts[1].rename(parts[0])
    (tmp_path / "spare").rename(parts[1])
    with pytest.raises(GGUFError, match=r"`split.no` is 1, but its name says 0"):
        GGUFFile.open(parts[2])


# Damaged files, written byte by byte


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCH = key("general.architecture", 8, text("toy"))


def content(keys=(ARCH,), tensors=(), data=b"", version=3, counts=None, order="<") -> bytes:
    num_tensors, num_keys = counts or (len(tensors), len(keys))
    start = b"GGUF" + struct.pack(f"{order}IQQ", version, num_tensors, num_keys) + b"".join([*keys, *tensors])
    return start + b"\0" * (-len(start) % 32) + data


U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
HUGE = struct.pack("<Q", 2**63 - 1)
DAMAGED = {
    "nothing": (b"", "empty"),
    "an error page": (b"<!DOCTYPE html><html>", "no GGUF.*web page"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "no GGUF.*Git LFS"),
    "an old format": (b"tjgg\1\0\0\0", "no GGUF.*before GGUF"),
    "four bytes": (b"GGUF", "truncated"),
    "no counts": (b"GGUF\3\0\0\0\1", "numbers of keys and tensors.*truncated"),
    "version 1": (content(version=1), "is of version 1; supported are 2 and 3"),
    "version 99": (content(version=99), "is of version 99"),
    "big endian": (content(order=">"), "big endian.*gguf_convert_endian"),
    "no keys": (content(keys=()), "`general.architecture` must name an architecture, not None"),
    "a number for a name": (content([key("general.architecture", U32, b"\1\0\0\0")]), "must name an architecture"),
    "a sentence for a name": (content([key("general.architecture", 8, text("toy" * 99))]), "must name an architecture"),
    "a word for a count": (content([ARCH, key("split.count", 8, text("many"))]), "is one of 'many' parts"),
    "many keys": (content(counts=(0, 2**64 - 1)), "key 2 of 18446744073709551615"),
    "many tensors": (content(counts=(2**64 - 1, 1)), "description of tensor 1 of 18446744073709551615"),
    "a long name": (content([HUGE + b"general"]), "key 1 of 1: needs 9223372036854775807 bytes"),
    "a name too long": (content([key("k" * 65536, U8, b"\1")]), "expected are 1 to 65535 bytes"),
    "no name": (content([key("", U8, b"\1")]), "has a name of 0 letters"),
    "a long text": (content([ARCH, key("toy.x", STRING, HUGE)]), "key 'toy.x': needs"),
    "many texts": (content([ARCH, key("toy.x", ARRAY, struct.pack("<I", STRING) + HUGE)]), "key 'toy.x': needs"),
    "many numbers": (content([ARCH, key("toy.x", ARRAY, struct.pack("<I", F32) + HUGE)]), "key 'toy.x': needs"),
    "nested": (content([ARCH, key("toy.x", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "'toy.x': is an array of arrays"),
    "an unknown value": (content([ARCH, key("toy.x", 77, b"")]), "key 'toy.x': has a value of type 77"),
    "bad letters": (content([ARCH, key("toy.x", STRING, text(b"ab\xff"))]), "'toy.x': has a text that is not UTF-8"),
    "bad letters in a name": (content([ARCH, key(b"\xff", U8, b"\1")]), "key 2 of 2: has a text that is not UTF-8"),
    "a key twice": (content([ARCH, ARCH]), "key 'general.architecture' is there twice"),
    "a tensor twice": (content(tensors=[tensor("a", [8]), tensor("a", [8])], data=b"\0" * 64), "'a' is there twice"),
    "overlapping": (
        content(tensors=[tensor("a", [16]), tensor("b", [8], offset=32)], data=b"\0" * 64),
        "'a' and 'b' overlap",
    ),
    "cut data": (content(tensors=[tensor("a", [16])], data=b"\0" * 63), "tensor 'a': ends at byte .*truncated"),
    "far away": (content(tensors=[tensor("a", [8], offset=2**60)], data=b"\0" * 64), "tensor 'a': ends at byte"),
    "misaligned": (content(tensors=[tensor("a", [8], offset=16)], data=b"\0" * 64), "'a': begins at 16"),
    "an unknown type": (content(tensors=[tensor("a", [8], kind=99)], data=b"\0" * 64), "'a': is of type 99"),
    "a removed type": (content(tensors=[tensor("a", [32], kind=4)], data=b"\0" * 64), "'a': is of type 4"),
    "half a block": (content(tensors=[tensor("a", [48], kind=8)], data=b"\0" * 64), "rows of 48 values.*Q8_0's 32"),
    "no dimension": (content(tensors=[tensor("a", [])], data=b"\0" * 64), r"'a': has the dimensions \[\]"),
    "an empty dimension": (content(tensors=[tensor("a", [8, 0])], data=b"\0" * 64), r"has the dimensions \[0, 8\]"),
    "five dimensions": (content(tensors=[tensor("a", [1] * 5)], data=b"\0" * 64), "'a': has the dimensions"),
    "endless dimensions": (content(tensors=[text("a") + b"\xff" * 4]), "'a': has 4294967295 dimensions"),
    "a product that overflows": (
        content(tensors=[tensor("a", [2**33, 2**31, 4])], data=b"\0" * 64),
        "'a': ends at byte 295147905179352825984",
    ),
    "a crooked alignment": (
        content([ARCH, key("general.alignment", U32, struct.pack("<I", 24))]),
        "`general.alignment` must be a power of two from 8 on, not 24",
    ),
    "a word for an alignment": (content([ARCH, key("general.alignment", STRING, text("x"))]), "not 'x'"),
    "a wide alignment": (
        content([ARCH, key("general.alignment", U32, b"\0\0\0\x80")], [tensor("a", [8])], b"\0" * 64),
        "tensor 'a': ends at byte",
    ),
    "fewer tensors than promised": (
        content([ARCH, key("split.tensors.count", U32, b"\7\0\0\0")]),
        "`split.tensors.count` is 7, but the parts have 0 tensors",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_with_the_place(tmp_path, name):
    damaged, message = DAMAGED[name]
    path = tmp_path / "toy.gguf"
    path.write_bytes(damaged)
    with pytest.raises(GGUFError, match=f"(?s)toy.gguf.*{message}"):
        GGUFFile.open(path)


def test_a_header_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(header, "MAX_HEADER", 256)
    path = tmp_path / "toy.gguf"
    path.write_bytes(content([ARCH, key("toy.x", ARRAY, struct.pack("<IQ", U8, 500) + b"\0" * 500)]))
    with pytest.raises(GGUFError, match=r"'toy\.x': lies beyond the first 256 bytes"):
        GGUFFile.open(path)


def test_what_cannot_be_read_is_told_by_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        GGUFFile.open(tmp_path / "away.gguf")
    with pytest.raises(IsADirectoryError):
        GGUFFile.open(tmp_path)


SOUND = content(
    [
        ARCH,
        key("tokenizer.x", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("bc")),
        key("toy.f", F32, b"\0\0\0\1"),
    ],
    [tensor("a", [32, 2], kind=8), tensor("b", [8], offset=96)],
    b"\1" * 128,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mutated") / "toy.gguf"
    path.write_bytes(SOUND)
    assert set(GGUFFile.open(path).tensors) == {"a", "b"}
    return path


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), max_size=4),
    length=st.one_of(st.just(len(SOUND)), st.integers(0, len(SOUND))),
)
def test_a_changed_or_cut_file_is_read_or_refused(scratch, changes, length):
    mutated = bytearray(SOUND)
    for place, value in changes:
        mutated[place] = value
    scratch.write_bytes(mutated[:length])
    try:
        GGUFFile.open(scratch, with_vocabulary=False)
        file = GGUFFile.open(scratch)
    except GGUFError as error:
        assert "toy.gguf" in str(error)
        return
    assert sum(tensor.data.nbytes for tensor in file.tensors.values()) <= length
    for read in file.tensors.values():
        read.data.sum()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, len(SOUND) // 4 - 1), value=st.sampled_from([2**31, 2**32 - 1, 2**16, 9, 8, 0]))
def test_a_changed_count_is_read_or_refused(scratch, place, value):
    mutated = bytearray(SOUND)
    mutated[place * 4 : place * 4 + 4] = struct.pack("<I", value)
    scratch.write_bytes(mutated)
    try:
        GGUFFile.open(scratch, with_vocabulary=False)
        GGUFFile.open(scratch)
    except GGUFError as error:
        assert "toy.gguf" in str(error)
