"""A hub of one repository, in place of huggingface_hub's snapshot_download."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import DryRunError

from rtp_llm.srt.configs import gguf_path, model_path


class FakeHub:
    """A repository is a list of file names, or a folder ``source`` whose files are copied."""

    def __init__(self, directory: Path, files: list[str], source: Path | None = None, offline: bool = False) -> None:
        self.directory, self.files, self.source, self.offline = directory, files, source, offline
        self.calls: list[dict[str, Any]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (model_path, gguf_path):
            monkeypatch.setattr(module, "snapshot_download", self)

    def __call__(
        self,
        repo_id: str,
        *,
        allow_patterns: list[str],
        ignore_patterns: list[str] | None = None,
        dry_run: bool = False,
        **kwargs: Any,
    ) -> str | list[SimpleNamespace]:
        self.calls.append({"repo_id": repo_id, **kwargs})
        wanted = huggingface_hub.utils.filter_repo_objects(
            self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        if dry_run and self.offline:
            raise DryRunError("Dry run cannot be performed")
        if dry_run:
            return [SimpleNamespace(filename=name) for name in wanted]
        for name in [] if self.offline else wanted:
            path = self.directory / name
            path.parent.mkdir(exist_ok=True)
            path.touch()
            if self.source:
                path.write_bytes((self.source / name).read_bytes())
        return str(self.directory)
