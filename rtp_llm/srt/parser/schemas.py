"""A tool's JSON schema, as far as it says whether an argument that a model wrote without quotes is a string."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MAX_DEPTH = 16  # of references and alternatives
KIND_OF = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
# Formats by which programs name what a text is for: any text has them.
FREE_FORMATS = frozenset({"binary", "directory-path", "file-path", "password", "path"})
VALUES = frozenset({"const", "default", "enum", "examples"})  # what these hold are no schemas
BY_NAME = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})  # name -> schema
SPELLED = {"True": True, "False": False, "None": None}  # as Python writes them


class ToolSchemas:
    """The tools of a request: their names, and the types of their arguments.

    Args:
        tools: ``{"type": "function", "function": {"name", "parameters"}}`` each.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        functions = [tool.get("function", tool) for tool in tools]
        self._parameters = {function["name"]: function.get("parameters") or {} for function in functions}

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def types(self, function: str, argument: str) -> frozenset[str]:
        """Return the types that an argument may have, by JSON Schema's names; none: the schema does not say."""
        root = self._parameters.get(function)
        if not isinstance(root, Mapping):
            return frozenset()
        properties = root.get("properties")
        schema = properties.get(argument) if isinstance(properties, Mapping) else None
        return frozenset(_types(schema, root, MAX_DEPTH))

    def is_string(self, function: str, argument: str) -> bool:
        """Return whether an argument is a string, whatever stands there."""
        return self.types(function, argument) == {"string"}

    def json_of(self, function: str, argument: str, text: str) -> str:
        """Return the JSON of an argument that was written as ``text``.

        It is read as JSON if its types allow what comes of it; otherwise it is a string. Of a type that may be a string
        too, only null is not read as one.
        """
        types = self.types(function, argument)
        plain = text.strip()
        if "string" in types and not ("null" in types and plain in ("null", "None")):
            return json.dumps(text, ensure_ascii=False)
        if plain in SPELLED:
            return json.dumps(SPELLED[plain])
        try:
            json.loads(plain, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return json.dumps(text, ensure_ascii=False)
        return plain


def without_free_formats(schema: Any) -> Any:
    """Return a schema without the formats that say nothing about a text, which grammars do not know."""
    if isinstance(schema, list):
        return [without_free_formats(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept = {}
    for name, value in schema.items():
        if name == "format" and isinstance(value, str) and value in FREE_FORMATS:
            continue
        if name in BY_NAME and isinstance(value, Mapping):
            kept[name] = {key: without_free_formats(item) for key, item in value.items()}
        else:
            kept[name] = value if name in VALUES else without_free_formats(value)
    return kept


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> Iterator[str]:
    if not isinstance(schema, Mapping) or not depth:
        return
    declared = [item for item in _listed(schema.get("type")) if isinstance(item, str)]
    yield from declared
    if schema.get("nullable") is True:
        yield "null"
    if not declared:
        values = [*_listed(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
        yield from (KIND_OF.get(type(value), "object") for value in values)
    for name in ("anyOf", "oneOf", "allOf"):
        for choice in _listed(schema.get(name)):
            yield from _types(choice, root, depth - 1)
    if isinstance(schema.get("$ref"), str):
        yield from _types(referred(schema["$ref"], root), root, depth - 1)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def referred(reference: str, root: Mapping[str, Any]) -> Any:
    """Return what a reference within the schema refers to, such as ``#/$defs/Place``."""
    if not reference.startswith("#/"):
        return None
    place: Any = root
    for part in reference.removeprefix("#/").split("/"):
        place = place.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(place, Mapping) else None
    return place
