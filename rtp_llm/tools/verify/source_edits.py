"""Small edits of a function's source that people make by mistake when they write it again: an operand left out, two
steps in the other order, another function in the place of one.

They are edits of the syntax tree, one at a time (mutation operators; DeMillo, Lipton and Sayward, 1978).
"""

import ast
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rtp_llm.tools.verify.pairings import paired

MAX_SHOWN = 100  # characters of a statement
MAX_DIFFERING = 300  # of what differs in it
NUM_AROUND = 2  # words of a long statement before and after what differs
_PAIRS = (
    ("sigmoid", "tanh"),
    ("cos", "sin"),
    ("floor", "ceil"),
    ("mean", "sum"),
    ("mean", "amax"),
    ("amax", "amin"),
    *((f"{kind}avg_pool{n}d", f"{kind}max_pool{n}d") for kind in ("", "adaptive_") for n in (1, 2, 3)),
)
_MODES = ("bilinear", "bicubic", "nearest")  # of an interpolation
_OTHER_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}
_CLAMPS = ("clamp", "clamp_", "clip", "clip_")
_BOUNDS = ("min", "max")
_SUMS = ("mean", "sum", "softmax", "var", "norm", "logsumexp")
SHORT_TYPES = {"bfloat16": "bfloat16", "half": "float16"}  # the method that rounds, the type's name


@dataclass(frozen=True)
class Edit:
    """A changed function. ``before`` and ``after``: what is changed, as source; ``after`` empty: it is left out."""

    tree: ast.FunctionDef
    before: str
    after: str


def rounding_of(found: Sequence[Edit]) -> str:
    """Return the type of 16 bits that all of some edits round to; empty: they do not."""
    for method, name in SHORT_TYPES.items():
        if all(f".{method}()" in edit.after and f".{method}()" not in edit.before for edit in found):
            return name
    return ""


def edits_text(found: Sequence[Edit]) -> str:
    """Return what edits with the same result change, as the end of a sentence that begins with "as if"."""
    by_statement: dict[str, list[str]] = {}
    for edit in found:
        by_statement.setdefault(edit.before, []).append(edit.after)
    return ", or ".join(_change_text(before, [*dict.fromkeys(after)]) for before, after in by_statement.items())


def _change_text(before: str, after: Sequence[str]) -> str:
    changed: dict[str, list[str]] = {}
    for other in filter(None, after):
        old, new = _differing(before, other)
        changed.setdefault(old, []).append(new)
    texts = [f"{' or '.join(f'`{new}`' for new in many)} stood in place of `{old}`" for old, many in changed.items()]
    return ", or ".join([*([f"`{_cut(before)}` were left out"] if "" in after else []), *texts])


def edits(tree: ast.FunctionDef) -> Iterator[Edit]:
    """Yield the function with one edit each. Most are the same object, which is whole again after the last one."""
    for owner in list(ast.walk(tree)):
        for field, value in list(ast.iter_fields(owner)):
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(value, list) and isinstance(first, ast.stmt):
                yield from _of_statements(tree, value)
            elif isinstance(owner, ast.stmt) and isinstance(first, ast.expr):
                yield from _of_expression(tree, owner, owner, field)
    yield from _without_function(tree)


def _without_function(tree: ast.FunctionDef) -> Iterator[Edit]:
    """Yield the function without another one that it calls at several places: each time its first argument stays."""
    called: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and not isinstance(node.args[0], (ast.Constant, ast.Starred)):
            called.setdefault(ast.unparse(node.func), []).append(ast.unparse(node.args[0]))
    for function, given in called.items():
        if len(given) > 1:
            changed = _FirstArguments(function).visit(copy.deepcopy(tree))
            yield Edit(changed, f"{function} of {' and of '.join(dict.fromkeys(given))}", "")


def rarer_edits(tree: ast.FunctionDef) -> Iterator[Edit]:
    """Yield the function with one edit each of those that are several at once, or rare: components paired otherwise
    everywhere, a variable negated, a token's own row taken from what a function of the file sums, a loop the other way
    round."""
    for by_halves in (True, False):
        changed = copy.deepcopy(tree)
        before, after = paired(changed, by_halves)
        if before:
            yield Edit(changed, "; ".join(before), "; ".join(after))
    for owner in list(ast.walk(tree)):
        for _, value in list(ast.iter_fields(owner)):
            for index, statement in enumerate(list(value) if isinstance(value, list) else []):
                if isinstance(statement, (ast.Assign, ast.AugAssign)):
                    for following in (*_negations(statement), *_without_own_rows(statement)):
                        value.insert(index + 1, following)
                        yield Edit(tree, _shown(statement), f"{_shown(statement)}; {_shown(following)}")
                        value.pop(index + 1)
    yield from _turned_loops(tree)


