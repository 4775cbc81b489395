"""Variants of a tiny checkpoint: with the tensors that published ones have, with another window or other steps.

Transformers saves what its own classes hold. Published checkpoints may lack tensors that nothing reads, and have
others, which transformers passes over.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rtp_llm.tools.tiny_checkpoint import model_class_of

_PLACELESS = re.compile(r"tensors? ha(?:s|ve) no place")
_UNSET = re.compile(r"^  ([\w.]+) \[([\d, ]+)\]", re.MULTILINE)
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
NO_LEAST_STEP = {"time_step_min": 1e-30}  # transformers takes its logarithm
_WINDOWS = ("sliding_window", "sliding_window_size")


def as_published(directory: Path, target: Path, problem: str) -> bool:
    """Write a checkpoint's variant with the tensors of a published one; return False where it has the same.

    Args:
        problem: what an error of loading says: parameters that no tensor set are added if transformers passes over
            tensors of that name. Those of experts that only return their input go. Tensors without a place get the
            names of transformers' modules, if it saves them under older ones.
    """
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not _returns_input(name, config)}
    if _PLACELESS.search(problem):
        renamed = _of_modules(directory, tensors, _UNSET.findall(problem))
        if renamed.keys() != tensors.keys():
            _copy(directory, target)
            save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
            return True
    sizes = {name: [int(size) for size in shape.split(",")] for name, shape in _UNSET.findall(problem)}
    added = {name: torch.ones(shape) for name, shape in sizes.items()}
    if kept.keys() | added.keys() == tensors.keys():
        return False
    _copy(directory, target)
    save_file(kept | added, target / "model.safetensors", metadata={"format": "pt"})
    return _is_passed_over(target, added)


def _of_modules(
    directory: Path, tensors: dict[str, torch.Tensor], placeless: list[tuple[str, str]]
) -> dict[str, torch.Tensor]:
    """Return the tensors, those without a place under the names of transformers' modules that have their values."""
    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    model_class: Any = model_class_of(architecture)
    free = {k: v for k, v in model_class.from_pretrained(directory).state_dict().items() if k not in tensors}
    renamed = dict(tensors)
    for name in (name for name, _ in placeless if name in tensors):
        parent = name.rpartition(".")[0].rpartition(".")[0]
        new = next((k for k, v in free.items() if k.startswith(f"{parent}.") and torch.equal(v, tensors[name])), None)
        if new is not None:
            renamed[new] = renamed.pop(name)
            del free[new]
    return renamed


def _returns_input(name: str, config: dict[str, Any]) -> bool:
    found = _EXPERT.search(name)
    return bool(found and config.get("zero_expert_num") and int(found[1]) >= config["n_routed_experts"])


def _is_passed_over(directory: Path, added: dict[str, torch.Tensor]) -> bool:
    """Whether transformers loads the checkpoint without a word about the tensors that were added."""
    if not added:
        return True
    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    model_class: Any = model_class_of(architecture)
    _, told = model_class.from_pretrained(directory, output_loading_info=True)
    return not told["unexpected_keys"]


def with_window(directory: Path, target: Path, change: int) -> bool:
    """Write a checkpoint's variant whose window has so many tokens more; return False where it has none."""
    config = json.loads((directory / "config.json").read_text())
    windows = {name: config[name] + change for name in _WINDOWS if isinstance(config.get(name), int)}
    if not windows:
        return False
    _copy(directory, target)
    (target / "config.json").write_text(json.dumps(config | windows))
    return True


def with_shorter_steps(directory: Path, target: Path) -> bool:
    """Write a checkpoint's variant whose state-space layers have next to no least step; return False where they have
    none."""
    config = json.loads((directory / "config.json").read_text())
    if not all(config.get(name) for name in NO_LEAST_STEP):
        return False
    _copy(directory, target)
    (target / "config.json").write_text(json.dumps(config | NO_LEAST_STEP))
    return True


def _copy(directory: Path, target: Path) -> None:
    shutil.copytree(directory, target, dirs_exist_ok=True)
