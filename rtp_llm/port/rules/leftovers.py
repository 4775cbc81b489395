"""What is left: unused bindings go, types of the other engine leave annotations, and the rest gets a comment."""

import builtins
from functools import cached_property

import libcst as cst
from libcst import matchers as m

from rtp_llm.port.names import names_in
from rtp_llm.port.program import Program, code, self_attribute
from rtp_llm.port.rules.base import MARK, Rule
from rtp_llm.port.rules.fold import tidied
from rtp_llm.port.source import bound_names
from rtp_llm.port.visiting import Visitor
from rtp_llm.port.vocabulary import MISSING, POOLING, target

_PURE_CALLS = (
    "getattr", "hasattr", "get_tensor_model_parallel_world_size", "get_tensor_model_parallel_rank", "len",
    "get_layer_id", "bool", "int", "sum", "min", "max", "type",
)  # fmt: skip

DRAFTED = "spec_info"  # of SGLang's batches


class CleanAnnotations(Rule):
    """Types without an equivalent go: ``torch.Tensor | IntermediateTensors`` becomes ``torch.Tensor``."""

    def _is_foreign(self, node: cst.CSTNode) -> bool:
        return any(name in self.program.engine_names and not self._target(name) for name in names_in(node))

    def _target(self, name: str) -> object:
        return target(self.program.engine_name(cst.Name(name)), self.program.engine)

    def leave_Annotation(self, original_node: cst.Annotation, updated_node: cst.Annotation) -> cst.Annotation:
        return updated_node.with_changes(annotation=self._cleaned(updated_node.annotation))

    def _cleaned(self, node: cst.BaseExpression) -> cst.BaseExpression:
        if isinstance(node, cst.BinaryOperation) and isinstance(node.operator, cst.BitOr):
            left, right = self._cleaned(node.left), self._cleaned(node.right)
            for side, other in ((node.left, right), (node.right, left)):
                if self._is_foreign(side) and code(self._cleaned(side)) == "object":
                    return other
            return node.with_changes(left=left, right=right)
        return cst.Name("object") if self._is_foreign(node) else node


class RemoveUnused(Rule):
    """One pass; local names that are assigned and never read go, and conditions around nothing."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._read: dict[int, set[str]] = {}  # of functions, by identity

    def leave_SimpleStatementLine(  # type: ignore[no-untyped-def]
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ):
        noted = super().leave_SimpleStatementLine(original_node, updated_node)
        if not self.function_stack or len(original_node.body) != 1:
            return noted
        small = original_node.body[0]
        if not isinstance(small, cst.Assign | cst.AnnAssign) or small.value is None:
            return noted
        if not _is_pure(small.value) and not self._is_foreign_call(small.value):
            return noted
        targets = [small.target] if isinstance(small, cst.AnnAssign) else [part.target for part in small.targets]
        if len(targets) == 1 and self._is_unused(targets[0], small.value):
            self.count("unused bindings removed")
            return cst.RemoveFromParent()
        return noted

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef | cst.RemovalSentinel:
        noted = super().leave_FunctionDef(original_node, updated_node)
        if self.function_stack and original_node.name.value not in self._read_in(self.function_stack[0]):
            self.count("unused bindings removed")
            return cst.RemoveFromParent()
        return noted

    def _is_unused(self, node: cst.BaseExpression, value: cst.BaseExpression) -> bool:
        if isinstance(node, cst.Name):
            return node.value not in self._read_in(self.function_stack[0])
        attribute = self_attribute(node)
        is_constant = code(value) in ("True", "False", "None", "0", "1", "[]") or self._is_foreign_call(value)
        return bool(attribute) and is_constant and attribute not in self._read_attributes

    def _is_foreign_call(self, value: cst.BaseExpression) -> bool:
        """Whether an expression is a call of something that nothing stands for: if nobody reads it, it goes."""
        name = self.program.engine_name(value.func) if isinstance(value, cst.Call) else ""
        is_lost = MISSING.get(name, POOLING) != POOLING  # a part of the model, which must be told
        return bool(name) and target(name, self.program.engine) is None and not is_lost

    def _read_in(self, function: cst.FunctionDef) -> set[str]:
        if id(function) not in self._read:
            self._read[id(function)] = _read_names(function)
        return self._read[id(function)]

    @property
    def _read_attributes(self) -> set[str]:
        if not hasattr(self, "_attributes"):
            finder = _ReadAttributes()
            self.program.module.visit(finder)
            self._attributes = finder.names
        return self._attributes

    def leave_If(self, original_node: cst.If, updated_node: cst.If) -> cst.BaseStatement | cst.RemovalSentinel:
        noted = super().leave_If(original_node, updated_node)
        assert isinstance(noted, cst.If)
        if isinstance(noted.orelse, cst.Else) and code(noted.orelse.body) == "pass":
            noted = noted.with_changes(orelse=None)
        if noted.orelse is None and code(noted.body) == "pass" and _is_pure(noted.test):
            self.count("unused bindings removed")
            return cst.RemoveFromParent()
        return noted

    def leave_For(self, original_node: cst.For, updated_node: cst.For) -> cst.BaseStatement | cst.RemovalSentinel:
        noted = super().leave_For(original_node, updated_node)
        return cst.RemoveFromParent() if code(updated_node.body) == "pass" else noted

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        return tidied(updated_node)


def _is_pure(node: cst.BaseExpression) -> bool:
    calls = m.findall(node, m.Call())
    return all(
        isinstance(call, cst.Call) and isinstance(call.func, cst.Name) and call.func.value in _PURE_CALLS
        for call in calls
    ) and not m.findall(node, m.NamedExpr() | m.Await() | m.Yield())


def _read_names(function: cst.FunctionDef) -> set[str]:
    finder = _ReadNames()
    function.body.visit(finder)
    return finder.names


class _ReadNames(Visitor):
    """Names that are read; a plain assignment to a name does not read it."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_AssignTarget(self, node: cst.AssignTarget) -> bool:
        return not isinstance(node.target, cst.Name)

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:
        for part in (node.params, node.body, *node.decorators):
            part.visit(self)
        return False

    def visit_AnnAssign(self, node: cst.AnnAssign) -> bool:
        if isinstance(node.target, cst.Name) and node.value is not None:
            node.value.visit(self)
            return False
        return True

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        node.value.visit(self)
        return False

    def visit_Arg(self, node: cst.Arg) -> bool:
        node.value.visit(self)
        return False

    def visit_Name(self, node: cst.Name) -> None:
        self.names.add(node.value)