def _turned_loops(tree: ast.FunctionDef) -> Iterator[Edit]:
    """Yield the function with one loop each, also in an expression, that begins with the last; what it counts stays."""
    for statement in (node for node in ast.walk(tree) if isinstance(node, ast.stmt)):
        own = [
            node for child in ast.iter_child_nodes(statement) if isinstance(child, ast.expr) for node in ast.walk(child)
        ]
        before = _shown(statement)
        for loop in (statement, *own):
            loops = loop.generators if isinstance(loop, ast.GeneratorExp | ast.ListComp) else [loop]
            for each in loops:
                if not isinstance(each, ast.For | ast.comprehension):
                    continue
                given = each.iter
                each.iter = _from_the_last(given)
                yield Edit(tree, before, _shown(statement))
                each.iter = given


def _from_the_last(items: ast.expr) -> ast.expr:
    match items:
        case ast.Call(func=ast.Name(id="enumerate"), args=[first]):
            return ast.Call(items.func, [_from_the_last(first)], items.keywords)
    return ast.Call(ast.Name("reversed", ast.Load()), [ast.List([ast.Starred(items, ast.Load())], ast.Load())], [])


def _negations(statement: ast.Assign | ast.AugAssign) -> Iterator[ast.Assign]:
    """Yield ``x = -x`` of each variable that a statement sets, as of the sine of a rotation in the other direction."""
    for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
        for item in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(item, ast.Name):
                yield _set(item.id, ast.UnaryOp(ast.USub(), ast.Name(item.id, ast.Load())))


