"""The class that ``--model-class`` names."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import nn

from rtp_llm.srt.configs.model_config import read_architectures
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.models.registry import ModelImportError, ModelRegistry, reason
from rtp_llm.tools.verify.options import VerifyError


@contextmanager
def registered(args: ServerArgs, model_class: str | None) -> Iterator[None]:
    """Register ``model_class`` for the checkpoint's architectures within the context, in which its configuration is to
    be read: the class may name its own."""
    if model_class is None:
        yield
        return
    cls, overrides = load_class(model_class), ModelRegistry.models.overrides
    before = dict(overrides)
    for arch in read_architectures(args):
        ModelRegistry.models[arch] = cls
    try:
        yield
    finally:
        overrides.clear()
        overrides.update(before)


def load_class(place: str) -> type[nn.Module]:
    """Load ``module:Class`` or ``path/to/file.py:Class``.

    Raises:
        VerifyError: the text has another form, or there is no such file or class.
        ModelImportError: the file cannot be imported; the cause is chained.
    """
    module_name, _, name = place.rpartition(":")
    if not module_name or not name:
        raise VerifyError(f"--model-class must be module:Class or FILE.py:Class, not {place!r}")
    if module_name.endswith(".py") and not Path(module_name).is_file():
        raise VerifyError(f"--model-class: there is no file {module_name}")
    try:
        module = _import_file(Path(module_name)) if module_name.endswith(".py") else import_module(module_name)
    except Exception as error:  # of any kind; the cause is chained
        raise ModelImportError(f"{module_name} cannot be imported: {reason(error)}") from error
    try:
        found = attrgetter(name)(module)
    except AttributeError as error:
        raise VerifyError(f"--model-class: {module_name} has no class {name}") from error
    if not isinstance(found, type):
        raise VerifyError(f"--model-class: {place} is not a class")
    return found


def _import_file(path: Path) -> Any:
    spec = spec_from_file_location(f"verified_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module  # the class's processor is searched there
    spec.loader.exec_module(module)
    return module
