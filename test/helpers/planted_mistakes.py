"""Mistakes planted in model files, more than those of ``broken_models``: in dense models, mixtures of experts, latent
attention, and models that see. ``planted_mistakes.toml`` has them."""

import tomllib
from pathlib import Path
from typing import Any

from broken_models import BrokenModel


def _mistake(given: dict[str, Any]) -> BrokenModel:
    changes = tuple((change["old"], change["new"]) for change in given["changes"])
    names = ("checkpoint", "module", "part", "cause")
    return BrokenModel(
        given["name"], given["file"], changes, *(given[name] for name in names), config=given.get("config", {})
    )


_GROUPS = tomllib.loads((Path(__file__).parent / "planted_mistakes.toml").read_text(encoding="utf-8"))
PLANTED = tuple(_mistake(given) for group in _GROUPS.values() for given in group)
SEEING = tuple(_mistake(given) for given in _GROUPS["seeing"])
