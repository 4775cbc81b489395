"""Grammars of values with bare keys and quoted strings that know no escapes: ``{a:1,b:<|"|>x<|"|>}``."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from rtp_llm.srt.parser.rules import CannotWrite, Rules, dumped, joined
from rtp_llm.srt.parser.schemas import referred

Schema = Mapping[str, Any]
Member = tuple[str, dict[str, Any], bool]  # name, schema, whether it must be there

NOTES = frozenset({"$comment", "$defs", "$schema", "default", "definitions", "deprecated", "description"})
NOTES |= {"examples", "title"}
# Keywords beside the type that are honoured, by type
KEYWORDS: Mapping[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset(),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "boolean": frozenset(),
    "null": frozenset(),
}


class BareValues:
    """Writes what matches values of a schema.

    Args:
        rules: where rules are written.
        quote: what stands before and after a string.
        root: the schema in which references are looked up.
    """

    def __init__(self, rules: Rules, quote: str, root: Schema) -> None:
        self._rules = rules
        self._quote = quote
        self._root = root
        self._referred: dict[str, str] = {}  # a reference -> the rule of what it refers to
        self._any = ""

    def object(self, schema: Schema) -> str:
        """Return what matches the object of a call's arguments.

        Raises:
            CannotWrite: a schema says what is not honoured here.
        """
        return self.value({**schema, "type": "object"}) if schema else f"{self.any()}_object"

    def value(self, schema: Any) -> str:
        """Return what matches a value. Raise CannotWrite: see ``object``."""
        if schema is True or (isinstance(schema, Mapping) and not schema.keys() - NOTES):
            return self.any()
        if not isinstance(schema, Mapping):
            raise CannotWrite("false")
        said = {key: value for key, value in schema.items() if key not in NOTES}
        if "$ref" in said:
            return self._reference(said)
        if "anyOf" in said:
            return self._choice(said)
        if said.keys() <= {"type", "enum", "const"} and said.keys() & {"enum", "const"}:
            values = [said["const"]] if "const" in said else said["enum"]
            return f"({self._rules.any_of([self._constant(value) for value in values])})"
        kinds = said.get("type")
        if isinstance(kinds, list):
            return f"({self._rules.any_of([self._typed({**said, 'type': kind}, kinds) for kind in kinds])})"
        return self._typed(said, [kinds])

    def any(self) -> str:
        """Return what matches any value."""
        if self._any:
            return self._any
        self._any = name = self._rules.new_name()
        text = self._rules.text
        member = f"KEY {text(':')} {name}"
        listed = f"{name} ({text(',')} {name})*"
        choices = [f"%json {dumped({'type': ['number', 'boolean', 'null']})}", f"{name}_object"]
        choices += [f"{text(self._quote)} {self._rules.up_to(self._quote)}", f"{text('[')} ({listed})? {text(']')}"]
        self._rules.define(f"{name}_object", f"{text('{')} ({member} ({text(',')} {member})*)? {text('}')}")
        self._rules.define(name, self._rules.any_of(choices))
        return name

    def _reference(self, said: Schema) -> str:
        reference = said["$ref"]
        target = referred(reference, self._root) if isinstance(reference, str) and len(said) == 1 else None
        if target is None:
            raise CannotWrite(f"$ref {str(reference)[:80]}")
        if reference not in self._referred:
            self._referred[reference] = self._rules.new_name()  # before its body, which may refer to it
            self._rules.define(self._referred[reference], self.value(target))
        return self._referred[reference]

    def _choice(self, said: Schema) -> str:
        if len(said) > 1:
            raise CannotWrite(f"anyOf with {', '.join(sorted(said.keys() - {'anyOf'}))}")
        return f"({self._rules.any_of([self.value(item) for item in said['anyOf']])})"

    def _constant(self, value: Any) -> str:
        if isinstance(value, (dict, list)):
            raise CannotWrite("enum or const with objects or lists")
        return self._rules.text(f"{self._quote}{value}{self._quote}" if isinstance(value, str) else json.dumps(value))

    def _typed(self, said: Schema, kinds: list[Any]) -> str:
        kind = str(said.get("type"))
        known = frozenset().union(*(KEYWORDS.get(str(item), frozenset()) for item in kinds))
        if kind not in KEYWORDS or said.keys() - known - {"type"}:
            raise CannotWrite(", ".join(sorted(said.keys() - known - {"type"})) or f"the type {kind}")
        own = {key: value for key, value in said.items() if key in KEYWORDS[kind]}
        writers: Mapping[str, Callable[[Schema], str]] = {
            "object": self._object,
            "array": self._array,
            "string": lambda _: f"{self._rules.text(self._quote)} {self._rules.up_to(self._quote)}",
        }
        return writers[kind](own) if kind in writers else f"%json {dumped({**own, 'type': kind})}"

    def _object(self, said: Schema) -> str:
        text = self._rules.text
        items = [(f"{text(key + ':')} {self.value(schema)}", is_required) for key, schema, is_required in members(said)]
        return joined(text("{"), self._rules.listed(items, ","), text("}"))

    def _array(self, said: Schema) -> str:
        least, most = said.get("minItems", 0), said.get("maxItems")
        item = self._rules.rule(self.value(said.get("items", True)))
        if most == 0:
            return self._rules.text("[]")
        number = f"{{{max(0, least - 1)},{'' if most is None else most - 1}}}"
        listed = f"{item} ({self._rules.text(',')} {item}){number}"
        return joined(self._rules.text("["), listed if least else f"({listed})?", self._rules.text("]"))


def members(schema: Schema) -> list[Member]:
    """Return an object's members.

    Raises:
        CannotWrite: one of them may not be there, whatever it is.
    """
    properties = dict(schema.get("properties") or {})
    required = schema.get("required") or ()
    properties |= {name: {} for name in required if name not in properties}
    listed: list[Member] = []
    for key, value in properties.items():
        if value is False:
            raise CannotWrite(f"{key}: false")
        listed.append((key, {} if value is True else value, key in required))
    return listed
