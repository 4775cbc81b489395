"""Evaluating expressions of a model file as far as they follow from how this engine works (see ``facts.py``).

The evaluation knows no order: a local name, or an attribute of a module, has a value if all its assignments agree.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import libcst as cst

from rtp_llm.port.facts import (
    ATTRIBUTES,
    BACKEND,
    CALLS,
    CAPTURES,
    EMPTY,
    FACTORIES,
    NEGATIVE,
    NUMBERS,
    PARAMETERS,
    PATHS,
    QUESTIONS,
    TYPES,
    ClassName,
    Const,
    Engine,
    Expression,
    Value,
    is_backend,
    is_part,
)
from rtp_llm.port.names import names_in
from rtp_llm.port.program import Program, self_attribute

ATTENTION_CLASSES = ("Attention", "EncoderOnlyAttention", "ChunkedLocalAttention", "PrefillPrefixLMAttention")
RECURSION = ClassName("")  # a value in terms of itself
_BACKEND, _BACKENDS = Engine(BACKEND), "AttentionBackendEnum"
_LITERAL_EMPTY = Const(EMPTY, of_engine=False)
_LITERALS = {"True": True, "False": False, "None": None}


@dataclass
class Scope:
    """What the names in a function stand for.

    Attributes:
        assigned: local names -> the expressions assigned to them; None for a binding that is none (a loop, a tuple).
        mutated: names that something might change through: given to calls, indexed, asked for attributes.
    """

    program: Program
    attributes: "Attributes"
    assigned: dict[str, list[cst.BaseExpression | None]] = field(default_factory=dict)
    mutated: set[str] = field(default_factory=set)
    parent: "Scope | None" = None
    _active: set[str] = field(default_factory=set)
    _known: dict[str, Value | None] = field(default_factory=dict)

    def name(self, name: str) -> Value | None:
        if name in self.assigned:
            if name in self._active:
                return RECURSION
            if name not in self._known:
                self._active.add(name)
                self._known[name] = self._agreed(name)
                self._active.discard(name)
            return self._known.get(name)
        if self.parent is not None:
            return self.parent.name(name)
        if self.program.engine_name(cst.Name(name)) in ATTENTION_CLASSES or name in self.attributes.class_names:
            return ClassName(name)
        return None

    def _agreed(self, name: str) -> Value | None:
        return agreed((None if node is None else evaluate(node, self)) for node in self.assigned[name])

    def is_local(self, name: str) -> bool:
        return name in self.assigned or (self.parent is not None and self.parent.is_local(name))

    def may_change(self, name: str) -> bool:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.assigned:
                return name in scope.mutated
            scope = scope.parent
        return True


@dataclass
class Attributes:
    """What ``self.x`` stands for in the methods of a class and its relatives."""

    class_names: frozenset[str] = frozenset()
    assigned: dict[str, list[tuple[cst.BaseExpression | None, Scope]]] = field(default_factory=dict)
    _active: set[str] = field(default_factory=set)
    _known: dict[str, Value | None] = field(default_factory=dict)

    def value(self, name: str) -> Value | None:
        if name in ATTRIBUTES:
            return ATTRIBUTES[name]
        if name not in self.assigned or name in self._active:
            return None
        if name not in self._known:
            self._active.add(name)
            found = agreed((None if node is None else evaluate(node, scope)) for node, scope in self.assigned[name])
            if isinstance(found, Engine):
                found = replace(found, owner="self.")
            if isinstance(found, Expression | ClassName) or found == _LITERAL_EMPTY:  # a list to be filled
                found = None
            self._known[name] = found
            self._active.discard(name)
        return self._known[name]


def agreed(values: Iterator[Value | None]) -> Value | None:
    """Return the value that all have; None if they differ, or if it is a literal that nothing of the engine backs."""
    found = [value for value in values if value is not RECURSION]
    if any(is_backend(value) for value in found):  # one, or the default that None stands for
        found = [value for value in found if not (isinstance(value, Const) and value.value is None)]
    first = found[0] if found else None
    if first is None or any(not _same(value, first) for value in found):
        return None
    if isinstance(first, Const) and first.value != EMPTY and not any(_of_engine(value) for value in found):
        return None
    if isinstance(first, Const) and any(_of_engine(value) for value in found):
        return Const(first.value)
    return first


def _same(one: Value | None, other: Value) -> bool:
    if isinstance(one, Const) and isinstance(other, Const):
        return one.value == other.value and type(one.value) is type(other.value)
    return one == other


def _of_engine(value: Value | None) -> bool:
    return isinstance(value, Const) and value.of_engine


def evaluate(node: cst.BaseExpression, scope: Scope) -> Value | None:
    """Return what an expression's value is known to be; None if it is not."""
    handler = _HANDLERS.get(type(node))
    return handler(node, scope) if handler else None


def truth(node: cst.BaseExpression, scope: Scope) -> bool | None:
    """Return whether a condition holds, as far as it follows from this engine; None if it does not."""
    value = evaluate(node, scope)
    if is_part(value):
        return True
    return bool(value.value) if isinstance(value, Const) and value.of_engine else None