class _ReadAttributes(Visitor):
    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_AssignTarget(self, node: cst.AssignTarget) -> bool:
        return not self_attribute(node.target)

    def visit_AnnAssign(self, node: cst.AnnAssign) -> bool:
        if self_attribute(node.target) and node.value is not None:
            node.value.visit(self)
            return False
        return True

    def visit_Attribute(self, node: cst.Attribute) -> None:
        self.names.add(node.attr.value)

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        text = node.evaluated_value
        if isinstance(text, str) and text.isidentifier():  # getattr(self, "name")
            self.names.add(text)


class CommentLeftovers(Rule):
    """Names of the other engine that nothing stands for get a ``# PORT:`` comment where they are used."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._defining: set[int] = set()
        self._is_told = False

    def visit_SimpleStatementLine(self, node: cst.SimpleStatementLine) -> bool | None:
        self._is_told = any(line.comment and line.comment.value.startswith(MARK) for line in node.leading_lines)
        return super().visit_SimpleStatementLine(node)

    def visit_Name(self, node: cst.Name) -> None:
        name = self.program.engine_name(node)
        if not name and not self._is_told and id(node) not in self._defining and self._is_undefined(node.value):
            self.review(f"{node.value} is not defined any more: it was a part of the other engine")
        if not name or target(name, self.program.engine) is not None or self.scope.is_local(node.value):
            return
        if name in MISSING:
            self.review(f"not portable: {name} needs {MISSING[name]}")
        else:
            module = self.program.engine_names[node.value].module
            self.review(f"{name} of {module} has no equivalent here: write what it does, or remove what needs it")

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool | None:
        self._defining.add(id(node.name))
        return super().visit_FunctionDef(node)

    def visit_ClassDef(self, node: cst.ClassDef) -> bool | None:
        self._defining.add(id(node.name))
        return super().visit_ClassDef(node)

    def _is_undefined(self, name: str) -> bool:
        return bool(self.function_stack) and name not in self._known and not self.scope.is_local(name)

    @cached_property
    def _known(self) -> set[str]:
        """Names that are defined at the top level, or built into Python."""
        bound = {name for statement in self.program.module.body for name in bound_names(statement)}
        return bound | set(self.program.imports) | set(self.program.engine_names) | set(dir(builtins)) | {"__class__"}

    def visit_Annotation(self, node: cst.Annotation) -> bool:
        return False

    def visit_Param(self, node: cst.Param) -> bool:
        if node.default is not None:
            node.default.visit(self)
        return False

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        if node.attr.value == DRAFTED:
            self.review(f"not portable: {DRAFTED} is of the model that this one drafts for: nothing is drafted here")
        node.value.visit(self)
        return False

    def visit_Arg(self, node: cst.Arg) -> bool:
        node.value.visit(self)
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        return False

    def visit_Import(self, node: cst.Import) -> bool:
        return False


def clean(program: Program) -> None:
    CleanAnnotations.apply(program)
    for _ in range(6):
        before = program.done["unused bindings removed"]
        RemoveUnused.apply(program)
        if program.done["unused bindings removed"] == before:
            break


def comment_leftovers(program: Program) -> None:
    CommentLeftovers.apply(program)
