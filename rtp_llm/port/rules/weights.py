"""Loading of weights becomes declarative where all that it does is to map names.

``hf_to_vllm_mapper = WeightsMapper(…)`` and ``load_weights`` by ``AutoWeightsLoader`` become
``packed_modules_mapping``, ``rename`` and ``ignore``. Everything else is kept: ``load_weights`` works here too, through
loaders of the same names.
"""

import re
from dataclasses import dataclass, field

import libcst as cst
from libcst import matchers as m

from rtp_llm.port.names import names_in
from rtp_llm.port.program import Program, code, lineage, methods
from rtp_llm.port.rules.base import Rule

LOAD = "load_weights"
MAPPER = "hf_to_vllm_mapper"
_SHARD_ORDER = {"q": 0, "k": 1, "v": 2}


@dataclass
class Names:
    """What a mapper says, as this engine declares it."""

    packed: dict[str, list[str]] = field(default_factory=dict)
    rename: list[tuple[str, str]] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)

    def add(self, other: "Names") -> None:
        self.packed |= other.packed
        self.rename += [pair for pair in other.rename if pair not in self.rename]
        self.ignore += [pattern for pattern in other.ignore if pattern not in self.ignore]


class NotDeclarative(ValueError):
    """A form of loading that the rule does not recognise completely."""


def declared_names(program: Program) -> Names:
    """Return what all loaders of the program do; raise NotDeclarative if one does more than mapping names."""
    names = Names()
    classes = program.classes()
    mappers = _Mappers(program, classes)
    if any(
        LOAD in names_in(function) or "weight_loader" in names_in(function) for function in program.functions().values()
    ):
        raise NotDeclarative("a function loads weights")
    entries = {name for _, name in program.entries}
    found = False
    for name, node in classes.items():
        if LOAD not in methods(node):
            continue
        found = True
        mapper = _mapper_of(methods(node)[LOAD], node)
        if mapper is not None:
            names.add(mappers.names(name, mapper, nested=name not in entries))
    if not found:
        raise NotDeclarative("nothing loads weights")
    return names


def _mapper_of(method: cst.FunctionDef, node: cst.ClassDef) -> cst.BaseExpression | None:
    """Return the mapper that a plain ``load_weights`` uses, None if it uses none."""
    lines = [
        line for line in method.body.body if not m.matches(line, m.SimpleStatementLine(body=[m.Expr(m.SimpleString())]))
    ]
    calls = [call for line in lines for call in m.findall(line, m.Call()) if isinstance(call, cst.Call)]
    loads = [call for call in calls if m.matches(call.func, m.Attribute(attr=m.Name(LOAD)))]
    makes = [call for call in calls if m.matches(call.func, m.Name("AutoWeightsLoader"))]
    if len(lines) > 2 or len(calls) != 2 or len(loads) != 1 or len(makes) != 1:
        raise NotDeclarative(f"{node.name.value}.{LOAD} does more than AutoWeightsLoader")
    if len(makes[0].args) != 1:
        raise NotDeclarative(f"{node.name.value}.{LOAD} skips tensors")
    first, *rest = loads[0].args
    if code(first.value) != method.params.params[1].name.value:
        raise NotDeclarative(f"{node.name.value}.{LOAD} changes tensors")
    if not rest:
        return None
    if len(rest) != 1 or (rest[0].keyword is not None and rest[0].keyword.value != "mapper"):
        raise NotDeclarative(f"{node.name.value}.{LOAD} takes more than a mapper")
    return rest[0].value


class _Mappers:
    """Reads ``WeightsMapper(…)`` expressions of literal dictionaries."""

    def __init__(self, program: Program, classes: dict[str, cst.ClassDef]) -> None:
        self.program = program
        self.classes = classes

    def names(self, owner: str, node: cst.BaseExpression, nested: bool) -> Names:
        if isinstance(node, cst.Call) and m.matches(node.func, m.Name("WeightsMapper")):
            return self._literal(node, nested)
        if isinstance(node, cst.BinaryOperation) and isinstance(node.operator, cst.BitOr):
            names = self.names(owner, node.left, nested)
            names.add(self.names(owner, node.right, nested))
            return names
        if isinstance(node, cst.Attribute) and isinstance(node.value, cst.Name):
            holder = owner if node.value.value in ("self", "cls") else node.value.value
            return self.names(holder, self._attribute(holder, node.attr.value), nested)
        raise NotDeclarative(f"{owner}'s mapper is made by {type(node).__name__}")

    def _attribute(self, owner: str, name: str) -> cst.BaseExpression:
        for node in lineage(owner, self.classes):
            for statement in node.body.body:
                for small in getattr(statement, "body", []) if isinstance(statement, cst.SimpleStatementLine) else []:
                    if isinstance(small, cst.Assign) and code(small.targets[0].target) == name:
                        return small.value
        raise NotDeclarative(f"{owner} has no literal {name}")

    def _literal(self, call: cst.Call, nested: bool) -> Names:
        names = Names()
        for arg in call.args:
            kind = arg.keyword.value if arg.keyword else ""
            if not isinstance(arg.value, cst.Dict):
                raise NotDeclarative(f"{kind} is not a literal dictionary")
            pairs = [_pair(element) for element in arg.value.elements]
            if kind == "orig_to_new_stacked":
                names.packed |= _packed(pairs)
            elif kind in _PATTERNS and not (nested and kind == "orig_to_new_prefix"):
                _add_patterns(names, kind, pairs)
            else:
                raise NotDeclarative(f"{kind or 'an unnamed mapping'} is not known, or is relative to a part")
        return names