def _name(node: cst.Name, scope: Scope) -> Value | None:
    if node.value in _LITERALS:
        return Const(_LITERALS[node.value], of_engine=False)
    origin = scope.program.engine_name(node)
    if origin in NEGATIVE:
        return Engine(origin)
    if origin == _BACKENDS:
        return _BACKEND
    if origin in NUMBERS:
        return NUMBERS[origin]
    value = scope.name(node.value)
    if isinstance(value, Const) and value.value == EMPTY and scope.may_change(node.value):
        return None
    return None if isinstance(value, Expression) else value


def _number(node: cst.Integer, scope: Scope) -> Value:
    return Const(int(node.value.replace("_", ""), 0), of_engine=False)


def _container(node: cst.List | cst.Tuple | cst.Dict, scope: Scope) -> Value | None:
    return None if node.elements else Const(EMPTY, of_engine=False)


def _attribute(node: cst.Attribute, scope: Scope) -> Value | None:
    own = self_attribute(node)
    if own:
        return scope.attributes.value(own)
    if node.attr.value in FACTORIES:
        return Engine(node.attr.value)
    base = evaluate(node.value, scope)
    return _step(base, node.attr.value) if isinstance(base, Engine) else None


def _step(base: Engine, step: str) -> Value:
    if base.path == BACKEND:
        return Const(False) if step.startswith(QUESTIONS) else base
    path = f"{base.path}.{step}"
    if (base.path in NEGATIVE or path in NEGATIVE) and path not in PATHS:
        return Const(False) if step.startswith(QUESTIONS) and path not in NEGATIVE else Engine(path, base.owner)
    found = PATHS.get(path, Engine(path, base.owner))
    if isinstance(found, Engine):
        return replace(found, owner=base.owner)
    return Expression(found.text.format(owner=base.owner)) if isinstance(found, Expression) else found


def _call(node: cst.Call, scope: Scope) -> Value | None:
    name = scope.program.engine_name(node.func)
    if name in CALLS:
        return CALLS[name]
    if self_attribute(node.func) in CAPTURES:
        return CAPTURES[self_attribute(node.func)]
    if isinstance(node.func, cst.Attribute):
        return _method_call(node, node.func, scope)
    if isinstance(node.func, cst.Name) and node.func.value in _BUILTINS and not scope.is_local(node.func.value):
        return _BUILTINS[node.func.value](node, scope)
    return None


def _method_call(node: cst.Call, func: cst.Attribute, scope: Scope) -> Value | None:
    base = evaluate(func.value, scope)
    if not isinstance(base, Engine):
        return None
    if base.path in NEGATIVE and func.attr.value.startswith(QUESTIONS):
        return Const(False)
    if base.path == "vllm_config" and func.attr.value == "with_hf_config":
        return None
    return _step(base, f"{func.attr.value}()")


def _isinstance(node: cst.Call, scope: Scope) -> Value | None:
    if len(node.args) != 2:
        return None
    kinds = node.args[1].value
    classes = [element.value for element in kinds.elements] if isinstance(kinds, cst.Tuple) else [kinds]
    return Const(False) if all(scope.program.is_engine(kind, *_NEVER) for kind in classes) else None


def _len(node: cst.Call, scope: Scope) -> Value | None:
    value = evaluate(node.args[0].value, scope) if len(node.args) == 1 else None
    return Const(0) if isinstance(value, Const) and value.value == EMPTY else None


def _getattr(node: cst.Call, scope: Scope) -> Value | None:
    """``getattr(engine object, "name", default)`` is its attribute if that is known; else the default."""
    base = evaluate(node.args[0].value, scope) if len(node.args) >= 2 else None
    name = node.args[1].value if len(node.args) >= 2 else None
    if not isinstance(base, Engine) or not isinstance(name, cst.SimpleString):
        return None
    found = _step(base, str(name.evaluated_value))
    if isinstance(found, Engine) and len(node.args) == 3:
        default = evaluate(node.args[2].value, scope)
        return Const(default.value) if isinstance(default, Const) else default
    return found


def _bool(node: cst.Call, scope: Scope) -> Value | None:
    value = evaluate(node.args[0].value, scope) if len(node.args) == 1 else None
    return Const(bool(value.value), value.of_engine) if isinstance(value, Const) else None


def _subscript(node: cst.Subscript, scope: Scope) -> Value | None:
    """Switches of the server are off."""
    return Const(False) if scope.program.is_engine(node.value, "global_server_args_dict") else None


def _hasattr(node: cst.Call, scope: Scope) -> Value | None:
    name = node.args[1].value if len(node.args) == 2 else None
    if isinstance(name, cst.SimpleString) and name.evaluated_value in ("start_layer", "end_layer"):
        return Const(False)
    found = _getattr(node, scope)
    if found is None:
        return None
    return Const(not isinstance(found, Engine) or is_backend(found))


# Classes that nothing is an instance of.
_NEVER = ("PPMissingLayer", "StageMissingLayer", "IntermediateTensors")
_BUILTINS = {
    "hasattr": _hasattr,
    "isinstance": _isinstance,
    "len": _len,
    "getattr": _getattr,
    "bool": _bool,
}


