"""Limits on variables of a chat template that set a size: an indentation, or a number of repetitions.

A request may set variables (``chat_template_kwargs``). One that is used as a size can make a small
request take all memory, in a single instruction that no time limit can end.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rtp_llm.srt.chat.messages import ChatTemplateError

REPEATING = frozenset({"batch", "center", "expandtabs", "format", "ljust", "rjust", "slice", "zfill"})
INDENTING = frozenset({"indent", "tojson"})  # each of many lines
LIMITS = ((REPEATING, 4096), (INDENTING, 64))
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # marks for training, without output


def check_sizes(source: str, variables: Mapping[str, Any]) -> None:
    """Raise ChatTemplateError if a variable that sets a size in the template is a large number or a long text."""
    for sizing, limit in LIMITS:
        for name in size_variables(source, sizing) & variables.keys():
            if not _is_small(variables[name], limit):
                raise ChatTemplateError(
                    f"chat_template_kwargs: the model's chat template uses {name!r} as a size, which may be a number "
                    f"up to {limit} or a text of as many characters",
                    "chat_template_kwargs",
                )


def _is_small(value: Any, limit: int) -> bool:
    if isinstance(value, (int, float)):
        return abs(value) <= limit
    return value is None or (isinstance(value, str) and len(value) <= limit)


@lru_cache(maxsize=16)
def read_variables(source: str) -> frozenset[str]:
    """Return the names that a template reads and that it does not set itself before."""
    return frozenset(meta.find_undeclared_variables(_parsed(source)))


def _parsed(source: str) -> nodes.Template:
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    return environment.parse(GENERATION.sub("", source))


@lru_cache(maxsize=16)
def size_variables(source: str, sizing: frozenset[str]) -> frozenset[str]:
    """Return names whose value reaches, directly or through others, an argument of one of the filters or methods
    ``sizing``, or with REPEATING a product: rather too many than too few."""
    tree = _parsed(source)
    names = {name for node in tree.find_all(nodes.Expr) for part in _sizes(node, sizing) for name in _names(part)}
    flows = list(_flows(tree))
    while more := {name for target, origin in flows if target in names for name in origin} - names:
        names |= more
    return frozenset(names)


def _sizes(node: nodes.Expr, sizing: frozenset[str]) -> list[nodes.Node]:
    """Return the expressions that are sizes in ``node``."""
    if isinstance(node, (nodes.Mul, nodes.Pow, nodes.Mod)) and sizing is REPEATING:  # "%1000000s" % x
        return [node.left, node.right]
    if isinstance(node, nodes.Filter) and node.name in sizing:
        is_format = node.name == "format"
        return [*node.args, *(pair.value for pair in node.kwargs), *([node.node] if is_format and node.node else [])]
    if isinstance(node, nodes.Call):
        called = node.node
        name = called.attr if isinstance(called, nodes.Getattr) else getattr(called, "name", None)
        if name in sizing:
            said = [called.node] if name == "format" and isinstance(called, nodes.Getattr) else []
            return [*node.args, *(pair.value for pair in node.kwargs), *said]
    return []


def _names(node: nodes.Node) -> set[str]:
    found = {name.name for name in node.find_all(nodes.Name)}
    return found | {node.name} if isinstance(node, nodes.Name) else found


def _flows(tree: nodes.Template) -> Iterator[tuple[str, set[str]]]:
    """Yield (a name, the names that its value is made of): assignments, loops, and arguments of macros."""
    for assign in tree.find_all(nodes.Assign):
        origin = _names(assign.node)
        for target in _targets(assign.target):
            yield target, origin
    for loop in tree.find_all(nodes.For):
        origin = _names(loop.iter)
        for target in _targets(loop.target):
            yield target, origin
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    for macro in macros.values():
        for argument, default in zip(macro.args[len(macro.args) - len(macro.defaults) :], macro.defaults, strict=True):
            yield argument.name, _names(default)
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
            given = [*call.args, *(pair.value for pair in call.kwargs)]
            origin = {name for value in given for name in _names(value)}
            for argument in macros[call.node.name].args:
                yield argument.name, origin


def _targets(target: nodes.Node) -> set[str]:
    """Return the names that are set; for a namespace's attribute, the namespace."""
    refs = [target] if isinstance(target, nodes.NSRef) else list(target.find_all(nodes.NSRef))
    return _names(target) | {ref.name for ref in refs}
