"""Grammars of calls in the model's own format, with arguments by their schemas."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rtp_llm.srt.parser.bare_grammar import BareValues, Member, members
from rtp_llm.srt.parser.formats import (
    BareKeysCall,
    Body,
    Calls,
    Format,
    HeadCall,
    JsonCall,
    PythonCall,
    TagCall,
    Thinking,
)
from rtp_llm.srt.parser.rules import SPACE, CannotWrite, Rules, dumped, joined
from rtp_llm.srt.parser.schemas import ToolSchemas, referred, without_free_formats

Function = Mapping[str, Any]  # name and parameters
# What schemas may say of arguments that are written one by one, and of strings without quotes.
NOTES = frozenset({"$comment", "$schema", "default", "deprecated", "description", "examples", "title"})
DEFINITIONS = frozenset({"$defs", "definitions"})
OF_ARGUMENTS = NOTES | DEFINITIONS | {"type", "properties", "required", "additionalProperties"}
OF_NAMED = OF_ARGUMENTS - {"additionalProperties"}
PLAIN_STRING = NOTES | {"type"}
MAX_DEPTH = 16  # of references


class CallRules(Rules):
    """Rules of calls.

    Args:
        token_ids: see Rules.
        loose: names of functions whose arguments may be any.
    """

    def __init__(self, token_ids: Mapping[str, int], loose: frozenset[str] = frozenset()) -> None:
        super().__init__(token_ids)
        self._loose = loose
        self._written: dict[Body, str] = {}  # the rules of calls

    def before(self, thinking: Thinking | None, thinks: bool) -> str:
        """Return what matches the thinking before an answer, or none. ``thinks``: the prompt has opened it."""
        if thinking is None:
            return ""
        closing = self.up_to(thinking.close)
        return f"{closing} {SPACE}" if thinks else f"({self.text(thinking.open)} {closing} {SPACE})?"

    def calls(self, form: Calls, functions: Sequence[Function], is_single: bool) -> str:
        """Return what matches the calls with all that stands around them."""
        wrap = form.wrap if form.wrap[0] and not form.bare else ("", "")
        in_list = form.is_list and (isinstance(form.body[0], (JsonCall, PythonCall)))
        body = form.body[0]
        if in_list and len(form.body) > 1:  # the newer of two generations
            body, in_list = form.body[1], False
        calls = self._one(body, functions)
        if not in_list:
            calls = joined(self._opened(wrap[0]), calls, self._closed(wrap[1]))
            wrap = ("", "")
        separator = self.text(", ") if in_list else self.text(f"{form.separator} ") if form.separator else SPACE
        many = calls if is_single else f"{calls} ({separator} {calls})*"
        listed = joined(self.text("["), many, self.text("]")) if in_list else many
        wrapped = joined(self._opened(wrap[0]), listed, self._closed(wrap[1]))
        if form.bare:
            return wrapped
        return joined(self._opened(form.section[0]), wrapped, self._closed(form.section[1]))

    def after(self, form: Calls, opening: str, functions: Sequence[Function], is_single: bool) -> str:
        """Return what matches calls and what closes them, after what has opened them.

        Args:
            opening: the section's, or that of a wrap.
        """
        in_section = bool(form.section[0]) and opening == form.section[0]
        wrap = form.wrap if in_section else ("", "")
        closing = form.section[1] if in_section else form.wrapped_in[opening]
        is_main = in_section or opening == form.wrap[0]
        choices = []
        for body in form.body:
            call = self._one(body, functions)
            separator = self.text(f"{form.separator} ") if form.separator else SPACE
            if form.is_list and is_main and isinstance(body, (JsonCall, PythonCall)):
                choices.append(joined(self._opened(wrap[0]), self._list(call, is_single), self._closed(wrap[1])))
                continue
            call = joined(self._opened(wrap[0]), call, self._closed(wrap[1]))
            repeats = not is_single and (in_section or bool(form.separator))
            choices.append(f"{call} ({separator} {call})*" if repeats else call)
        space = "" if opening.endswith(("=", '"')) else SPACE
        return joined(space, f"({self.any_of(choices)})", self._closed(closing))

    def _list(self, call: str, is_single: bool) -> str:
        many = call if is_single else f"{call} ({self.text(',')} INDENT? {call})*"
        return joined(self.text("["), "INDENT?", many, "INDENT?", self.text("]"))

    def _one(self, body: Body, functions: Sequence[Function]) -> str:
        """Return what matches one call. ``functions`` are always the same."""
        if body not in self._written:
            self._written[body] = self.rule(self.any_of([self._call(body, item) for item in functions]))
        return self._written[body]

    def _call(self, body: Body, function: Function) -> str:
        try:
            return self._of_body(body, function)
        except CannotWrite as error:
            raise CannotWrite(f"the parameters of {function['name']}: {error}") from None

    def _of_body(self, body: Body, function: Function) -> str:
        name = function["name"]
        if isinstance(body, JsonCall):
            if body.name_is_key:
                return joined(self.text(f'{{"{name}": '), self.json(function), self.text("}"))
            head = self.text(f'"{body.names[0]}": {json.dumps(name)}, "{body.arguments[0]}": ')
            number = self.text(f'"{body.id_first}": "')
            number = f"({number} NUMBER {self.text(chr(34) + ', ')})?" if body.id_first else ""
            return joined(self.text("{"), number, head, self.json(function), self.text("}"))
        if isinstance(body, HeadCall):
            return self._head_call(body, function)
        if isinstance(body, TagCall):
            return self._any_tags(body, name) if name in self._loose else self._tag_call(body, function)
        if isinstance(body, BareKeysCall):
            schema = {} if name in self._loose else dict(without_free_formats(function.get("parameters") or {}))
            values = BareValues(self, body.quote, schema)
            return joined(self.text(f"{body.prefix}{name}"), values.object(schema))
        return self._python_call(function)

    def _head_call(self, body: HeadCall, function: Function) -> str:
        name = function["name"]
        before = f"WORD {self.text(body.id_before_name)}" if body.id_before_name else ""
        named = joined(self.text(f"functions.{name}:"), "NUMBER") if body.name_is_id else self.text(name)
        call_id = f"({self.text(body.id_after_name)} WORD)?" if body.id_after_name else ""
        after = joined(call_id, f" {SPACE} ".join(map(self.text, body.after_name)))
        space = SPACE if body.after_arguments else ""
        end = f" {SPACE} ".join(map(self.text, body.after_arguments))
        opening = joined(before, self.text("".join(body.before_name)), named, space, after, space)
        return joined(opening, self.json(function), space, end)

    def _tag_call(self, body: TagCall, function: Function) -> str:
        line = self.text("\n") if body.trims_lines else SPACE
        types = ToolSchemas([function])
        parts = [self.text(f"{body.name[0]}{function['name']}{body.name[1]}"), line]
        for key, schema, is_required in _members(_parameters(function)):
            is_string = "string" in types.types(function["name"], key)
            ends = next((end for end in body.key_ends if end.is_string is is_string), body.key_ends[-1])
            space = SPACE if body.value[0] else ""
            opening = joined(self.text(f"{body.key}{key}{ends.text}"), space, self.text(body.value[0]))
            closing = f"{ends.closing}{body.value[1]}"
            if is_string:
                value = self._string(schema, f"\n{closing}" if body.trims_lines else closing)
            else:
                value = f"%json {dumped(schema)} {line} {self.text(closing)}"
            part = joined(opening, line if body.trims_lines else "", value, line)
            parts.append(part if is_required else f"({part})?")
        return joined(*parts, self.text(body.end))

    def _any_tags(self, body: TagCall, name: str) -> str:
        """Return what matches a call with any arguments."""
        line = self.text("\n") if body.trims_lines else SPACE
        ends = []
        for end in body.key_ends:
            opening = joined(self.text(end.text), SPACE if body.value[0] else "", self.text(body.value[0]))
            ends.append(f"{opening} {self.up_to(f'{end.closing}{body.value[1]}')}")
        part = joined(self.text(body.key), "KEY", f"({self.any_of(ends)})", line)
        return joined(self.text(f"{body.name[0]}{name}{body.name[1]}"), line, f"({part})*", self.text(body.end))

    def _string(self, schema: Mapping[str, Any], closing: str, depth: int = MAX_DEPTH) -> str:
        """Return what matches a string without quotes and what ends it. Other types are written as strings, too."""
        said = {key: value for key, value in schema.items() if key not in NOTES | DEFINITIONS}
        if "$ref" in said and depth:
            target = referred(said.pop("$ref"), schema)
            if isinstance(target, Mapping):
                kept = {key: value for key, value in schema.items() if key in DEFINITIONS}
                return self._string({**target, **kept, **said}, closing, depth - 1)
        choices = said.get("anyOf")
        if said.keys() <= {"type", "anyOf"} and all(item.keys() <= PLAIN_STRING for item in choices or ()):
            return self.up_to(closing)
        values = [said["const"]] if "const" in said else said.get("enum") or ()
        if said.keys() <= {"type", "const", "enum"} and all(isinstance(value, str) for value in values):
            return f"({self.any_of([self.text(value) for value in values])}) {self.text(closing)}"
        if said.keys() <= {"type", "minLength", "maxLength"} and said["type"] == "string":
            return self._bounded(said.get("minLength", 0), said.get("maxLength"), closing)
        raise CannotWrite(f"strings with {', '.join(sorted(said.keys() - {'type'}))}")

    def _bounded(self, least: int, most: int | None, closing: str) -> str:
        """Return what matches a text of so many characters that ends with the first ``closing``."""
        text = f"/(.|\\n){{{least},{'' if most is None else most}}}/"
        if isinstance(self.parts(closing)[0], int):
            return f"{self.terminal(text)} {self.text(closing)}"
        end = json.dumps(closing)
        return self.rule(self.terminal(f"({text} & ~(TEXT {end} TEXT)) {end}"), "[lazy]")

    def _python_call(self, function: Function) -> str:
        if function["name"] in self._loose:
            part = f"KEY {self.text('=')} %json {dumped({})}"
            return joined(self.text(f"{function['name']}("), f"({part} ({self.text(', ')} {part})*)?", self.text(")"))
        items = []
        for key, schema, is_required in _members(_parameters(function)):
            values = f"%json {dumped(schema)}"
            if schema.get("type") == "boolean" and not schema.keys() & {"enum", "const"}:
                values = f'({values} | "True" | "False")'
            items.append((f"{self.text(key + '=')} {values}", is_required))
        return joined(self.text(f"{function['name']}("), self.listed(items, ", "), self.text(")"))

    def json(self, function: Function) -> str:
        """Return what matches the JSON of a call's arguments."""
        parameters = {} if function["name"] in self._loose else _closed_object(function.get("parameters") or {})
        return f"%json {dumped({**parameters, 'type': 'object'})}"

    def _opened(self, text: str) -> str:
        is_whole = not text.endswith(("=", '"'))  # otherwise the function's name belongs to the tag
        return joined(self.text(text), SPACE if is_whole else "") if text else ""

    def _closed(self, text: str) -> str:
        return f"{SPACE} {self.text(text)}" if text else ""


