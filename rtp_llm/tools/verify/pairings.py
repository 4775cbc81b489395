"""The two ways to pair components, neighbours or halves, in a function's syntax tree."""

import ast

_LAST = "-1"


def paired(tree: ast.FunctionDef, by_halves: bool) -> tuple[list[str], list[str]]:
    """Pair components otherwise wherever a function does it the other way: by halves, or neighbours.

    Returns:
        The statements that are changed, as they were and as they are.
    """
    change, before, after = (_ByHalves if by_halves else _Neighbours)(), [], []
    for statement in [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node is not tree]:
        if not any(isinstance(child, ast.stmt) for child in ast.iter_child_nodes(statement)):
            text = ast.unparse(statement)
            change.visit(statement)
            other = ast.unparse(ast.fix_missing_locations(statement))
            if other != text:
                before.append(text)
                after.append(other)
    return before, after


class _ByHalves(ast.NodeTransformer):
    """``x.unflatten(-1, (-1, 2))``, ``torch.stack((a, b), -1).flatten(-2)``, ``x[..., ::2]`` and ``x[..., 1::2]``."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        text = ast.unparse(node)
        match node.func:
            case ast.Attribute(value=given, attr="unflatten") if text.endswith(".unflatten(-1, (-1, 2))"):
                return _expression("x.unflatten(-1, (2, -1)).transpose(-1, -2)", x=given)
            case ast.Attribute(value=ast.Call(args=[ast.Tuple() as parts, *rest]) as stacked, attr="flatten"):
                dims = [*map(ast.unparse, rest), *(ast.unparse(keyword.value) for keyword in stacked.keywords)]
                if ast.unparse(stacked.func) == "torch.stack" and dims == [_LAST] and text.endswith(".flatten(-2)"):
                    return _expression("torch.cat(x, dim=-1)", x=parts)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        for start, index in (("", 0), ("0", 0), ("1", 1)):
            if ast.unparse(node.slice).strip("()") == f"..., {start}::2":
                return _expression(f"x.chunk(2, dim=-1)[{index}]", x=node.value)
        return node


class _Neighbours(ast.NodeTransformer):
    """``x.chunk(2, dim=-1)`` and ``torch.cat((a, b), dim=-1)``."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        dims = [*node.args[1:], *(keyword.value for keyword in node.keywords)]
        match node.func:
            case ast.Attribute(value=given, attr="chunk") if [
                ast.unparse(item) for item in [*node.args, *(keyword.value for keyword in node.keywords)]
            ] == ["2", _LAST]:
                return _expression("x.unflatten(-1, (-1, 2)).unbind(-1)", x=given)
            case ast.Attribute(value=ast.Name("torch"), attr="cat") if [ast.unparse(dim) for dim in dims] == [_LAST]:
                if isinstance(node.args[0], ast.Tuple) and len(node.args[0].elts) == 2:
                    return _expression("torch.stack(x, dim=-1).flatten(-2)", x=node.args[0])
        return node


def _expression(text: str, x: ast.expr) -> ast.expr:
    """Return the expression of a text, with another one in the place of the name x."""
    return _Put(x).visit(ast.parse(text, mode="eval").body)


class _Put(ast.NodeTransformer):
    def __init__(self, value: ast.expr) -> None:
        self._value = value

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._value if node.id == "x" else node
