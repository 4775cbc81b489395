"""What the text of a model file says of the classes in it, without importing it."""

import ast
import re
import sys
from dataclasses import dataclass
from typing import Self

# Where models from elsewhere are named: an environment variable, and entry points of installed packages.
PACKAGE_VARIABLE = "RTP_LLM_EXTERNAL_MODEL_PACKAGE"
ENTRY_POINT_GROUP = "rtp_llm.models"

CONFIG_CLASS = "config_class"  # the attribute of a model class that names its configuration's class

_GGUF_FORM_TEXT = re.compile(r"""\bGGUFForm\(\s*(?:architecture\s*=\s*)?["']([^"']+)["']""")
_POOLED_TEXT = re.compile(r"^\s+generates\b[^=\n]*=\s*False\b", re.MULTILINE)
_ENTRY_CLASS_TEXT = re.compile(r"^EntryClass\b[^=\n]*=\s*([\[(][\w\s,]*|\w+)", re.MULTILINE)

# Beginnings of modules that are no part of a model's file: the engine's, and libraries that it calls.
_NOT_MODEL_FILES = ("rtp_llm.srt.", "torch.", "transformers.", "numpy.", "huggingface_hub.", "safetensors.")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What the text of a model file says of its classes together.

    ``config_is_own``: one may name a configuration class. ``gguf_architectures``: those of the GGUF files that they
    read. ``generates``: they make tokens; else all of them have pooled outputs in place of these.
    """

    config_is_own: bool
    gguf_architectures: frozenset[str]
    generates: bool = True

    @classmethod
    def of(cls, text: str) -> Self:
        forms = frozenset(_GGUF_FORM_TEXT.findall(text))
        return cls(CONFIG_CLASS in text, forms, generates=_POOLED_TEXT.search(text) is None)


def generates(entry: object) -> bool:
    """Return whether a model class makes tokens, or the classes of an object with the ``source`` of their file do."""
    source = getattr(entry, "source", None)
    return getattr(source if isinstance(source, ModelSource) else entry, "generates", True) is not False


def entry_class_names(source: str, filename: str) -> list[str]:
    """Return the class names that a module's source assigns to ``EntryClass``; empty if it does not assign it.

    If the source is not valid Python, they are searched in its text, so that loading one shows the syntax error.

    Raises:
        SyntaxError: the source is not valid Python, and no names are found in it.
        ValueError: ``EntryClass`` is not written as a name or a list or tuple of names.
    """
    try:
        statements = ast.parse(source, filename).body
    except SyntaxError:
        matches = _ENTRY_CLASS_TEXT.findall(source)
        if not matches:
            raise
        return re.findall(r"\w+", matches[-1])
    names: list[str] = []
    for statement in statements:
        value = _entry_class_value(statement)
        if value is None:
            continue
        items = value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value]
        names = [item.id for item in items if isinstance(item, ast.Name)]
        if len(names) < len(items):
            raise ValueError(
                f"line {statement.lineno}: EntryClass must be a class name or a list or tuple of class names"
            )
    return names


def _entry_class_value(statement: ast.stmt) -> ast.expr | None:
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    if any(isinstance(target, ast.Name) and target.id == "EntryClass" for target in targets):
        return statement.value  # type: ignore[attr-defined]
    return None


def is_model_file(module: str) -> bool:
    """Whether a module may be a model's file or a part of it, neither the engine's nor a library's below it."""
    return not f"{module}.".startswith(_NOT_MODEL_FILES) and module.partition(".")[0] not in sys.stdlib_module_names
