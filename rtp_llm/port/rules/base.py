"""What all rules share: comments at the statement that is rewritten, and the scopes of the functions around it."""

import textwrap
from functools import cached_property

import libcst as cst

from rtp_llm.port.program import Program
from rtp_llm.port.scopes import Scopes
from rtp_llm.port.values import Scope
from rtp_llm.port.visiting import Transformer

MARK = "# PORT: "
CONTINUED = "#   "
COMMENT_WIDTH = 100


class Rule(Transformer):
    """A rewriting of the whole module. Subclasses call ``super()`` where they visit functions and statements."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.class_stack: list[str] = []
        self.function_stack: list[cst.FunctionDef] = []
        self._notes: list[list[str]] = [[]]

    @classmethod
    def apply(cls, program: Program) -> None:
        rule = cls(program)
        program.module = program.module.visit(rule)

    @cached_property
    def scopes(self) -> Scopes:
        return Scopes(self.program)

    @property
    def scope(self) -> Scope:
        return self.scopes.at(self.function_stack[-1]) if self.function_stack else self.scopes.nowhere

    @property
    def function(self) -> str:
        return self.function_stack[-1].name.value if self.function_stack else ""

    def count(self, what: str) -> None:
        self.program.done[what] += 1

    def review(self, text: str) -> None:
        """Put a ``# PORT:`` comment above the statement that is being visited."""
        if text not in self._notes[-1]:
            self._notes[-1].append(text)

    def visit_ClassDef(self, node: cst.ClassDef) -> bool | None:
        self.class_stack.append(node.name.value)
        self._notes.append([])
        return None

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.BaseStatement:
        self.class_stack.pop()
        return self._noted(updated_node)

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool | None:
        self.function_stack.append(node)
        self._notes.append([])
        return None

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> "cst.FunctionDef | cst.RemovalSentinel":
        self.function_stack.pop()
        return self._noted(updated_node)

    def visit_SimpleStatementLine(self, node: cst.SimpleStatementLine) -> bool | None:
        self._notes.append([])
        return None

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> "cst.SimpleStatementLine | cst.FlattenSentinel[cst.SimpleStatementLine] | cst.RemovalSentinel":
        return self._noted(updated_node)

    def visit_If(self, node: cst.If) -> bool | None:
        self._notes.append([])
        return None

    def leave_If(self, original_node: cst.If, updated_node: cst.If) -> "cst.BaseStatement | cst.RemovalSentinel":
        return self._noted(updated_node)

    def visit_For(self, node: cst.For) -> bool | None:
        self._notes.append([])
        return None

    def leave_For(self, original_node: cst.For, updated_node: cst.For) -> "cst.BaseStatement | cst.RemovalSentinel":
        return self._noted(updated_node)

    def _noted(self, node):  # type: ignore[no-untyped-def]
        notes = self._notes.pop()
        if not notes:
            return node
        return node.with_changes(leading_lines=[*node.leading_lines, *comment_lines(notes, node.leading_lines)])


def comment_lines(notes: list[str], present: "list[cst.EmptyLine] | tuple[cst.EmptyLine, ...]") -> list[cst.EmptyLine]:
    """Make the lines of ``# PORT:`` comments, without those that are there already."""
    have = {line.comment.value for line in present if line.comment}
    lines = []
    for note in notes:
        wrapped = textwrap.wrap(note, COMMENT_WIDTH) or [note]
        comments = [MARK + wrapped[0], *(CONTINUED + rest for rest in wrapped[1:])]
        if comments[0] not in have:
            lines += [cst.EmptyLine(comment=cst.Comment(comment)) for comment in comments]
    return lines


def expression(text: str) -> cst.BaseExpression:
    return cst.parse_expression(text)


def keyword(name: str, value: cst.BaseExpression | str) -> cst.Arg:
    """An argument ``name=value``."""
    return cst.Arg(
        value=expression(value) if isinstance(value, str) else value,
        keyword=cst.Name(name),
        equal=cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace("")),
    )


def with_args(call: cst.Call, args: list[cst.Arg]) -> cst.Call:
    """Give a call other arguments, in its own layout: commas and line breaks between them stay as they were."""
    old = call.args
    if not args:
        return call.with_changes(args=[], whitespace_before_args=cst.SimpleWhitespace(""))
    if not old:
        return call.with_changes(args=_separated(args, _SPACED, cst.MaybeSentinel.DEFAULT))
    between = next((arg.comma for arg in old[:-1] if isinstance(arg.comma, cst.Comma)), None)
    if len(args) == 1 or (between is None and not _breaks(call.whitespace_before_args)):
        plain = [arg.with_changes(whitespace_after_arg=cst.SimpleWhitespace("")) for arg in args]
        args = _separated(plain, _SPACED, cst.MaybeSentinel.DEFAULT)
        return call.with_changes(args=args, whitespace_before_args=cst.SimpleWhitespace(""))
    usual = between or cst.Comma(whitespace_after=call.whitespace_before_args)
    result = _separated(args, usual, old[-1].comma)
    result[-1] = result[-1].with_changes(whitespace_after_arg=old[-1].whitespace_after_arg)
    return call.with_changes(args=result)


_SPACED = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))


def _separated(args: list[cst.Arg], between: cst.Comma, last: "cst.Comma | cst.MaybeSentinel") -> list[cst.Arg]:
    result = [arg.with_changes(comma=between, whitespace_after_arg=cst.SimpleWhitespace("")) for arg in args[:-1]]
    return [*result, args[-1].with_changes(comma=last)]


def _breaks(whitespace: cst.BaseParenthesizableWhitespace) -> bool:
    return isinstance(whitespace, cst.ParenthesizedWhitespace)
