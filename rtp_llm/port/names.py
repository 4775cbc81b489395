"""Which names a piece of code reads."""

import libcst as cst

from rtp_llm.port.visiting import Visitor


def names_in(node: cst.CSTNode) -> set[str]:
    """Names that a node reads or binds; without attributes, keywords of calls and the node's own imports."""
    finder = _Names()
    node.visit(finder)
    return finder.names


def eager_names_in(node: cst.CSTNode) -> set[str]:
    """Names that a definition reads when it is made: all but those in the bodies of its functions."""
    finder = _EagerNames()
    node.visit(finder)
    return finder.names


class _Names(Visitor):
    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_Name(self, node: cst.Name) -> None:
        self.names.add(node.value)

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        node.value.visit(self)
        return False

    def visit_Arg(self, node: cst.Arg) -> bool:
        node.value.visit(self)
        return False

    def visit_Import(self, node: cst.Import) -> bool:
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        return False

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        text = node.evaluated_value
        if isinstance(text, str) and text.isidentifier():  # an annotation in quotes
            self.names.add(text)


class _EagerNames(_Names):
    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:
        for part in (node.params, node.returns, *node.decorators):
            if part is not None:
                part.visit(self)
        return False

    def visit_Lambda(self, node: cst.Lambda) -> bool:
        return False
