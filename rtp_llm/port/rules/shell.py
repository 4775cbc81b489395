"""The engine's shell around a model goes: its mixins, its decorators, and what only it asks a model for."""

import libcst as cst
from libcst import matchers as m

from rtp_llm.port.program import Program, code, methods, self_attribute
from rtp_llm.port.rules.base import Rule, with_args
from rtp_llm.port.rules.fold import opened, tidied
from rtp_llm.port.source import Origin
from rtp_llm.port.visiting import Transformer
from rtp_llm.port.vocabulary import (
    CONTEXTS,
    DECORATORS,
    DEVICE_OPS,
    ENGINE_ATTRIBUTES,
    ENGINE_METHODS,
    MARKERS,
    STEERING,
    target,
)

_ONCE = "_once"  # how methods of vLLM's loggers end that say a thing only once


class RemoveShell(Rule):
    """``@support_torch_compile``, ``SupportsPP``, ``embedding_modules = …``, ``def set_eplb_state(…)`` and the like."""

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.BaseStatement:
        if any(self.program.is_engine(arg.value, *DEVICE_OPS) for arg in original_node.bases):
            updated_node = self._plain_module(updated_node)
        updated_node = self._with_known_bases(updated_node)
        bases = [arg for arg in updated_node.bases if self.program.engine_name(arg.value) not in MARKERS]
        if len(bases) != len(updated_node.bases):
            self.count("engine's mixins removed")
            bases = [arg.with_changes(comma=cst.MaybeSentinel.DEFAULT) for arg in bases]
            default = cst.MaybeSentinel.DEFAULT
            updated_node = updated_node.with_changes(bases=bases, lpar=default, rpar=default)
        decorators = [decorator for decorator in updated_node.decorators if not self._is_engines(decorator)]
        if len(decorators) != len(updated_node.decorators):
            self.count("engine's decorators removed")
            lines = [*updated_node.leading_lines, *updated_node.lines_after_decorators]
            updated_node = updated_node.with_changes(
                decorators=decorators, leading_lines=lines, lines_after_decorators=[]
            )
        return super().leave_ClassDef(original_node, updated_node)

    def _with_known_bases(self, node: cst.ClassDef) -> cst.ClassDef:
        """A class of a base that nothing stands for can at least be defined; it is told that it cannot be used."""
        unknown = [name for arg in node.bases if (name := self._unknown(arg.value))]
        if not unknown:
            return node
        self.review(f"not portable: {node.name.value} is a {unknown[0]}, which has no equivalent here")
        known = [arg for arg in node.bases if not self._unknown(arg.value)]
        if not known:
            self.program.imports.setdefault("nn", Origin("torch", "nn"))
            known = [cst.Arg(cst.parse_expression("nn.Module"))]
        return node.with_changes(bases=known)

    def _unknown(self, node: cst.BaseExpression) -> str:
        name = self.program.engine_name(node)
        return name if name and name not in MARKERS and target(name, self.program.engine) is None else ""

    def _plain_module(self, node: cst.ClassDef) -> cst.ClassDef:
        """A module with a method for each device keeps ``forward_native``, which becomes ``forward``."""
        self.count("modules of several devices made plain ones")
        self.program.imports.setdefault("nn", Origin("torch", "nn"))
        base = cst.Arg(cst.parse_expression("nn.Module"))
        bases = [base if self.program.is_engine(arg.value, *DEVICE_OPS) else arg for arg in node.bases]
        own = methods(node)
        native = own.get("forward_native")
        drop = {name for name in own if native is not None and name.startswith("forward") and name != "forward_native"}
        statements = [
            statement
            for statement in node.body.body
            if not (isinstance(statement, cst.FunctionDef) and statement.name.value in drop)
        ]
        node = node.with_changes(bases=bases, body=node.body.with_changes(body=statements))
        return cst.ensure_type(node.visit(_NativeForward()), cst.ClassDef)

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        """``logger.info_once(…)`` is not a method of Python's loggers."""
        func = updated_node.func
        if not isinstance(func, cst.Attribute) or code(func.value) != "logger" or not func.attr.value.endswith(_ONCE):
            return updated_node
        self.count("words that are logged once logged plainly")
        args = [arg for arg in updated_node.args if not (arg.keyword and arg.keyword.value == "scope")]
        plain = func.with_changes(attr=cst.Name(func.attr.value.removesuffix(_ONCE)))
        return with_args(updated_node, args).with_changes(func=plain)

    def leave_With(self, original_node: cst.With, updated_node: cst.With):  # type: ignore[no-untyped-def]
        if not all(self.program.is_engine(_root(item.item), *CONTEXTS) for item in original_node.items):
            return updated_node
        self.count("contexts of the other engine removed")
        return opened(updated_node.body, updated_node.leading_lines)

    def _is_kernels(self, decorator: cst.Decorator) -> bool:
        """``@triton.jit`` and the like: what is below cannot be defined without the compiler."""
        node = _root(decorator.decorator)
        return self.program.is_engine(node, "triton") or code(node) == "triton"

    def _is_engines(self, decorator: cst.Decorator) -> bool:
        node = decorator.decorator
        if isinstance(node, cst.Call):
            node = node.func
        while isinstance(node, cst.Attribute):
            node = node.value
            if isinstance(node, cst.Call):
                node = node.func
        if code(node) == "torch" and "compile" in names_in_attributes(decorator.decorator):
            return True
        if self.program.engine_name(node) in DEVICE_OPS:
            return True
        return self.program.engine_name(node) in DECORATORS or self.program.engine_name(node) == "MULTIMODAL_REGISTRY"

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef | cst.RemovalSentinel:
        if any(self._is_kernels(decorator) for decorator in updated_node.decorators):
            super().leave_FunctionDef(original_node, updated_node)
            self.count("kernels of the other engine left out")
            return cst.RemoveFromParent()
        decorators = [decorator for decorator in updated_node.decorators if not self._is_engines(decorator)]
        if len(decorators) != len(updated_node.decorators):
            self.count("engine's decorators removed")
            lines = [*updated_node.leading_lines, *updated_node.lines_after_decorators]
            updated_node = updated_node.with_changes(
                decorators=decorators, leading_lines=lines, lines_after_decorators=[]
            )
        noted = super().leave_FunctionDef(original_node, updated_node)
        if self.class_stack and not self.function_stack and updated_node.name.value in ENGINE_METHODS:
            self.count("engine's methods removed")
            return cst.RemoveFromParent()
        return noted

    def leave_SimpleStatementLine(  # type: ignore[no-untyped-def]
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ):
        noted = super().leave_SimpleStatementLine(original_node, updated_node)
        call = original_node.body[0].value if isinstance(original_node.body[0], cst.Expr) else None
        if isinstance(call, cst.Call) and self_attribute(call.func) in ENGINE_METHODS:
            return cst.RemoveFromParent()
        if _sets(original_node.body[0], STEERING):
            return cst.RemoveFromParent()
        in_class_body = bool(self.class_stack) and not self.function_stack
        if in_class_body and len(original_node.body) == 1:
            small = original_node.body[0]
            target = small.target if isinstance(small, cst.AnnAssign) else None
            if isinstance(small, cst.Assign) and len(small.targets) == 1:
                target = small.targets[0].target
            if isinstance(target, cst.Name) and target.value in ENGINE_ATTRIBUTES:
                self.count("engine's attributes removed")
                return cst.RemoveFromParent()
        return noted

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        return tidied(updated_node)


def _sets(node: cst.BaseSmallStatement, names: frozenset[str]) -> bool:
    """Return whether a statement assigns to an attribute of one of these names."""
    targets = [target.target for target in node.targets] if isinstance(node, cst.Assign) else []
    return any(isinstance(target, cst.Attribute) and target.attr.value in names for target in targets)


def _root(node: cst.BaseExpression) -> cst.BaseExpression:
    """Return ``a`` of ``a(…).b(…)``."""
    while isinstance(node, cst.Call | cst.Attribute):
        node = node.func if isinstance(node, cst.Call) else node.value
    return node


class _NativeForward(Transformer):
    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.Name:
        is_native = updated_node.value == "forward_native"
        return updated_node.with_changes(value="forward") if is_native else updated_node


def names_in_attributes(node: cst.CSTNode) -> set[str]:
    """Names after dots in an expression."""
    return {found.attr.value for found in m.findall(node, m.Attribute()) if isinstance(found, cst.Attribute)}


def remove_shell(program: Program) -> None:
    RemoveShell.apply(program)
