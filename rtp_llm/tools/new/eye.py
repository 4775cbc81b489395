"""A model file of ours as the language model of a new architecture that sees."""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.tools.new.names import NewModelError
from rtp_llm.tools.new.words import with_stem, with_words

STEM = "ZetaText"  # of the language model's classes
TEXT_MODEL = f"{STEM}ForCausalLM"
LANGUAGE_MODEL = 'LlamaModel(config.text_config, quant_config, add_prefix("language_model", prefix))'
MODEL_OF_TEXT = f"""{TEXT_MODEL}.base_model_type(
            config.text_config,
            quant_config,
            add_prefix("language_model", prefix),
            {TEXT_MODEL}.attention_type,
            {TEXT_MODEL}.layer_type,
        )"""
# What a causal language model may say of itself that the model with an eye takes over, or does not need.
_TAKEN_OVER = ("packed_modules_mapping", "rename", "ignore", "attention_type", "layer_type", "base_model_type")
_NOT_NEEDED = ("gguf", "config_class")


def with_an_eye(
    source: str, architecture: str, config_type: Any, path: Path, templates: dict[str, str]
) -> dict[str, str]:
    """Return the files of a model that sees, whose language model is that of a model file.

    Args:
        source: of the model file at ``path``, which has this architecture.
        config_type: of its configuration, transformers' class.
        templates: the files with Llama as the language model.

    Raises:
        NewModelError: the language model cannot be taken apart from its head.
    """
    model_class = getattr(import_module(f"rtp_llm.models_py.{path.stem}"), architecture)
    _check(model_class, path.name)
    words = {"LlamaModel": MODEL_MAPPING_NAMES[config_type.model_type], "LlamaConfig": config_type.__name__}
    files = {name: with_words(text, words) for name, text in templates.items() if not name.startswith("zeta")}
    files["make_tiny.py"] = _maker(files["make_tiny.py"], config_type.__name__)
    return files | {"zeta.py": _model_file(source, architecture, model_class, path.name, templates["zeta.py"])}


def _check(model_class: Any, file: str) -> None:
    if not issubclass(model_class, LlamaForCausalLM):
        raise NewModelError(
            f"--sees needs a language model of Llama's frame, and {model_class.__name__} of {file} is none: begin with "
            "another file, such as llama or qwen3, and change the language model in the files"
        )
    kinds = model_class.__mro__[: model_class.__mro__.index(LlamaForCausalLM)]
    own = {name for kind in kinds for name in vars(kind) if name == "__init__" or not name.startswith("__")}
    own -= {*_TAKEN_OVER, *_NOT_NEEDED}
    if own:
        names = ", ".join(sorted(own))
        raise NewModelError(
            f"--sees takes the language model of {file} alone, but its {model_class.__name__} has {names} "
            "besides: begin with another file, such as llama or qwen3, and change the language model in the files"
        )


def _maker(text: str, config_name: str) -> str:
    """Return the maker of a tiny checkpoint with sizes by the names of the configuration's fields."""
    start, end = text.index("TEXT_SIZES = {"), text.index("CHAT_TEMPLATE")
    text = text[:start] + text[end:]
    sizes = f'tiny_config({config_name}, overrides={{"vocab_size": len(tokenizer)}}).to_dict()'
    text = _replaced(text, 'TEXT_SIZES | {"vocab_size": len(tokenizer)}', sizes)
    text = _replaced(
        text, "import CLIPImageProcessor, LlavaProcessor", f"import CLIPImageProcessor, LlavaProcessor, {config_name}"
    )
    helper = "from rtp_llm.tools.tiny_checkpoint import character_tokenizer, disturb\n"
    return _replaced(text, helper, f"{helper}from rtp_llm.tools.tiny_config import tiny_config\n")


def _model_file(source: str, architecture: str, model_class: Any, file: str, template: str) -> str:
    """Return the classes of the language model, then those of the eye and of the whole."""
    imports, classes = _split(with_stem(source, architecture, STEM))
    more_imports, more_classes = _split(template)
    more_imports = _replaced(more_imports, "from rtp_llm.models_py.llama import LlamaModel\n", "")
    more_classes = _replaced(more_classes, LANGUAGE_MODEL, MODEL_OF_TEXT)
    head = "class ZetaForConditionalGeneration(ImageTextModel):\n"
    more_classes = _replaced(more_classes, head, head + _declarations(model_class))
    said = "config.json: ``text_config`` is Llama's, and ``eye_config`` what stands there."
    more_classes = _replaced(more_classes, said, "config.json, ``text_config`` and ``eye_config`` among them.")
    entry = classes.index("EntryClass")
    docstring = f'"""Zeta: so far the language model of {file} with an eye for images of one size, to be changed."""'
    return f"{docstring}\n\n{more_imports}{imports}\n\n{classes[:entry]}{more_classes}"


def _declarations(model_class: Any) -> str:
    """Return the lines of the class body by which the whole model has what the language model says of itself."""
    lines = [f"    packed_modules_mapping = {TEXT_MODEL}.packed_modules_mapping\n"]
    rename = [_below(*rule) for rule in getattr(model_class, "rename", ())]
    if rename:
        rules = "".join(f'        (r"{pattern}", r"{name}"),\n' for pattern, name in rename)
        lines.append(f"    rename = [\n{rules}    ]\n")
    ignore = [_below(pattern, "")[0] for pattern in getattr(model_class, "ignore", ())]
    if ignore:
        lines.append("    ignore = [" + ", ".join(f'r"{pattern}"' for pattern in ignore) + "]\n")
    return "".join(lines)


def _below(pattern: str, name: str) -> tuple[str, str]:
    """Return a rule of renaming for a language model that is ``model.language_model``, not ``model``."""
    pattern = pattern.replace(r"^model\.", r"^model\.language_model\.", 1)
    return pattern, f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def _split(source: str) -> tuple[str, str]:
    """Return a file's imports, and what follows them."""
    nodes = [node for node in ast.parse(source).body if not isinstance(node, ast.Expr)]
    first = next(node for node in nodes if not isinstance(node, (ast.Import, ast.ImportFrom, ast.If)))
    decorators = getattr(first, "decorator_list", [])
    start, end = nodes[0].lineno - 1, (decorators[0] if decorators else first).lineno - 1
    lines = source.splitlines(keepends=True)
    while lines[end - 1].startswith("#"):
        end -= 1
    return "".join(lines[start:end]).rstrip() + "\n", "".join(lines[end:])


def _replaced(text: str, old: str, new: str) -> str:
    if old not in text:
        raise AssertionError(f"the template has no {old!r}")
    return text.replace(old, new)
