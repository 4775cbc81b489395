"""The output's layout: lines that the rules made too long are broken, as the field's formatters break them."""

import re

import libcst as cst

from rtp_llm.port.program import code
from rtp_llm.port.visiting import Transformer

LINE_LENGTH = 120
INDENT = "    "


def laid_out(module: cst.Module) -> cst.Module:
    """Break long calls and signatures, and tidy the blank lines that removed statements left."""
    return cst.ensure_type(module.visit(_Layout()), cst.Module)


def single_spaced(text: str) -> str:
    """At most two blank lines in a row, and none where a block begins."""
    text = re.sub(r"\n{4,}", "\n\n\n", text)
    return re.sub(r"((?:^|\n)[ ]*(?:class|if|else|for|elif)\b[^\n]*:\n)\n+(?=[ ]+\S)", r"\1", text)


class _Layout(Transformer):
    def __init__(self) -> None:
        self.depth = 0

    def visit_IndentedBlock(self, node: cst.IndentedBlock) -> None:
        self.depth += 1

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        self.depth -= 1
        return updated_node

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        header = code(updated_node.with_changes(body=cst.SimpleStatementSuite([cst.Pass()]), decorators=[]))
        header = header.removesuffix("pass").strip().splitlines()[-1] if "\n" not in header.strip() else ""
        if len(header) + self.depth * len(INDENT) <= LINE_LENGTH:
            return updated_node
        params = updated_node.params
        broken = [param.with_changes(comma=_comma(self.depth + 1)) for param in params.params]
        if params.kwonly_params or isinstance(params.star_arg, cst.Param) or params.star_kwarg or not broken:
            return updated_node
        broken[-1] = broken[-1].with_changes(comma=_comma(self.depth))
        return updated_node.with_changes(
            params=params.with_changes(params=broken), whitespace_before_params=_line_break(self.depth + 1)
        )

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine:
        text = code(updated_node.with_changes(leading_lines=[]))
        if "\n" in text or len(text) + self.depth * len(INDENT) <= LINE_LENGTH or len(updated_node.body) != 1:
            return updated_node
        small = updated_node.body[0]
        call = getattr(small, "value", None)
        if not isinstance(call, cst.Call) or not call.args:
            return updated_node
        args = [arg.with_changes(comma=_comma(self.depth + 1)) for arg in call.args]
        args[-1] = args[-1].with_changes(comma=_comma(self.depth))
        broken = call.with_changes(args=args, whitespace_before_args=_line_break(self.depth + 1))
        return updated_node.with_changes(body=[small.with_changes(value=broken)])


def _line_break(depth: int) -> cst.ParenthesizedWhitespace:
    return cst.ParenthesizedWhitespace(indent=False, last_line=cst.SimpleWhitespace(INDENT * depth))


def _comma(depth: int) -> cst.Comma:
    return cst.Comma(whitespace_after=_line_break(depth))
