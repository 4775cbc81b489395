"""The sources that a new architecture begins with: our templates, or a model file of ours under another name."""

import re
from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import rtp_llm
from rtp_llm.srt.configs.model_config import is_multimodal_model
from rtp_llm.srt.models.model_source import entry_class_names
from rtp_llm.tools.new.eye import with_an_eye
from rtp_llm.tools.new.names import NewModelError
from rtp_llm.tools.new.options import DEFAULT_LIKE
from rtp_llm.tools.new.words import with_stem, with_words

TEMPLATES = Path(__file__).parent / "templates"
MODEL_FILE = "zeta.py"
TEST = "test_zeta.py"
REFERENCE = ("configuration_zeta.py", "modeling_zeta.py", "make_tiny.py")
ARCHITECTURE = "ZetaForCausalLM"


def sources(like: str, sees: bool) -> dict[str, str]:
    """Return the model file, its test and the three files of the reference, by name, with Zeta as the architecture's
    name.

    Args:
        like: a file of ``models_py``, without its ending; of a model that sees, its language model.
        sees: the model takes images.

    Raises:
        NewModelError: there is no such file, or it cannot be begun with.
    """
    like = like.removesuffix(".py")
    if like == DEFAULT_LIKE:
        return _read("sees" if sees else "text", (MODEL_FILE, TEST, *REFERENCE))
    path = Path(rtp_llm.__file__).parent / "models_py" / f"{like}.py"
    if not path.is_file():
        names = sorted(file.stem for file in path.parent.glob("*.py") if file.stem not in ("__init__", "transformers"))
        raise NewModelError(f"there is no model file {like}.py; have {', '.join(names)}")
    source = path.read_text(encoding="utf-8")
    architecture = _architecture(source, path)
    config_type = getattr(transformers, architecture).config_class
    if sees:
        return with_an_eye(source, architecture, config_type, path, _read("sees", (MODEL_FILE, TEST, *REFERENCE)))
    replaced = {"LlamaForCausalLM": architecture, "LlamaConfig": config_type.__name__}
    reference = {
        name: with_words(text, replaced) for name, text in _read("like", REFERENCE).items()
    }  # in which Llama stands for what is begun with
    model_file = renamed(source, architecture, config_type.__name__, path.name)
    return {MODEL_FILE: model_file, **_read("text", (TEST,)), **reference}


def _read(folder: str, names: Sequence[str]) -> dict[str, str]:
    return {name: (TEMPLATES / folder / name).read_text(encoding="utf-8") for name in names}


def _architecture(source: str, path: Path) -> str:
    """Return the architecture of a model file that transformers has a causal language model for."""
    names = entry_class_names(source, str(path))
    if any(is_multimodal_model(name) for name in names):
        raise NewModelError(
            f"{path.name} takes images: begin with --sees, which writes an eye, and look at {path.name} for how it "
            "differs"
        )
    known = [name for name in names if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()]
    if not known:
        raise NewModelError(
            f"transformers has no causal language model {', '.join(names)}, so a reference cannot begin with it; begin "
            "with another file, such as llama"
        )
    return known[0]


def renamed(source: str, architecture: str, config_name: str, file: str) -> str:
    """Return a model file whose classes are Zeta's: those that are named by its architecture, and its configuration.

    Args:
        config_name: of transformers' configuration class, whose fields the file reads.
    """
    source = with_stem(source, architecture, "Zeta")
    lines = source.splitlines()
    lines[0] = f'"""Zeta: so far the form of {file}, to be changed.' + ('"""' if lines[0].endswith('"""') else "")
    lines = _with_config(lines, config_name)
    entry = next(number for number, line in enumerate(lines) if line.startswith("EntryClass"))
    return "\n".join([*lines[:entry], f"EntryClass = {ARCHITECTURE}"]) + "\n"


def _with_config(lines: list[str], config_name: str) -> list[str]:
    """Insert the configuration class before the first class, its import, and a line that names it."""
    first_import = next(number for number, line in enumerate(lines) if line.startswith("from rtp_llm"))
    first_class = next(number for number, line in enumerate(lines) if re.match(r"class |@", line))
    model = next(number for number, line in enumerate(lines) if line.startswith(f"class {ARCHITECTURE}("))
    body = next(number for number in range(model, len(lines)) if lines[number].endswith(":")) + 1
    after_torch = lines[first_import - 2].startswith(("import torch", "from torch"))
    importing = [f"from transformers import {config_name}"]
    return [
        *lines[: first_import - 1 if after_torch else first_import],
        *importing,
        "",
        *lines[first_import:first_class],
        f"class ZetaConfig({config_name}):",
        '    model_type = "zeta"',
        "",
        "",
        *lines[first_class:body],
        "    config_class = ZetaConfig",
        *lines[body:],
    ]