def _not(node: cst.UnaryOperation, scope: Scope) -> Value | None:
    value = evaluate(node.expression, scope)
    if isinstance(node.operator, cst.Not) and isinstance(value, Const):
        return Const(not value.value, value.of_engine)
    return None


def _boolean(node: cst.BooleanOperation, scope: Scope) -> Value | None:
    left, right = evaluate(node.left, scope), evaluate(node.right, scope)
    decides = isinstance(node.operator, cst.Or)  # the truth value that settles the operation
    if isinstance(left, Const):
        if bool(left.value) is decides:
            return left
        return right
    if isinstance(right, Const) and bool(right.value) is decides and right.of_engine:
        return Const(decides)
    if left is not None and left == right:
        return left
    return None


def _conditional(node: cst.IfExp, scope: Scope) -> Value | None:
    test = truth(node.test, scope)
    if test is not None:
        return evaluate(node.body if test else node.orelse, scope)
    body, orelse = evaluate(node.body, scope), evaluate(node.orelse, scope)
    if isinstance(body, ClassName) and isinstance(orelse, ClassName):  # ours refuses what is not causal
        kinds = {scope.program.engine_name(cst.Name(value.name)): value for value in (body, orelse)}
        if set(kinds) == {"Attention", "EncoderOnlyAttention"}:
            return kinds["Attention"]
    return body if body is not None and body == orelse else None


def _comparison(node: cst.Comparison, scope: Scope) -> Value | None:
    if len(node.comparisons) != 1:
        return None
    left, right = _operand(node.left, scope), _operand(node.comparisons[0].comparator, scope)
    operator = node.comparisons[0].operator
    if is_backend(left) and not (isinstance(right, Const) and right.value is None):
        return _OF_BACKENDS.get(type(operator))
    if isinstance(operator, cst.In | cst.NotIn) and isinstance(right, Const) and right.value == EMPTY:
        return Const(isinstance(operator, cst.NotIn))
    if isinstance(left, Engine) and isinstance(right, Const) and right.value is None:
        return {cst.Is: Const(False), cst.IsNot: Const(True)}.get(type(operator))
    if not isinstance(left, Const) or not isinstance(right, Const):
        return None
    operation = _COMPARISONS.get(type(operator))
    try:
        return Const(operation(left.value, right.value), left.of_engine or right.of_engine) if operation else None
    except TypeError:  # two constants that do not compare: then the file does not mean them so
        return None


_COMPARISONS: dict[type, Any] = {
    cst.Equal: lambda a, b: a == b,
    cst.NotEqual: lambda a, b: a != b,
    cst.Is: lambda a, b: a is b,
    cst.IsNot: lambda a, b: a is not b,
    cst.GreaterThan: lambda a, b: a > b,
    cst.GreaterThanEqual: lambda a, b: a >= b,
    cst.LessThan: lambda a, b: a < b,
    cst.LessThanEqual: lambda a, b: a <= b,
}


def _operand(node: cst.BaseExpression, scope: Scope) -> Value | None:
    """Return a side of a comparison: also texts, and that nothing passes between stages."""
    if isinstance(node, cst.SimpleString):
        return Const(node.evaluated_value, of_engine=False)
    if isinstance(node, cst.Name) and node.value == "intermediate_tensors":
        return Const(None)
    return evaluate(node, scope)


# The kernels are none of those that a file names, and among those that it knows.
_OF_BACKENDS = {cst.Equal: Const(False), cst.NotEqual: Const(True), cst.In: Const(True), cst.NotIn: Const(False)}


def _binary(node: cst.BinaryOperation, scope: Scope) -> Value | None:
    left, right = evaluate(node.left, scope), evaluate(node.right, scope)
    sides = [value for value in (left, right) if value is not RECURSION]
    are_empty = bool(sides) and all(isinstance(value, Const) and value.value == EMPTY for value in sides)
    return Const(EMPTY) if are_empty and isinstance(node.operator, cst.Add) else None


_HANDLERS: dict[type, Any] = {
    cst.Name: _name,
    cst.Integer: _number,
    cst.List: _container,
    cst.Tuple: _container,
    cst.Dict: _container,
    cst.Attribute: _attribute,
    cst.Call: _call,
    cst.Subscript: _subscript,
    cst.UnaryOperation: _not,
    cst.BooleanOperation: _boolean,
    cst.IfExp: _conditional,
    cst.Comparison: _comparison,
    cst.BinaryOperation: _binary,
}


def engine_parameter(param: cst.Param, program: Program) -> Value | None:
    """Return what a parameter that carries a part of the other engine stands for; None for all others."""
    value = PARAMETERS.get(param.name.value)
    if param.annotation is None:
        return value
    names = names_in(param.annotation)
    kinds = [TYPES[origin] for name in names if (origin := program.engine_name(cst.Name(name))) in TYPES]
    if kinds:
        return kinds[0]
    return None if isinstance(value, Engine) else value