def bound_functions(
    tools: Sequence[Mapping[str, Any]], strict: frozenset[str]
) -> tuple[list[Function], frozenset[str]]:
    """Return the tools' functions, and the names of those whose arguments may be any: which are not ``strict``."""
    functions = [tool["function"] for tool in tools]
    return functions, frozenset(function["name"] for function in functions) - strict


def known_calls(form: Format) -> Calls:
    """Return how calls stand in an answer without headers. Raise CannotWrite if that is not known."""
    if form.calls is None:
        raise CannotWrite("the form of this model's calls is not known")
    return form.calls


def _closed_object(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema of arguments under which there are only those that it names, unless it speaks of others."""
    names = parameters.get("properties", {})
    if (
        parameters.keys() <= OF_NAMED
        and isinstance(names, Mapping)
        and set(parameters.get("required", ())) <= set(names)
    ):
        return {**parameters, "additionalProperties": False}
    return parameters


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of the arguments, of which each is written by itself.

    Raises:
        CannotWrite: it says more than what each of them is.
    """
    parameters = dict(without_free_formats(function.get("parameters") or {}))
    if unknown := parameters.keys() - OF_ARGUMENTS:
        raise CannotWrite(", ".join(sorted(unknown)))
    return parameters


def _members(parameters: Mapping[str, Any]) -> list[Member]:
    """Return the arguments, each with all definitions."""
    definitions = {name: parameters[name] for name in DEFINITIONS if name in parameters}
    return [(key, {**definitions, **schema}, is_required) for key, schema, is_required in members(parameters)]
