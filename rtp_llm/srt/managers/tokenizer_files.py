"""Diagnosis of a directory without a usable tokenizer."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rtp_llm.srt.managers.sentencepiece_tokenizer import read_model

VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tiktoken.model", "*.tiktoken",
)  # fmt: skip
_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_PACKAGES = {
    "tokenizer.model": ("sentencepiece", "google.protobuf", "tiktoken"),
    "spiece.model": ("sentencepiece", "google.protobuf"),
    "sentencepiece.bpe.model": ("sentencepiece", "google.protobuf"),
    "tiktoken.model": ("tiktoken",),
    "*.tiktoken": ("tiktoken",),
}
_POINTER = b"version https://git-lfs"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s")


def complaint(directory: Path, trust_remote_code: bool) -> str | None:
    """Return why a directory gives no tokenizer, and what to do; None if no reason is found."""
    for name in _JSON_FILES:
        wrong = _wrong_with_json(directory / name)
        if wrong:
            return f"{name} {wrong}: download it again"
    config = _json(directory / "tokenizer_config.json") or {}
    if "AutoTokenizer" in (config.get("auto_map") or {}) and not trust_remote_code:
        return "it brings its own code, which runs only with --trust-remote-code"
    found = [name for name in VOCABULARIES if any(directory.glob(name))]
    if not found:
        names = ", ".join(VOCABULARIES)
        return f"it has no vocabulary: none of {names}. Copy these files from the model that this one was made of"
    return _missing_package(found) or _wrong_with_vocabulary(directory, found)


def _missing_package(found: list[str]) -> str | None:
    packages = [package for name in found for package in _PACKAGES.get(name, ())]
    missing = [package for package in dict.fromkeys(packages) if not _is_installed(package)]
    if "tokenizer.json" in found or not missing:
        return None
    names = " ".join(package.removeprefix("google.") for package in missing)
    return f"reading {found[0]} takes the package {names}: pip install {names}"


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the parent
        return False


def _wrong_with_vocabulary(directory: Path, found: list[str]) -> str | None:
    if found == ["vocab.json"] and not (directory / "merges.txt").is_file():
        return "vocab.json needs merges.txt beside it, which is missing: copy it from where this file comes from"
    if found == ["*.tiktoken"]:
        names = ", ".join(sorted(path.name for path in directory.glob("*.tiktoken")))
        return f"{names} is read by code of the checkpoint's own, which it does not bring; a tokenizer.json would do"
    return next((wrong for name in found if (wrong := _wrong_with_model(directory / name))), None)


def _wrong_with_model(path: Path) -> str | None:
    if path.suffix != ".model" or (path.parent / "tokenizer.json").exists():
        return None
    start = path.read_bytes()[: len(_POINTER)]
    if start == _POINTER:
        return f"{path.name} is a Git LFS pointer, not the file itself: download it again"
    if read_model(path) is not None or _TIKTOKEN_LINE.match(start):
        return None
    state = "neither a sentencepiece model nor a tiktoken vocabulary" if start else "empty"
    return f"{path.name} is {state}: download it again"


def _wrong_with_json(path: Path) -> str | None:
    if not path.is_file():
        return None
    start = path.read_bytes()[: len(_POINTER)]
    if start == _POINTER:
        return "is a Git LFS pointer, not the file itself"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})" if start else "is empty"
    return None if isinstance(value, dict) else f"must hold a JSON object, not {type(value).__name__}"


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
