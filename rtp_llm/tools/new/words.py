"""Sources with other names in them."""

import ast
import re

_SUFFIXES = ("ForCausalLM", "LMHeadModel")


def with_stem(source: str, architecture: str, stem: str) -> str:
    """Rename the classes that are named by an architecture, so that they begin with another stem."""
    old = architecture
    for suffix in _SUFFIXES:
        old = old.removesuffix(suffix)
    classes = [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    names = {name: stem + name.removeprefix(old) for name in classes if name.startswith(old)}
    source = with_words(source, names | {architecture: f"{stem}ForCausalLM"})
    return re.sub(r'(?<=GGUFForm\()(\s*)"[^"]+"', r'\1"zeta"', source)  # not the other model's files


def with_words(text: str, names: dict[str, str]) -> str:
    """Replace whole words."""
    return re.sub(r"\b\w+\b", lambda match: names.get(match[0], match[0]), text)