def _without_own_rows(statement: ast.Assign | ast.AugAssign) -> Iterator[ast.Assign]:
    """Yield ``y = y - x`` behind ``y = f(x, ...)``: of a running sum, each token's state before it."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(), args=[ast.Name(id=given), *_])):
            yield _set(name, ast.BinOp(ast.Name(name, ast.Load()), ast.Sub(), ast.Name(given, ast.Load())))


def _set(name: str, value: ast.expr) -> ast.Assign:
    return ast.Assign([ast.Name(name, ast.Store())], value)


class _FirstArguments(ast.NodeTransformer):
    """Puts its first argument in the place of each call of a function."""

    def __init__(self, function: str) -> None:
        self._function = function

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        return node.args[0] if node.args and ast.unparse(node.func) == self._function else node


def name_edits(tree: ast.FunctionDef) -> Iterator[Edit]:
    """Yield the function with another of its arguments and variables in the place of one, each time it is read."""
    arguments = [argument.arg for argument in (*tree.args.args, *tree.args.kwonlyargs) if argument.arg != "self"]
    stored = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    names = list(dict.fromkeys([*arguments, *stored]))
    for statement in (node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node is not tree):
        before = _shown(statement)
        for node in _names_read(statement):
            own = node.id
            for other in names if own in names else ():
                if other != own:
                    node.id = other
                    yield Edit(tree, before, _shown(statement))
                    node.id = own


def _names_read(statement: ast.stmt) -> Iterator[ast.Name]:
    """Yield the names that a statement itself reads, without those in its body."""
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.expr):
            yield from (n for n in ast.walk(child) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))


def _of_expression(tree: ast.FunctionDef, statement: ast.stmt, owner: ast.AST, field: str) -> Iterator[Edit]:
    """Yield edits of the expression at ``owner.field``, and of those in it."""
    node = getattr(owner, field)
    items = node if isinstance(node, list) else [node]
    for index, item in enumerate(items):
        if isinstance(item, ast.keyword):
            yield from _of_expression(tree, statement, item, "value")
        if not isinstance(item, ast.expr):
            continue
        before = _shown(statement)
        for other in _others(item):
            _put(owner, field, index, other)
            yield Edit(tree, before, _shown(statement))
            _put(owner, field, index, item)
        if isinstance(item, ast.Call):
            yield from _without_keywords(tree, statement, item)
        for inner, _ in list(ast.iter_fields(item)):
            yield from _of_expression(tree, statement, item, inner)


def _put(owner: ast.AST, field: str, index: int, item: ast.expr) -> None:
    value = getattr(owner, field)
    if isinstance(value, list):
        value[index] = item
    else:
        setattr(owner, field, item)


def _without_keywords(tree: ast.FunctionDef, statement: ast.stmt, call: ast.Call) -> Iterator[Edit]:
    keywords, before = call.keywords, _shown(statement)
    for index in range(len(keywords)):
        call.keywords = keywords[:index] + keywords[index + 1 :]
        yield Edit(tree, before, _shown(statement))
        call.keywords = keywords


def _others(node: ast.expr) -> Iterator[ast.expr]:
    """Yield what may stand in the place of an expression."""
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            yield left
            yield right
            other = _OTHER_OPERATORS.get(type(op))
            if other is not None:
                yield ast.BinOp(left, other(), right)
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield operand
        case ast.Call(func=func, args=args):
            yield from _other_calls(node, func, args)
            yield from _other_bounds(node)
        case ast.IfExp(body=body, orelse=orelse):
            yield body
            yield orelse
        case ast.Subscript(slice=ast.Tuple(elts=elements)):
            yield from _other_slices(node, elements)
        case ast.Tuple(elts=[first, second]):
            yield ast.Tuple([second, first], node.ctx)
        case ast.Constant(value=value) if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield from (ast.Constant(other) for other in (0, 1, value + 1, value - 1) if other != value)
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=value) if value in _MODES:
            yield from (ast.Constant(other) for other in _MODES if other != value)


def _other_calls(node: ast.Call, func: ast.expr, args: list[ast.expr]) -> Iterator[ast.expr]:
    if isinstance(func, ast.Attribute) and not _is_library(func.value):
        yield func.value  # x.clamp(...): x
    for arg in args[:2]:
        if not isinstance(arg, (ast.Constant, ast.Starred)):
            yield arg
    name = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
    if isinstance(func, ast.Attribute):
        others = [pair[1 - pair.index(name)] for pair in _PAIRS if name in pair]
        yield from (ast.Call(ast.Attribute(func.value, other, ast.Load()), args, node.keywords) for other in others)
    if name == "sigmoid" and isinstance(func, ast.Attribute):
        yield ast.Call(ast.Attribute(func.value, "softmax", ast.Load()), args, [_last_dimension()])
    if name == "softmax" and isinstance(func, ast.Attribute):
        given = args[:1] if _is_library(func.value) else []
        yield ast.Call(ast.Attribute(func.value, "sigmoid", ast.Load()), given, [])
    if isinstance(func, ast.Attribute) and not _is_library(func.value):
        yield from _other_runs(node, func.value, name)
    if name in _SUMS:
        yield from _rounded(node)
    if len(args) >= 2 and not any(isinstance(arg, ast.Starred) for arg in args[:2]):
        yield ast.Call(func, [args[1], args[0], *args[2:]], node.keywords)


def _rounded(node: ast.Call) -> Iterator[ast.expr]:
    """Yield a sum of numbers of 16 bits, and a sum that is rounded to them; a chain of calls is rounded at its root."""
    for kind in SHORT_TYPES:
        changed = copy.deepcopy(node)
        changed.keywords = [keyword for keyword in changed.keywords if keyword.arg != "dtype"]
        call = changed
        while isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Call):
            call = call.func.value
        if isinstance(call.func, ast.Attribute) and not _is_library(call.func.value):
            call.func.value = _cast(call.func.value, kind)
        elif call.args:
            call.args[0] = _cast(call.args[0], kind)
        yield _cast(changed, "float")
        yield _cast(_cast(node, kind), "float")


def _cast(node: ast.expr, kind: str) -> ast.expr:
    return ast.Call(ast.Attribute(node, kind, ast.Load()), [], [])


def _other_runs(node: ast.Call, given: ast.expr, name: str) -> Iterator[ast.expr]:
    """Yield a running sum without its own row, and whole repetitions in the place of repeated rows."""
    if name == "cumsum":
        yield ast.BinOp(node, ast.Sub(), given)
    if name == "repeat_interleave" and node.args:
        times = ast.BinOp(ast.List([given], ast.Load()), ast.Mult(), node.args[0])
        cat = ast.Attribute(ast.Name("torch", ast.Load()), "cat", ast.Load())
        yield ast.Call(cat, [times, *node.args[1:]], node.keywords)


def _other_bounds(node: ast.Call) -> Iterator[ast.expr]:
    """Yield a call of ``clamp`` with the bound that is missing, as the negative of the other, and with the same sign of
    both; bounds are its last arguments, or ``min`` and ``max``."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if name not in _CLAMPS:
        return
    first = 1 if isinstance(node.func, ast.Attribute) and _is_library(node.func.value) else 0
    given = dict(zip(_BOUNDS, node.args[first:], strict=False)) | {k.arg: k.value for k in node.keywords}
    bounds = {key: value for key in _BOUNDS if (value := given.get(key)) is not None and not _is_none(value)}
    for key, value in bounds.items():
        other = "max" if key == "min" else "min"
        mirrored = value.operand if isinstance(value, ast.UnaryOp) else ast.UnaryOp(ast.USub(), value)
        both = {key: value, other: mirrored}
        if other not in bounds or ast.dump(mirrored) != ast.dump(bounds[other]):
            yield _clamped(node, first, both)
        yield _clamped(node, first, {other: mirrored})  # the other side is limited
        if other in bounds:
            yield _clamped(node, first, {key: value})


