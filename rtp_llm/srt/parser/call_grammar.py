"""Grammars under which an answer consists of calls, in the model's own format and with arguments by their schemas.

A grammar is in Lark's syntax as llguidance reads it: ``<[7]>`` is the token 7, ``%json`` a JSON schema, and a rule with
``[lazy]`` ends where it first can.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rtp_llm.srt.parser.formats import (
    BareKeysCall,
    Body,
    Calls,
    Channels,
    Format,
    HeadCall,
    JsonCall,
    PythonCall,
    TagCall,
)
from rtp_llm.srt.parser.schemas import ToolSchemas

WHITESPACE = r"[\x20\x0A\x0D\x09]{0,40}"  # between JSON tokens: enough for what is indented
SPACE = "SPACE?"
# Of schemas whose values are written in a format of their own
PLAIN_STRING = frozenset({"type", "description", "title", "default", "examples"})
OF_ARGUMENTS = frozenset(
    {
        "type",
        "properties",
        "required",
        "additionalProperties",
        "description",
        "title",
        "$defs",
        "definitions",
        "$schema",
    }
)
BARE_KEYWORDS = frozenset(
    {"type", "properties", "required", "items", "enum", "description", "title", "default", "additionalProperties"}
)
_HEAD = "%llguidance {}\n"
_TERMINALS = "TEXT: /(.|\\n)*/\nSPACE: /[ \\n]{1,2}/\nNUMBER: /[0-9]{1,4}/\nWORD: /[A-Za-z0-9_-]{1,32}/\n"


def call_grammar(
    form: Format,
    tools: Sequence[Mapping[str, Any]],
    token_ids: Mapping[str, int],
    thinks: bool,
    is_single: bool,
) -> str | None:
    """Return the grammar of answers that call one of the tools; None: there is none for this format, or these tools.

    Args:
        tools: ``{"type": "function", "function": {"name", "parameters"}}`` each.
        token_ids: the special tokens, which a grammar names by their ids.
        thinks: the prompt has opened the thinking.
        is_single: exactly one call; otherwise one or more.
    """
    grammar = _Grammar(token_ids)
    functions = [tool["function"] for tool in tools]
    if form.channels is not None:
        answer = grammar.messages(form.channels, functions)
    elif form.calls is not None:
        thinking = form.thinking
        before = ""
        if thinking is not None:
            closing = grammar.up_to(thinking.close)
            before = f"{closing} {SPACE}" if thinks else f"({grammar.text(thinking.open)} {closing} {SPACE})?"
        try:
            answer = f"{before} {grammar.calls(form.calls, functions, is_single)}"
        except (_CannotWrite, RecursionError):
            return None
    else:
        return None
    return f"{_HEAD}start: {answer}\n{grammar.rules}{_TERMINALS}"


class _CannotWrite(Exception):
    """A schema for which there is no grammar in a format without JSON."""


class _Grammar:
    """The rules of a grammar, as its parts are written."""

    def __init__(self, token_ids: Mapping[str, int]) -> None:
        self.rules = ""
        self._token_ids = token_ids
        self._num_rules = 0
        special = sorted(token_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def text(self, text: str) -> str:
        """Return what matches a text: special tokens by their ids, and the rest as it is."""
        parts, end = [], 0
        for match in self._special.finditer(text):
            parts += [json.dumps(text[end : match.start()])] if match.start() > end else []
            parts.append(f"<[{self._token_ids[match[0]]}]>")
            end = match.end()
        return " ".join([*parts, *([json.dumps(text[end:])] if text[end:] else [])])

    def up_to(self, closing: str) -> str:
        """Return what matches any text up to and with ``closing``."""
        if self._special.match(closing):
            return f"TEXT {self.text(closing)}"
        return self._rule(f"TEXT {json.dumps(closing)}", "[lazy]")

    def messages(self, form: Channels, functions: Sequence[Mapping[str, Any]]) -> str:
        """Return what matches thinking, or none, and then one call."""
        head = f"{form.channel}{form.thinking[0]}{form.message}"
        start = self.text(f"{form.start}assistant")
        thinking = f"({self.text(head)} {self.up_to(form.ends[0])} {start})?"
        calls = []
        for item in functions:
            header = f"{form.channel}commentary to={form.function}{item['name']} <|constrain|>json{form.message}"
            calls.append(f"{self.text(header)} {self._json(item)}")
        return f"{thinking} ({self._any(calls)})"

    def calls(self, form: Calls, functions: Sequence[Mapping[str, Any]], is_single: bool) -> str:
        """Return what matches the calls with all that stands around them."""
        wrap = form.wrap if form.wrap[0] and not form.bare else ("", "")
        in_list = form.is_list and (isinstance(form.body[0], (JsonCall, PythonCall)))
        body = form.body[0]
        if in_list and len(form.body) > 1:  # the newer of two generations
            body, in_list = form.body[1], False
        calls = self._rule(self._any([self._call(form, body, item) for item in functions]))
        if not in_list:
            calls = self._joined(self._opened(wrap[0]), calls, self._closed(wrap[1]))
            wrap = ("", "")
        separator = self.text(", ") if in_list else self.text(f"{form.separator} ") if form.separator else SPACE
        many = calls if is_single else f"{calls} ({separator} {calls})*"
        listed = self._joined(self.text("["), many, self.text("]")) if in_list else many
        wrapped = self._joined(self._opened(wrap[0]), listed, self._closed(wrap[1]))
        if form.bare:
            return wrapped
        return self._joined(self._opened(form.section[0]), wrapped, self._closed(form.section[1]))

    def _call(self, form: Calls, body: Body, function: Mapping[str, Any]) -> str:
        name = function["name"]
        if isinstance(body, JsonCall):
            if body.name_is_key:
                return self._joined(self.text(f'{{"{name}": '), self._json(function), self.text("}"))
            head = f'{{"{body.names[0]}": {json.dumps(name)}, "{body.arguments[0]}": '
            return self._joined(self.text(head), self._json(function), self.text("}"))
        if isinstance(body, HeadCall):
            return self._head_call(body, function)
        if isinstance(body, TagCall):
            return self._tag_call(body, function)
        if isinstance(body, BareKeysCall):
            parameters = {**(function.get("parameters") or {}), "type": "object"}
            return self._joined(self.text(f"{body.prefix}{function['name']}"), self._bare(parameters, body.quote))
        return self._python_call(function)

    def _head_call(self, body: HeadCall, function: Mapping[str, Any]) -> str:
        name = function["name"]
        before = f"WORD {self.text(body.id_before_name)}" if body.id_before_name else ""
        named = self._joined(self.text(f"functions.{name}:"), "NUMBER") if body.name_is_id else self.text(name)
        after = f" {SPACE} ".join(map(self.text, body.after_name))
        space = SPACE if body.after_arguments else ""
        end = f" {SPACE} ".join(map(self.text, body.after_arguments))
        opening = self._joined(before, self.text("".join(body.before_name)), named, space, after, space)
        return self._joined(opening, self._json(function), space, end)

    def _tag_call(self, body: TagCall, function: Mapping[str, Any]) -> str:
        line = self.text("\n") if body.trims_lines else SPACE
        types = ToolSchemas([function])
        parts = [self.text(f"{body.name[0]}{function['name']}{body.name[1]}"), line]
        for key, schema, is_required in _members(_parameters(function)):
            is_string = "string" in types.types(function["name"], key)
            ends = next((end for end in body.key_ends if end.is_string is is_string), body.key_ends[-1])
            space = SPACE if body.value[0] else ""
            opening = self._joined(self.text(f"{body.key}{key}{ends.text}"), space, self.text(body.value[0]))
            closing = f"{ends.closing}{body.value[1]}"
            if is_string:
                value = self._string(schema, f"\n{closing}" if body.trims_lines else closing)
            else:
                value = f"%json {_dumped(schema)} {line} {self.text(closing)}"
            part = self._joined(opening, line if body.trims_lines else "", value, line)
            parts.append(part if is_required else f"({part})?")
        return self._joined(*parts, self.text(body.end))

    def _string(self, schema: Mapping[str, Any], closing: str) -> str:
        """Return what matches a string without quotes and what ends it."""
        if schema.keys() <= PLAIN_STRING:
            return self.up_to(closing)
        if schema.keys() <= PLAIN_STRING | {"enum"} and all(isinstance(value, str) for value in schema["enum"]):
            return f"({self._any([self.text(value) for value in schema['enum']])}) {self.text(closing)}"
        choices = schema.get("anyOf")
        if schema.keys() <= PLAIN_STRING | {"anyOf"} and all(item.keys() <= PLAIN_STRING for item in choices or ()):
            return self.up_to(closing)
        raise _CannotWrite(sorted(schema))

    def _python_call(self, function: Mapping[str, Any]) -> str:
        written = [
            (f"{self.text(key + '=')} %json {_dumped(schema)}", is_required)
            for key, schema, is_required in _members(_parameters(function))
        ]
        return self._joined(self.text(f"{function['name']}("), self._listed(written, ", "), self.text(")"))

    def _listed(self, items: Sequence[tuple[str, bool]], comma: str) -> str:
        """Return items with commas between; those that need not be there come last, and without others only one."""
        needed = [item for item, is_required in items if is_required]
        others = [item for item, is_required in items if not is_required]
        if not needed:
            return f"({self._any(others)})?" if others else ""
        return f" {self.text(comma)} ".join(needed) + "".join(f" ({self.text(comma)} {item})?" for item in others)

    def _bare(self, schema: Mapping[str, Any], quote: str) -> str:
        """Return what matches a value with bare keys and quoted strings.

        Raises:
            _CannotWrite: the schema says more than types, members, items and values.
        """
        if unknown := schema.keys() - BARE_KEYWORDS:
            raise _CannotWrite(sorted(unknown))
        kind = schema.get("type")
        if "enum" in schema:
            return f"({self._any([self._bare_constant(value, quote) for value in schema['enum']])})"
        if kind == "string":
            return f"{self.text(quote)} {self.up_to(quote)}"
        if kind == "object":
            members = [
                (f"{self.text(key + ':')} {self._bare(value, quote)}", is_required)
                for key, value, is_required in _members(schema)
            ]
            return self._joined(self.text("{"), self._listed(members, ","), self.text("}"))
        if kind == "array" and isinstance(schema.get("items"), Mapping):
            item = self._rule(self._bare(schema["items"], quote))
            return f"{self.text('[')} ({item} ({self.text(',')} {item})*)? {self.text(']')}"
        if kind in ("integer", "number", "boolean", "null"):
            return f"%json {_dumped({'type': kind})}"
        raise _CannotWrite([str(kind)])

    def _bare_constant(self, value: Any, quote: str) -> str:
        return self.text(f"{quote}{value}{quote}" if isinstance(value, str) else json.dumps(value))

    def _json(self, function: Mapping[str, Any]) -> str:
        return f"%json {_dumped({'type': 'object', **(function.get('parameters') or {})})}"

    def _opened(self, text: str) -> str:
        is_whole = not text.endswith(("=", '"'))  # otherwise the function's name belongs to the tag
        return self._joined(self.text(text), SPACE if is_whole else "") if text else ""

    def _closed(self, text: str) -> str:
        return f"{SPACE} {self.text(text)}" if text else ""

    def _any(self, choices: Sequence[str]) -> str:
        return " | ".join(self._rule(choice) for choice in choices)

    def _rule(self, body: str, attribute: str = "") -> str:
        name = f"part_{self._num_rules}"
        self._num_rules += 1
        self.rules += f"{name}{attribute}: {body}\n"
        return name

    @staticmethod
    def _joined(*parts: str) -> str:
        return " ".join(part for part in parts if part.strip())


def _dumped(schema: Mapping[str, Any]) -> str:
    return json.dumps({"x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": False}, **schema})


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of the arguments, of which each is written by itself.

    Raises:
        _CannotWrite: it says more than what each of them is.
    """
    parameters = dict(function.get("parameters") or {})
    if unknown := parameters.keys() - OF_ARGUMENTS:
        raise _CannotWrite(sorted(unknown))
    return parameters


def _members(parameters: Mapping[str, Any]) -> list[tuple[str, dict[str, Any], bool]]:
    """Return an object's members: name, schema, and whether it must be there."""
    definitions = {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
    required = parameters.get("required") or ()
    properties = parameters.get("properties") or {}
    return [(key, {**definitions, **schema}, key in required) for key, schema in properties.items()]
