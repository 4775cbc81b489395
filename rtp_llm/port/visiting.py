"""Visitors that pass over white space, commas and parentheses, which are half of a tree and no rule's business."""

from typing import Any

import libcst as cst

_PASSED = frozenset({
    cst.AssignEqual, cst.BaseParenthesizableWhitespace, cst.Colon, cst.Comma, cst.Comment, cst.Dot, cst.EmptyLine,
    cst.LeftCurlyBrace, cst.LeftParen, cst.LeftSquareBracket, cst.Newline, cst.ParenthesizedWhitespace,
    cst.RightCurlyBrace, cst.RightParen, cst.RightSquareBracket, cst.Semicolon, cst.SimpleWhitespace,
    cst.TrailingWhitespace, cst.Add, cst.Subtract, cst.Multiply, cst.Divide, cst.FloorDivide, cst.Power, cst.Equal,
    cst.NotEqual, cst.LessThan, cst.GreaterThan, cst.And, cst.Or, cst.Not, cst.Minus, cst.BitOr, cst.Is, cst.IsNot,
    cst.In, cst.NotIn, cst.Integer, cst.Float,
})  # fmt: skip


class Transformer(cst.CSTTransformer):
    def on_visit(self, node: cst.CSTNode) -> bool:
        return type(node) not in _PASSED and super().on_visit(node)

    def on_leave(self, original_node: cst.CSTNodeT, updated_node: cst.CSTNodeT) -> Any:
        return updated_node if type(original_node) in _PASSED else super().on_leave(original_node, updated_node)


class Visitor(cst.CSTVisitor):
    def on_visit(self, node: cst.CSTNode) -> bool:
        return type(node) not in _PASSED and super().on_visit(node)

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if type(original_node) not in _PASSED:
            super().on_leave(original_node)
