"""``rtp-llm port --check``: whether the ported file answers as transformers does, on a tiny checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rtp_llm.port.source import PortError
from rtp_llm.tools.schedules import ON_ONE_RANK, SCHEDULES
from rtp_llm.tools.tiny_check import TinyCheck, check_file


def check_port(ported: Path, config_path: Path, architectures: Sequence[str], two_ranks: bool = False) -> TinyCheck:
    """Compare a ported file with transformers, in float32, under the engine's schedules.

    Args:
        ported: the file that was written.
        config_path: a config.json, or the folder with it. A tiny checkpoint of the same structure is made.
        architectures: those of the file; the one that the configuration names is compared, or else the first.
        two_ranks: ask it on two ranks, too.

    Raises:
        PortError: there is no such configuration.
    """
    config = read_config(config_path)
    named = config.get("architectures") or architectures
    architecture = next((name for name in architectures if name in named), named[0])
    class_name = architecture if architecture in architectures else architectures[0]
    return check_file(ported, named[0], config, SCHEDULES if two_ranks else ON_ONE_RANK, class_name)


def read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PortError(f"--check: {file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise PortError(f"--check: {file} holds no JSON object, which a model's configuration is")
    return config
