"""Where in a model file of ours a place is computed: what is to be read, and corrected."""

import inspect
import sys
from types import FrameType
from typing import Any

from torch import nn

from rtp_llm.srt.model_traits import ModelTraits
from rtp_llm.tools.verify.trace import INPUT, CallSite

_PASSED_OVER = ("torch.", "rtp_llm.srt.layers.", "rtp_llm.srt.utils", "rtp_llm.tools.verify.")
_LIBRARIES = ("rtp_llm.srt.", "torch.")


def call_sites(model: nn.Module) -> tuple[CallSite, ...]:
    """Return the lines of model files from which the running code is called, the innermost first, without those of
    ``model``'s own methods."""
    found: list[CallSite] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_locals.get("self") is not model:
        name = f"{frame.f_globals.get('__name__')}."
        if not name.startswith(_PASSED_OVER):
            if name.startswith(_LIBRARIES):
                break
            found.append(CallSite(frame.f_code.co_qualname, frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def source_of(model: nn.Module, name: str, part: str, sites: dict[str, tuple[CallSite, ...]]) -> str:
    """Return where a place of our model is computed: in the model's own file, if anything there has to do with it: the
    module's forward, the line that calls it, or the class around it; else in the file that the module is from.

    Args:
        sites: of our modules' calls, by name.
    """
    modules = dict(model.named_modules())
    name = _module_name(model, name, modules)
    own = type(model).__module__
    kind = type(modules[name])
    if name and part != INPUT and kind.__module__ == own:
        return _class_text(kind)
    file = inspect.getsourcefile(type(model))
    line = next((site for site in sites.get(name, ()) if site.filename == file), None)
    if line is not None:
        return str(line)
    parents = [".".join(name.split(".")[:length]) for length in range(name.count("."), 0, -1)]
    around = next((type(modules[p]) for p in parents if type(modules[p]).__module__ == own), None)
    if around is not None:
        return _class_text(around)
    chain = [type(modules[p]) for p in (name, *parents, "")]
    kind = next((kind for kind in chain if not f"{_forward(kind).__module__}.".startswith(_LIBRARIES)), chain[-1])
    return _class_text(kind)


def _module_name(model: nn.Module, name: str, modules: dict[str, nn.Module]) -> str:
    """Return our module of a checkpoint name: itself, the packed one that it is a part of, or one around it."""
    parent, _, last = name.rpartition(".")
    packed = ModelTraits.of(model).packed_modules_mapping
    holders = [name, *(f"{parent}.{key}" for key, sources in packed.items() if last in sources)]
    found = next((holder for holder in holders if holder in modules), None)
    return found if found is not None else _module_name(model, parent, modules)


def _class_text(kind: type[nn.Module]) -> str:
    """Return a class's forward; of one that inherits it from another module, the class itself."""
    forward = _forward(kind)
    if forward.__module__ == kind.__module__:
        return f"{kind.__name__}.forward, {forward.__code__.co_filename}:{forward.__code__.co_firstlineno}"
    return f"{kind.__name__}, {inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind)[1]}"


def _forward(kind: type[nn.Module]) -> Any:
    return kind.forward