_PATTERNS = {"orig_to_new_substr": "{}", "orig_to_new_prefix": "^{}", "orig_to_new_suffix": "{}$"}


def _pair(element: cst.BaseDictElement) -> tuple[str, object]:
    if isinstance(element, cst.DictElement) and isinstance(element.key, cst.SimpleString):
        key = str(element.key.evaluated_value)
        value = element.value
        if isinstance(value, cst.SimpleString):
            return key, value.evaluated_value
        if code(value) == "None":
            return key, None
        if isinstance(value, cst.Tuple) and len(value.elements) == 2:
            return key, tuple(code(part.value).strip("\"'") for part in value.elements)
    raise NotDeclarative("a mapping has entries that are not literals")


def _packed(pairs: list[tuple[str, object]]) -> dict[str, list[str]]:
    groups: dict[str, list[tuple[int, str]]] = {}
    for source, value in pairs:
        if not isinstance(value, tuple):
            raise NotDeclarative("a stacked entry has no shard")
        packed, shard = value
        order = _SHARD_ORDER.get(shard, int(shard) if shard.isdigit() else -1)
        if order < 0:
            raise NotDeclarative(f"shard {shard} is not one part")
        groups.setdefault(packed.strip("."), []).append((order, source.strip(".")))
    for packed, parts in groups.items():
        if sorted(order for order, _ in parts) != list(range(len(parts))):
            raise NotDeclarative(f"{packed} has several sources for one part")
    return {packed: [source for _, source in sorted(parts)] for packed, parts in groups.items()}


def _add_patterns(names: Names, kind: str, pairs: list[tuple[str, object]]) -> None:
    for key, value in pairs:
        pattern = _PATTERNS[kind].format(re.escape(key).replace(r"\_", "_").replace(r"\-", "-"))
        if value is None:
            names.ignore.append(pattern)
        elif isinstance(value, str):
            names.rename.append((pattern, value.replace("\\", r"\\")))
        else:
            raise NotDeclarative("a name is mapped to something else")


class DeclareWeights(Rule):
    """Writes the declarations into the entries, and removes mappers and loaders."""

    def __init__(self, program: Program, names: Names) -> None:
        super().__init__(program)
        self.names = names
        self.entries = {name for _, name in program.entries}

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.BaseStatement:
        body = updated_node.body
        if isinstance(body, cst.IndentedBlock):
            kept = [statement for statement in body.body if not self._goes(statement)]
            if original_node.name.value in self.entries:
                kept = self._declared(original_node, kept)
            if not kept:
                kept = [cst.parse_statement("pass")]
            updated_node = updated_node.with_changes(body=body.with_changes(body=kept))
        return super().leave_ClassDef(original_node, updated_node)

    def _goes(self, statement: cst.BaseStatement) -> bool:
        if isinstance(statement, cst.FunctionDef):
            return statement.name.value == LOAD
        return _assigned_name(statement) == MAPPER

    def _declared(self, node: cst.ClassDef, statements: list[cst.BaseStatement]) -> list[cst.BaseStatement]:
        old = next((line for line in statements if _assigned_name(line) == "packed_modules_mapping"), None)
        packed = dict(self.names.packed)
        if old is not None and packed:
            statements = [line for line in statements if line is not old]
        lines: list[cst.BaseStatement] = []
        if packed:
            lines.append(_statement(f"packed_modules_mapping = {_pretty(packed)}"))
        if self.names.rename:
            pairs = ", ".join(f"(r{_quoted(old)}, {_quoted(new)})" for old, new in self.names.rename)
            lines.append(_statement(f"rename = [{pairs}]"))
        if self.names.ignore:
            lines.append(_statement(f"ignore = [{', '.join('r' + _quoted(pattern) for pattern in self.names.ignore)}]"))
        self.count("loading of weights made declarative")
        has_docstring = bool(statements) and m.matches(
            statements[0], m.SimpleStatementLine(body=[m.Expr(value=m.SimpleString())])
        )
        place = 1 if has_docstring else 0
        return [*statements[:place], *lines, *statements[place:]]


def _assigned_name(statement: cst.BaseStatement) -> str:
    if isinstance(statement, cst.SimpleStatementLine) and len(statement.body) == 1:
        small = statement.body[0]
        if isinstance(small, cst.Assign):
            return code(small.targets[0].target)
        if isinstance(small, cst.AnnAssign):
            return code(small.target)
    return ""


def _statement(text: str) -> cst.BaseStatement:
    return cst.parse_statement(text)  # type: ignore[return-value]


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def _pretty(packed: dict[str, list[str]]) -> str:
    entries = [f"{_quoted(key)}: [{', '.join(map(_quoted, sources))}]" for key, sources in packed.items()]
    one = "{" + ", ".join(entries) + "}"
    return one if len(one) < 90 else "{\n" + "".join(f"        {entry},\n" for entry in entries) + "    }"


def rewrite_weights(program: Program) -> None:
    try:
        names = declared_names(program)
    except NotDeclarative:
        return
    program.module = program.module.visit(DeclareWeights(program, names))
