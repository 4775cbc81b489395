"""Bounds in pyproject.toml: each dependency has a lower one, no higher than what is installed and pinned."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
DEPENDENCIES = [
    Requirement(text)
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
]


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in lines]
    return {canonicalize_name(match[1]): match[2] for match in found if match}


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=lambda dependency: dependency.name)
def test_a_dependency_has_a_lower_bound_that_is_met(dependency: Requirement) -> None:
    lower = [Version(bound.version) for bound in dependency.specifier if bound.operator in (">=", "==", "~=")]
    assert len(lower) == 1, f"{dependency} says not from which version on it works"
    installed = version(dependency.name)
    assert dependency.specifier.contains(installed, prereleases=True), f"{dependency}, but {installed} is installed"
    assert lower[0] <= Version(pinned()[canonicalize_name(dependency.name)]), f"{dependency} is above constraints.txt"


def test_there_are_dependencies() -> None:
    assert len(DEPENDENCIES) > 15
