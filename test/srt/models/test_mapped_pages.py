"""Reading weights leaves nothing of the files in memory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rtp_llm.srt.models.mapped_pages import MappedFile, mapped_ranges, release
from rtp_llm.srt.models.weight_files import read_weights

SIZE = 1 << 20  # floats: 4 MiB


def resident_bytes(path: Path) -> int:
    """How much of a file is in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            inside = line.endswith(str(path.resolve()))
        elif inside and words[0] == "Rss:":
            total += int(words[1]) * 1024
    return total


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = {f"layer.{i}": torch.randn(SIZE) + i for i in range(3)}
    path = tmp_path / request.param
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path, tensors


def test_pages_go_when_the_next_tensor_is_asked_for(checkpoint: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = checkpoint
    kept = []
    for name, tensor in read_weights([path]):
        assert torch.equal(tensor, tensors[name])
        assert 0.9 * tensor.nbytes < resident_bytes(path) < 1.5 * tensor.nbytes, "this tensor's pages, and no others'"
        kept.append((name, tensor))
    assert resident_bytes(path) < 0.2 * tensors["layer.0"].nbytes
    for name, tensor in kept:
        assert torch.equal(tensor, tensors[name]), "a tensor that is kept is read again"


def test_memory_without_a_file_behind_it_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"x" * (1 << 16))
    mapped = MappedFile(path)
    tensor = torch.ones(SIZE)
    mapped.drop(tensor)
    assert tensor.sum() == SIZE
    view = torch.from_file(str(path), size=1 << 16, dtype=torch.uint8)
    assert len(mapped_ranges(path.resolve())) == 1 and int(view.sum()) == ord("x") << 16


def test_what_was_read_is_released(checkpoint: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """Only of files that are in use: other memory would lose its content."""
    path, tensors = checkpoint
    bystander = torch.ones(SIZE)
    for name, tensor in read_weights([path]):
        first, second = tensor.split(SIZE // 2)
        assert first.sum() != second.sum()
        release(first)
        release(bystander)
        assert 0.9 * second.nbytes < resident_bytes(path) < 1.5 * second.nbytes
        assert torch.equal(tensor, tensors[name])
    assert bool(bystander.all())