def _clamped(node: ast.Call, first: int, bounds: dict[str, ast.expr]) -> ast.Call:
    keywords = [ast.keyword(key, bounds[key]) for key in _BOUNDS if key in bounds]
    return ast.Call(node.func, node.args[:first], keywords)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _last_dimension() -> ast.keyword:
    return ast.keyword("dim", ast.UnaryOp(ast.USub(), ast.Constant(1)))


def _is_library(node: ast.expr) -> bool:
    """Return whether an expression is ``torch``, ``F``, ``nn.functional`` or the like, or the module itself."""
    root = node
    while isinstance(root, ast.Attribute):
        root = root.value
    return isinstance(root, ast.Name) and root.id in ("torch", "F", "nn", "math", "self")


def _other_slices(node: ast.expr, elements: list[ast.expr]) -> Iterator[ast.expr]:
    """Yield every second element from the other start: ``x[..., ::2]`` and ``x[..., 1::2]``."""
    assert isinstance(node, ast.Subscript)
    for index, item in enumerate(elements):
        if isinstance(item, ast.Slice) and isinstance(item.step, ast.Constant):
            lower = None if item.lower is not None else ast.Constant(1)
            others = [*elements[:index], ast.Slice(lower, item.upper, item.step), *elements[index + 1 :]]
            yield ast.Subscript(node.value, ast.Tuple(others, ast.Load()), node.ctx)


def _of_statements(tree: ast.FunctionDef, body: list[ast.stmt]) -> Iterator[Edit]:
    """Yield a statement left out, a condition the other way round, and two neighbours in the other order."""
    whole = list(body)
    for index, statement in enumerate(whole):
        if isinstance(statement, (ast.Assign, ast.AugAssign)):
            body[:] = [*whole[:index], *whole[index + 1 :]] or [ast.Pass()]
            yield Edit(tree, _shown(statement), "")
            body[:] = whole
        elif isinstance(statement, ast.If):
            for kept in (statement.body, statement.orelse):
                body[:] = [*whole[:index], *kept, *whole[index + 1 :]] or [ast.Pass()]
                yield Edit(tree, f"if {_shown(statement.test)}:", "if True:" if kept is statement.body else "if False:")
                body[:] = whole
    for index, (first, second) in enumerate(pairwise(whole)):
        if isinstance(first, ast.Assign) and isinstance(second, ast.Assign):
            before = f"{_shown(first)}; {_shown(second)}"
            for others in ([second, first], _scaled_after(first, second)):
                if others:
                    body[:] = [*whole[:index], *others, *whole[index + 2 :]]
                    yield Edit(tree, before, "; ".join(map(_shown, others)))
                    body[:] = whole


def _scaled_after(first: ast.Assign, second: ast.Assign) -> list[ast.stmt]:
    """Return ``y = f(x); y = y * w`` for ``x = x * w; y = f(x)``; empty: the statements are no such pair."""
    scaled, given = first.value, second.value
    if not isinstance(scaled, ast.BinOp) or not isinstance(given, ast.Call) or not isinstance(scaled.left, ast.Name):
        return []
    targets = [*first.targets, *second.targets]
    if len(targets) != 2 or not all(isinstance(target, ast.Name) for target in targets):
        return []
    if scaled.left.id not in {name.id for name in ast.walk(given) if isinstance(name, ast.Name)}:
        return []
    name = targets[1].id  # type: ignore[attr-defined]
    after = ast.BinOp(ast.Name(name, ast.Load()), scaled.op, scaled.right)
    return [second, ast.Assign([ast.Name(name, ast.Store())], after)]


def _shown(node: Any) -> str:
    """Return the source of a statement's first line."""
    return ast.unparse(ast.fix_missing_locations(node)).split("\n")[0]


def _cut(text: str, size: int = MAX_SHOWN) -> str:
    return text if len(text) <= size else text[: size - 3] + "..."


def _differing(before: str, after: str) -> tuple[str, str]:
    """Return both texts; of long ones, the words around what differs."""
    if max(len(before), len(after)) <= MAX_SHOWN:
        return before, after
    old, new = before.split(" "), after.split(" ")
    start = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    rest = zip(reversed(old[start:]), reversed(new[start:]), strict=False)
    end = next((i for i, (a, b) in enumerate(rest) if a != b), min(len(old), len(new)) - start)
    start, end = max(0, start - NUM_AROUND), max(0, end - NUM_AROUND)
    texts = [" ".join(words[start : len(words) - end]) for words in (old, new)]
    one, other = (f"{'... ' if start else ''}{_cut(text, MAX_DIFFERING)}{' ...' if end else ''}" for text in texts)
    return one, other
