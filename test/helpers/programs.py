"""Programs of others, each in a process of its own: what they leave open or change stays there."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = {"OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
TIMEOUT_S = 300


def check_installed(module: str) -> None:
    """Skip a test without this module, which this process does not import."""
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed: make test-all installs it")


def result_of(script: str, folder: Path, *, timeout_s: float = TIMEOUT_S, **environment: str) -> Any:
    """Run a script in this folder; return the value that it prints as JSON after "RESULT "."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=folder,
        env=os.environ | ENVIRONMENT | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("RESULT ")[2])
