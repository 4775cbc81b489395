"""Where in a model file of ours a place is computed: what is to be read, and corrected."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn

from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.model_traits import ModelTraits
from rtp_llm.tools.verify.trace import ATTENDED, EMBEDDINGS, INPUT, CallSite, Trace

_PASSED_OVER = ("torch.", "rtp_llm.srt.layers.", "rtp_llm.srt.utils", "rtp_llm.tools.verify.")
_LIBRARIES = ("rtp_llm.srt.", "torch.")


def call_sites(model: nn.Module | None, built: nn.Module | None = None) -> tuple[CallSite, ...]:
    """Return the lines of model files from which the running code is called, the innermost first, without those of
    ``model``'s own methods and what calls these, nor those of the methods of the module that is ``built``."""
    found: list[CallSite] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (model is None or frame.f_locals.get("self") is not model):
        name = f"{frame.f_globals.get('__name__')}."
        is_own = built is not None and frame.f_locals.get("self") is built
        if not is_own and not name.startswith(_PASSED_OVER):
            if name.startswith(_LIBRARIES):
                break
            found.append(CallSite(frame.f_code.co_qualname, frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


Built = Mapping[int, tuple[CallSite, ...]]  # id of a module -> the lines that built it, the innermost first


@contextmanager
def constructions() -> Iterator[Built]:
    """Record the lines of model files that build modules within the context."""
    found: dict[int, tuple[CallSite, ...]] = {}
    original: Callable[..., None] = nn.Module.__init__

    def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        found[id(self)] = call_sites(None, built=self)

    nn.Module.__init__ = recorded  # type: ignore[method-assign]
    try:
        yield found
    finally:
        nn.Module.__init__ = original  # type: ignore[method-assign]


def source_of(
    model: nn.Module, module: str, part: str, trace: Trace, look: str = "", built: Built | None = None
) -> str:
    """Return where a place is computed, and where in the model's own file its module, or the attention in it, is built.

    Args:
        look: the module whose code, or whose call for embeddings, is to be read; empty: ``module``'s.
        trace: ours, with the lines of our modules' calls.
        built: the lines that built our modules.
    """
    text = _computed_at(model, module, part, trace, look)
    name = module_name(model, look or module)
    site = None if built is None or part in (INPUT, EMBEDDINGS) else _built_at(model, name, part, built)
    return text if site is None or str(site) in text else f"{text}; built by {site}"


def _built_at(model: nn.Module, name: str, part: str, built: Built) -> CallSite | None:
    """Return the line of the model's own file that gave a module its arguments; None: no such line, but one that only
    lists layers."""
    own, modules = inspect.getsourcefile(type(model)), dict(model.named_modules())
    around = modules[name]
    attention = (
        next((m for m in around.children() if isinstance(m, RadixAttention)), None) if part == ATTENDED else None
    )
    sites = built.get(id(around if attention is None else attention), ())
    return next((site for site in sites if site.filename == own and "<lambda>" not in site.function), None)


def _computed_at(model: nn.Module, module: str, part: str, trace: Trace, look: str) -> str:
    """Return where a place is computed: in the model's own file, if anything there has to do with it: the
    module's forward, the line that calls it, or the class around it; else in the file that the module is from."""
    modules = dict(model.named_modules())
    is_call = part == INPUT or (part == EMBEDDINGS and bool(look))
    name = module_name(model, look or module)
    own = type(model).__module__
    kind = type(modules[name])
    if name and kind.__module__ == own and (look != "" or not is_call) and part != EMBEDDINGS:
        return _class_text(kind)
    file = inspect.getsourcefile(type(model))
    lines = [site for site in trace.call_sites.get(name, ()) if site.filename == file]
    parents = [".".join(name.split(".")[:length]) for length in range(name.count("."), 0, -1)]
    around = next((p for p in parents if type(modules[p]).__module__ == own), None)
    is_first = part == INPUT and look == "" and _is_first(name, parents, trace)
    above = [] if around is None else [type(modules[p]) for p in _above(around, parents, "")]
    is_caller = bool(lines) and around is not None and _is_of(lines[0], above, model)
    if lines and (is_first or not is_caller):
        caller = f", called by {lines[1]}" if is_first and not is_caller and len(lines) > 1 else ""
        return f"{lines[0]}{caller}"
    if around is not None:
        return _class_text(type(modules[around]))
    chain = [type(modules[p]) for p in (name, *parents, "")]
    kind = next((kind for kind in chain if not f"{_forward(kind).__module__}.".startswith(_LIBRARIES)), chain[-1])
    return _class_text(kind)


def _above(name: str, parents: list[str], root: str) -> list[str]:
    return [*parents[parents.index(name) + 1 :], root]


def _is_of(site: CallSite, kinds: list[type[nn.Module]], model: nn.Module) -> bool:
    """Return whether a line is in a method of one of some classes: of the modules around the class that is meant."""
    names = {base.__name__ for kind in kinds for base in kind.__mro__ if base.__module__ == type(model).__module__}
    return site.function.partition(".")[0] in names


def _is_first(name: str, parents: list[str], trace: Trace) -> bool:
    """Return whether a module is the first that the module around it calls: then it is given what that is given."""
    if not parents:
        return False
    first = next((place for place in trace.tensors if place.module.startswith(f"{parents[0]}.")), None)
    return first is not None and first.module == name


def module_name(model: nn.Module, name: str) -> str:
    """Return our module of a checkpoint name: itself, the packed one that it is a part of, or one around it."""
    modules = dict(model.named_modules())
    parent, _, last = name.rpartition(".")
    packed = ModelTraits.of(model).packed_modules_mapping
    holders = [name, *(f"{parent}.{key}" for key, sources in packed.items() if last in sources)]
    found = next((holder for holder in holders if holder in modules), None)
    return found if found is not None else module_name(model, parent)


def _class_text(kind: type[nn.Module]) -> str:
    """Return a class's forward; of one that inherits it from another module, the class itself."""
    forward = _forward(kind)
    if forward.__module__ == kind.__module__:
        return f"{kind.__name__}.forward, {forward.__code__.co_filename}:{forward.__code__.co_firstlineno}"
    return f"{kind.__name__}, {inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind)[1]}"


def _forward(kind: type[nn.Module]) -> Any:
    return kind.forward
