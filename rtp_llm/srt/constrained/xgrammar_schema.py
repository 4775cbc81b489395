"""What xgrammar keeps wholly of JSON schemas: all else is refused by name, since it would pass over most of it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rtp_llm.srt.constrained.backend import GrammarError
from rtp_llm.srt.request_spec import GrammarSpec

NOTES = frozenset({"$comment", "$schema", "default", "deprecated", "description", "examples", "title"})
DEFINITIONS = frozenset({"$defs", "definitions"})
MOST_REPEATED = 1024  # characters or items that a limit may name: each takes its place in the compiled grammar
OF_TYPE: Mapping[str, frozenset[str]] = {
    "null": frozenset(),
    "boolean": frozenset(),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "string": frozenset({"minLength", "maxLength"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
}
LIMITS = ("minLength", "maxLength", "minItems", "maxItems")
NO_SPACE = ""
TYPES: Mapping[str, Any] = {
    "null": type(None),
    "integer": int,
    "number": (int, float),
    "string": str,
    "array": list,
    "object": dict,
}


def is_taken(spec: GrammarSpec) -> bool:
    """Return whether a grammar is one for xgrammar. It is not if it is written in Lark, as ours around contents are, or
    a regular expression, of which xgrammar passes over parts."""
    if spec.around is not None:
        return False
    return spec.kind in ("json_schema", "choice") or (spec.kind == "grammar" and "::=" in spec.text)


def kept_schema(spec: GrammarSpec) -> str:
    """Return a JSON schema as xgrammar gets it: objects with properties have no others, unless the schema says more.

    Raises:
        GrammarError: it would be kept more weakly than it says.
    """
    if spec.whitespace not in (None, NO_SPACE):
        raise GrammarError("whitespace_pattern cannot be enforced by xgrammar")
    schema = json.loads(spec.text)
    _Check(schema).schema(schema)
    return json.dumps(schema)


class _Check:
    """Checks a schema, and adds what it leaves open to objects with properties."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._followed: set[str] = set()

    def schema(self, schema: Any) -> None:
        if schema is True:
            return
        if not isinstance(schema, dict):
            raise _refused(json.dumps(schema))
        said = schema.keys() - NOTES - DEFINITIONS
        for definitions in DEFINITIONS & schema.keys():
            for item in schema[definitions].values():
                self.schema(item)
        for lead in ("$ref", "anyOf"):
            if lead in said:
                _check_alone(said, {lead})
                return self._reference(schema[lead]) if lead == "$ref" else self._each(schema[lead])
        for lead in ("const", "enum"):
            if lead in said:
                _check_alone(said, {lead, "type"})
                _check_values(schema[lead] if lead == "enum" else [schema[lead]], schema.get("type"))
                return
        if "type" in said:
            self._typed(schema, said)
        elif said:
            raise _refused(*said, why=" without type")

    def _reference(self, path: str) -> None:
        if path in self._followed:
            return
        self._followed.add(path)
        target = self._root
        for part in path.removeprefix("#").split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            target = target.get(part) if isinstance(target, Mapping) else None
        if not path.startswith("#") or target is None:
            raise _refused("$ref", why=f" to {path[:80]!r}")
        self.schema(target)

    def _each(self, schemas: Any) -> None:
        for item in schemas:
            self.schema(item)

    def _typed(self, schema: dict[str, Any], said: set[str]) -> None:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        _check_alone(said, {"type"}.union(*(OF_TYPE.get(name, ()) for name in types)))
        for name in LIMITS:
            if isinstance(value := schema.get(name), (int, float)) and value > MOST_REPEATED:
                raise GrammarError(f"{name} is {value}: xgrammar is given at most {MOST_REPEATED}")
        if "array" in types:
            self._each(schema.get("prefixItems", ()))
            if schema.get("items", False) is not False:
                self.schema(schema["items"])
        if "object" in types:
            self._object(schema)

    def _object(self, schema: dict[str, Any]) -> None:
        properties = schema.get("properties", {})
        self._each(properties.values())
        if unknown := [name for name in schema.get("required", ()) if name not in properties]:
            raise _refused("required", why=f" of {unknown[0][:80]!r}, which is not in properties")
        others = schema.setdefault("additionalProperties", not properties)
        if others is not False and properties:
            raise _refused("additionalProperties", why=" that is not false, beside properties")
        if others is not False:
            self.schema(others)


def _check_alone(said: set[str], known: set[str]) -> None:
    if others := said - known:
        raise _refused(*others, why=f" beside {', '.join(sorted(said & known))}")


def _check_values(values: Sequence[Any], types: Any) -> None:
    """Raise GrammarError for a value of another type, which xgrammar would take."""
    names = types if isinstance(types, list) else [types]
    for value in values if types is not None else ():
        if not any(_is_of(value, name) for name in names):
            raise _refused("type", why=f" beside the value {json.dumps(value)[:80]}")


def _is_of(value: Any, name: str) -> bool:
    if isinstance(value, bool) or name == "boolean":
        return isinstance(value, bool) and name == "boolean"
    return isinstance(value, TYPES[name])


def _refused(*keywords: str, why: str = "") -> GrammarError:
    return GrammarError(f"keywords that xgrammar does not enforce: {', '.join(sorted(keywords))}{why}")
