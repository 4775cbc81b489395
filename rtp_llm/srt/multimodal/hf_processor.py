"""A checkpoint's processor, in the parts that transformers loads."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoVideoProcessor


class HfProcessor:
    """Parts of a checkpoint's processor, as transformers loads them; each is None where there is none.

    Called, it is the checkpoint's own processor. That of many models needs torchvision, for videos at least, so it is
    loaded only on use. Image processors are those on PIL and numpy, if the model has one.

    ``video_settings`` are those of the video processor, read from the checkpoint's files, for our own processors.

    Args:
        model_path: the checkpoint's directory.
        tokenizer: encodes the prompts.
    """

    def __init__(self, model_path: str, tokenizer: Any, trust_remote_code: bool = False) -> None:
        self.tokenizer = tokenizer
        self._model_path = model_path
        self._options = {"trust_remote_code": trust_remote_code}

    @cached_property
    def image_processor(self) -> Any:
        if not self.image_settings:
            return None
        return AutoImageProcessor.from_pretrained(self._model_path, backend="pil", **self._options)

    @cached_property
    def video_processor(self) -> Any:
        try:
            return AutoVideoProcessor.from_pretrained(self._model_path, **self._options)
        except (ImportError, OSError, ValueError):  # no torchvision, or the checkpoint has none
            return None

    @cached_property
    def image_settings(self) -> dict[str, Any]:
        return self._settings("image_processor", "preprocessor_config.json")

    @cached_property
    def video_settings(self) -> dict[str, Any]:
        return self._settings("video_processor", "video_preprocessor_config.json", "preprocessor_config.json")

    def _settings(self, part: str, *files: str) -> dict[str, Any]:
        """Read settings from the first of these files that exists, or from the part of processor_config.json."""
        whole = _read_json(Path(self._model_path) / "processor_config.json")
        if part in whole:
            return whole[part]
        return next(filter(None, (_read_json(Path(self._model_path) / name) for name in files)), {})

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings of the processor as a whole, such as patch sizes and placeholder tokens."""
        return _read_json(Path(self._model_path) / "processor_config.json")

    @cached_property
    def whole(self) -> Any:
        """transformers' processor of the model.

        Raises:
            ValueError: it cannot be loaded.
        """
        try:
            return AutoProcessor.from_pretrained(self._model_path, **self._options)
        except (ImportError, OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"transformers cannot make the processor of {self._model_path} here: {str(error).strip()}; a "
                "BaseMultimodalProcessor that has a replacement() needs none"
            ) from error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.whole(*args, **kwargs)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def tokenizer_of(processor: Any) -> Any:
    """Return a processor's tokenizer, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)
