"""The files of a GGUF's checkpoint folder."""

import json
from pathlib import Path

from rtp_llm.srt.gguf.config import check_architecture, config_json
from rtp_llm.srt.gguf.file import GGUFFile
from rtp_llm.srt.gguf.generation import generation_config
from rtp_llm.srt.gguf.header import GGUFError
from rtp_llm.srt.gguf.tokenizer import write_tokenizer

_NO_TOKENIZER = (None, "no_vocab", "none")  # values of tokenizer.ggml.model


def write_folder(folder: Path, path: Path, with_tokenizer: bool) -> None:
    """Write the files into ``folder``. The tokenizer comes first: its memory is free again when the model's file, which
    config.json needs, imports torch.

    Args:
        path: the GGUF, or any part of one.

    Raises:
        GGUFError: the file is damaged, or of a kind that is not supported.
        ModelImportError, DuplicateModelError: the model's file cannot be used.
        OSError: a file cannot be read or written.
    """
    file = GGUFFile.open(path)
    check_architecture(file)
    for part in file.paths:
        name = part.name if part.suffix == ".gguf" else f"{part.stem}.gguf"  # as weight files are found
        (folder / name).symlink_to(part.resolve())
    if with_tokenizer and file.metadata.get("tokenizer.ggml.model") not in _NO_TOKENIZER:
        try:
            write_tokenizer(file.metadata, folder)
        except GGUFError as error:
            raise GGUFError(f"{file.paths[0]}: {error}") from None
    for name, value in (("generation_config.json", generation_config(file)), ("config.json", config_json(file))):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
