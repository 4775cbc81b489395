"""Folding: questions to the other engine get their answers, and branches that cannot be taken go.

``if get_pp_group().is_last_rank: A else: B`` becomes A; ``vllm_config.model_config.hf_config`` becomes ``config``;
hidden states that are captured for a drafter are not captured.
"""

from collections.abc import Sequence
from typing import cast

import libcst as cst
from libcst import matchers as m

from rtp_llm.port.facts import EMPTY, ClassName, Const, Engine, Expression, Value, is_backend
from rtp_llm.port.names import names_in
from rtp_llm.port.program import Program, code
from rtp_llm.port.rules.base import Rule, expression
from rtp_llm.port.source import Origin
from rtp_llm.port.values import evaluate, truth
from rtp_llm.port.vocabulary import PARALLEL

# What the expressions of ``facts.py`` need beside the file's own names.
_NEEDED = {
    "torch": Origin("torch"),
    "logging": Origin("logging"),
    "get_tensor_model_parallel_world_size": Origin(PARALLEL, "get_tensor_model_parallel_world_size"),
    "get_tensor_model_parallel_rank": Origin(PARALLEL, "get_tensor_model_parallel_rank"),
}
_ENDS = (cst.Return, cst.Raise, cst.Continue, cst.Break)


class FoldFacts(Rule):
    """One pass of folding; ``fold`` repeats it until nothing changes."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.stores: set[int] = set()  # names that are bound, not read
        self.elifs: set[int] = set()

    # What is bound is not read.

    def visit_Param(self, node: cst.Param) -> None:
        self.stores.add(id(node.name))

    def visit_Arg(self, node: cst.Arg) -> None:
        self.stores.add(id(node.keyword))

    def visit_Attribute(self, node: cst.Attribute) -> None:
        self.stores.add(id(node.attr))

    def visit_AssignTarget(self, node: cst.AssignTarget) -> None:
        self._store(node.target)

    def visit_AnnAssign(self, node: cst.AnnAssign) -> None:
        self._store(node.target)

    def visit_AugAssign(self, node: cst.AugAssign) -> None:
        self._store(node.target)

    def visit_NamedExpr(self, node: cst.NamedExpr) -> None:
        self._store(node.target)

    def visit_For(self, node: cst.For) -> bool | None:
        self._store(node.target)
        return super().visit_For(node)

    def visit_CompFor(self, node: cst.CompFor) -> None:
        self._store(node.target)

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool | None:
        self.stores.add(id(node.name))
        return super().visit_FunctionDef(node)

    def visit_ClassDef(self, node: cst.ClassDef) -> bool | None:
        self.stores.add(id(node.name))
        return super().visit_ClassDef(node)

    def visit_Annotation(self, node: cst.Annotation) -> bool:
        return False

    def _store(self, target: cst.BaseExpression) -> None:
        self.stores.add(id(target))
        if isinstance(target, cst.Tuple | cst.List):
            for element in target.elements:
                self._store(element.value)

    # Expressions.

    def _value(self, node: cst.BaseExpression) -> Value | None:
        return None if id(node) in self.stores else evaluate(node, self.scope)

    def _replaced(self, original: cst.BaseExpression, updated: cst.BaseExpression) -> cst.BaseExpression:
        value = self._value(original)
        if isinstance(value, Expression):
            self.count("facts of the engine folded")
            for name in names_in(expression(value.text)) & set(_NEEDED):
                self.program.imports.setdefault(name, _NEEDED[name])
                self.program.engine_names.pop(name, None)
            return expression(value.text)
        if isinstance(value, Const) and value.of_engine:
            self.count("facts of the engine folded")
            return expression("[]" if value.value == EMPTY else repr(value.value))
        if (
            isinstance(value, ClassName)
            and value.name
            and isinstance(original, cst.Name | cst.IfExp)
            and code(original) != value.name
        ):
            self.count("facts of the engine folded")
            return cst.Name(value.name)
        return updated

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
        return self._replaced(original_node, updated_node)

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        return self._replaced(original_node, updated_node)

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        return self._replaced(original_node, updated_node)

    def leave_Subscript(self, original_node: cst.Subscript, updated_node: cst.Subscript) -> cst.BaseExpression:
        return self._replaced(original_node, updated_node)

    def leave_Comparison(self, original_node: cst.Comparison, updated_node: cst.Comparison) -> cst.BaseExpression:
        return self._replaced(original_node, updated_node)

    def leave_BinaryOperation(
        self, original_node: cst.BinaryOperation, updated_node: cst.BinaryOperation
    ) -> cst.BaseExpression:
        return self._replaced(original_node, updated_node)

    def leave_UnaryOperation(
        self, original_node: cst.UnaryOperation, updated_node: cst.UnaryOperation
    ) -> cst.BaseExpression:
        return self._replaced(original_node, updated_node)

    def leave_IfExp(self, original_node: cst.IfExp, updated_node: cst.IfExp) -> cst.BaseExpression:
        test = truth(original_node.test, self.scope)
        if test is not None:
            self.count("facts of the engine folded")
            return in_brackets(updated_node, updated_node.body if test else updated_node.orelse)
        return self._replaced(original_node, updated_node)

    def leave_BooleanOperation(
        self, original_node: cst.BooleanOperation, updated_node: cst.BooleanOperation
    ) -> cst.BaseExpression:
        decides = isinstance(original_node.operator, cst.Or)
        left, right = self._value(original_node.left), self._value(original_node.right)
        if isinstance(left, Const) and left.of_engine and bool(left.value) is not decides:
            return in_brackets(updated_node, updated_node.right)
        if isinstance(right, Const) and right.of_engine and bool(right.value) is not decides:
            return in_brackets(updated_node, updated_node.left)
        replaced = self._replaced(original_node, updated_node)
        if isinstance(replaced, cst.BooleanOperation) and code(replaced.left) == code(replaced.right):
            return in_brackets(replaced, replaced.left)
        return replaced

    # Statements.

    def visit_If(self, node: cst.If) -> bool | None:
        if isinstance(node.orelse, cst.If):
            self.elifs.add(id(node.orelse))
        return super().visit_If(node)

    def leave_If(self, original_node: cst.If, updated_node: cst.If):  # type: ignore[no-untyped-def]
        noted = cast(cst.If, super().leave_If(original_node, updated_node))
        test = truth(original_node.test, self.scope)
        if test is None and _is_for_adapters(noted):
            test = True
        if test is None:
            return noted
        self.count("branches that cannot be taken removed")
        is_elif = id(original_node) in self.elifs
        if test:
            return cst.Else(body=noted.body) if is_elif else opened(noted.body, noted.leading_lines)
        if noted.orelse is None:
            return cst.RemoveFromParent()
        if is_elif or isinstance(noted.orelse, cst.If):
            return noted.orelse.with_changes(leading_lines=noted.leading_lines)
        return opened(noted.orelse.body, noted.leading_lines)

    def leave_SimpleStatementLine(  # type: ignore[no-untyped-def]
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ):
        noted = super().leave_SimpleStatementLine(original_node, updated_node)
        assert isinstance(noted, cst.SimpleStatementLine)
        kept = [new for old, new in zip(original_node.body, noted.body, strict=True) if not self._is_void(old, new)]
        if len(kept) == len(noted.body):
            return noted
        self.count("statements without effect removed")
        return noted.with_changes(body=kept) if kept else cst.RemoveFromParent()

    def _is_void(self, old: cst.BaseSmallStatement, new: cst.BaseSmallStatement) -> bool:
        """Whether a statement has become one that does nothing."""
        if isinstance(old, cst.Expr):
            if isinstance(old.value, cst.Call) and any(is_backend(self._value(arg.value)) for arg in old.value.args):
                return True  # a word about the kernels
            return not isinstance(old.value, cst.SimpleString | cst.ConcatenatedString | cst.Name) and (
                isinstance(self._value(old.value), Const | Engine)
            )
        if isinstance(old, cst.Assert):
            test = self._value(old.test)
            return isinstance(test, Const) and test.of_engine and bool(test.value)
        if isinstance(old, cst.AnnAssign | cst.Assign) and old.value is not None:
            target = old.target if isinstance(old, cst.AnnAssign) else old.targets[0].target
            if isinstance(target, cst.Attribute) and isinstance(self._value(target.value), Engine):
                return True
            if isinstance(new, cst.AnnAssign | cst.Assign) and new.value is not None:
                new_target = new.target if isinstance(new, cst.AnnAssign) else new.targets[0].target
                return code(new_target) == code(new.value)
        return False

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        return tidied(updated_node)


def _is_for_adapters(node: cst.If) -> bool:
    """Whether only the other branch looks into a layer that an adapter (LoRA) wraps, as none is wrapped here."""
    wrapped = m.Attribute(attr=m.Name("base_layer"))
    return (
        isinstance(node.orelse, cst.Else)
        and bool(m.findall(node.orelse, wrapped))
        and not m.findall(node.body, wrapped)
    )


def in_brackets(whole: cst.BaseExpression, part: cst.BaseExpression) -> cst.BaseExpression:
    """Give a part of an expression the brackets of the whole, in which it may have stood on several lines."""
    return part.with_changes(lpar=whole.lpar, rpar=whole.rpar) if whole.lpar and not part.lpar else part


def tidied(block: cst.IndentedBlock) -> cst.IndentedBlock:
    """Remove what follows a return; fill an empty block."""
    body = []
    for statement in block.body:
        body.append(statement)
        if isinstance(statement, cst.SimpleStatementLine) and isinstance(statement.body[-1], _ENDS):
            break
    if len(body) == len(block.body) and body:
        return block
    return block.with_changes(body=body or [cst.parse_statement("pass")])


def opened(body: cst.BaseSuite, leading_lines: Sequence[cst.EmptyLine]):  # type: ignore[no-untyped-def]
    """The statements of a block, without it; the comments above it stay with the first of them."""
    if isinstance(body, cst.SimpleStatementSuite):
        return cst.SimpleStatementLine(body=body.body, leading_lines=leading_lines)
    statements = list(body.body)
    statements = [statement for statement in statements if code(statement) != "pass"]
    if not statements:
        return cst.RemoveFromParent()
    first = statements[0]
    lines = [*leading_lines, *first.leading_lines]  # type: ignore[attr-defined]
    statements[0] = first.with_changes(leading_lines=lines)
    return cst.FlattenSentinel(statements)


def fold(program: Program) -> None:
    """Fold until nothing changes: what one pass decides may decide more."""
    for _ in range(8):
        before = program.done.total()
        FoldFacts.apply(program)
        if program.done.total() == before:
            return
