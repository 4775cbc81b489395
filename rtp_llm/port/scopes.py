"""Scopes of all functions of a program: which names and attributes are assigned what, for ``values.py``."""

import libcst as cst

from rtp_llm.port.facts import CALLS, CAPTURES, Engine
from rtp_llm.port.program import Program, family, methods, parameters, self_attribute
from rtp_llm.port.values import Attributes, Scope, engine_parameter
from rtp_llm.port.visiting import Visitor


class Scopes:
    """The scopes of all functions of a program, by the identity of their nodes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.of: dict[int, Scope] = {}
        classes = program.classes()
        names = frozenset(classes)
        shared: dict[str, Attributes] = {}
        for name in classes:
            relatives = family(name, classes)
            shared[name] = next((shared[other] for other in relatives if other in shared), None) or Attributes(names)
        self.nowhere = Scope(program, Attributes(names))
        for name, node in classes.items():
            for method in methods(node).values():
                self._add(method, shared[name], None)
        for function in program.functions().values():
            self._add(function, self.nowhere.attributes, None)

    def at(self, function: cst.FunctionDef) -> Scope:
        """Return a function's scope; one that stands neither in a class nor at the top level knows no attributes."""
        if id(function) not in self.of:
            self._add(function, self.nowhere.attributes, None)
        return self.of[id(function)]

    def _add(self, function: cst.FunctionDef, attributes: Attributes, parent: Scope | None) -> None:
        scope = Scope(self.program, attributes, parent=parent)
        self.of[id(function)] = scope
        for param in parameters(function):
            name = param.name.value
            value = engine_parameter(param, self.program)
            scope.assigned[name] = [None]
            if value is not None:
                scope._known[name] = value
        for star in (function.params.star_arg, function.params.star_kwarg):
            if isinstance(star, cst.Param):
                scope.assigned[star.name.value] = [None]
        finder = _Bindings(scope)
        function.body.visit(finder)
        for inner in finder.functions:
            self._add(inner, attributes, scope)


class _Bindings(Visitor):
    """Finds a function's assignments; not those of functions inside it, which it lists."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.functions: list[cst.FunctionDef] = []

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:
        self.functions.append(node)
        self._bind(node.name, None)
        return False

    def visit_ClassDef(self, node: cst.ClassDef) -> bool:
        self._bind(node.name, None)
        return False

    def visit_Assign(self, node: cst.Assign) -> None:
        for target in node.targets:
            self._bind(target.target, node.value)

    def visit_AnnAssign(self, node: cst.AnnAssign) -> None:
        if node.value is not None:
            self._bind(node.target, node.value)

    def visit_NamedExpr(self, node: cst.NamedExpr) -> None:
        self._bind(node.target, node.value)

    def visit_AugAssign(self, node: cst.AugAssign) -> None:
        self._bind(node.target, None)

    def visit_ImportAlias(self, node: cst.ImportAlias) -> None:
        name = node.evaluated_alias or node.evaluated_name.partition(".")[0]
        self._bind(cst.Name(name), None)

    def visit_For(self, node: cst.For) -> None:
        self._bind(node.target, None)

    def visit_CompFor(self, node: cst.CompFor) -> None:
        self._bind(node.target, None)

    def visit_AsName(self, node: cst.AsName) -> None:
        if isinstance(node.name, cst.BaseExpression):
            self._bind(node.name, None)

    def visit_Lambda(self, node: cst.Lambda) -> None:
        for param in node.params.params:
            self._bind(param.name, None)

    def _is_asked_again(self, name: str, value: cst.BaseExpression | None) -> bool:
        """``vllm_config = get_current_vllm_config()`` says of a parameter of that name what it is already."""
        found = CALLS.get(self.scope.program.engine_name(value.func)) if isinstance(value, cst.Call) else None
        known = self.scope._known.get(name)
        return isinstance(found, Engine) and isinstance(known, Engine) and found.path == known.path

    def _bind(self, target: cst.BaseExpression, value: cst.BaseExpression | None) -> None:
        if isinstance(target, cst.Name) and self._is_asked_again(target.value, value):
            return
        if isinstance(target, cst.Name):
            self.scope._known.pop(target.value, None)
            self.scope.assigned.setdefault(target.value, []).append(value)
        elif isinstance(target, cst.Tuple | cst.List):
            for element in target.elements:
                self._bind(element.value, None)
        elif self_attribute(target):
            self.scope.attributes.assigned.setdefault(self_attribute(target), []).append((value, self.scope))

    def visit_Call(self, node: cst.Call) -> None:
        if self_attribute(node.func) in CAPTURES or (isinstance(node.func, cst.Name) and node.func.value == "len"):
            return
        for arg in node.args:
            if isinstance(arg.value, cst.Name):
                self.scope.mutated.add(arg.value.value)

    def visit_Attribute(self, node: cst.Attribute) -> None:
        if isinstance(node.value, cst.Name):
            self.scope.mutated.add(node.value.value)

    def visit_Subscript(self, node: cst.Subscript) -> None:
        if isinstance(node.value, cst.Name):
            self.scope.mutated.add(node.value.value)
