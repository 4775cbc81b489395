"""Checkpoints' own code in tests: transformers copies it, and Python remembers it."""

import sys
from pathlib import Path

import pytest


def fresh_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers copy code to ``folder`` from now on, and forget what was imported from another one."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    others = [entry for entry in sys.path if (Path(entry) / "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in others])  # transformers adds folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
