"""Which files the index of a checkpoint may name: its own."""

import json
from pathlib import Path

import pytest

from rtp_llm.srt.models.weight_files import WeightFileError, find_weight_files

INDEX = "model.safetensors.index.json"


def write_index(folder: Path, *names: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"weight_map": {f"tensor{i}": name for i, name in enumerate(names)}}))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside.safetensors"
    path.touch()
    return path


@pytest.mark.parametrize("name", ["../outside.safetensors", "{outside}", "sub/../../outside.safetensors", "..", "/"])
def test_paths_out_of_the_directory_are_refused_by_name(tmp_path: Path, outside: Path, name: str) -> None:
    name = name.format(outside=outside)
    write_index(tmp_path / "checkpoint", "good.safetensors", name)
    with pytest.raises(WeightFileError, match="which is refused") as caught:
        find_weight_files(str(tmp_path / "checkpoint"))
    assert INDEX in str(caught.value) and repr(name) in str(caught.value)


@pytest.mark.parametrize("linked", ["file", "folder", "loop"])
def test_links_out_of_the_directory_are_refused_by_name(tmp_path: Path, outside: Path, linked: str) -> None:
    folder = tmp_path / "checkpoint"
    name = {"file": "one.safetensors", "folder": "sub/outside.safetensors", "loop": "loop.safetensors"}[linked]
    write_index(folder, name)
    if linked == "folder":
        (folder / "sub").symlink_to(tmp_path)
    else:
        (folder / name).symlink_to(outside if linked == "file" else folder / name)
    with pytest.raises(WeightFileError, match="which is refused") as caught:
        find_weight_files(str(folder))
    assert repr(name) in str(caught.value)


def test_the_checkpoints_own_files_are_found(tmp_path: Path) -> None:
    """In subfolders, by links within the directory, and in a directory that is a link itself."""
    folder = tmp_path / "real"
    write_index(folder, "one.safetensors", "sub/two.safetensors", "three.safetensors")
    (folder / "sub").mkdir()
    for name in ("one.safetensors", "sub/two.safetensors"):
        (folder / name).touch()
    (folder / "three.safetensors").symlink_to("sub/two.safetensors")
    (tmp_path / "link").symlink_to(folder)
    for directory in (folder, tmp_path / "link"):
        names = [str(path.relative_to(directory)) for path in find_weight_files(str(directory))]
        assert names == ["one.safetensors", "sub/two.safetensors", "three.safetensors"]


def test_snapshots_of_the_hubs_cache_link_to_blobs(tmp_path: Path, outside: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abcd"
    write_index(snapshot, "model-1.safetensors")
    (repository / "blobs").mkdir()
    (repository / "blobs" / "hash").touch()
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/hash")
    assert find_weight_files(str(snapshot)) == [snapshot / "model-1.safetensors"]
    (snapshot / "model-1.safetensors").unlink()
    (snapshot / "model-1.safetensors").symlink_to("../../../outside.safetensors")
    with pytest.raises(WeightFileError, match="a link out of the directory"):
        find_weight_files(str(snapshot))


@pytest.mark.parametrize(
    "text", ["[]", "1", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["x"]}}', "[" * 100_000]
)
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(WeightFileError, match=f"{INDEX} is not an index"):
        find_weight_files(str(tmp_path))
