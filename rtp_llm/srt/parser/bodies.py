"""Readers of one call, for each kind of body in ``formats.py``.

A reader tells the ``CallSink`` what it finds. Until it has begun a call it may raise Malformed, and what it read is
text after all; afterwards the call stands, and the sink ends it.
"""

import json
import re

from rtp_llm.srt.parser.call_sink import ArgumentsObject, CallSink, escaped
from rtp_llm.srt.parser.formats import BareKeysCall, Body, HeadCall, JsonCall, PythonCall, TagCall
from rtp_llm.srt.parser.json_text import is_json, json_string, json_value, said
from rtp_llm.srt.parser.python_call import read_python_call
from rtp_llm.srt.parser.source import Emit, Malformed, Source, Steps

INDEXED_NAME = re.compile(r"(?:functions\.)?(?P<name>.+?)(?::\d+)?")
MAX_DEPTH = 64  # of a value with bare keys
SCALAR_ENDS = (",", "}", "]")


def read_call(source: Source, sink: CallSink, bodies: tuple[Body, ...], ends: tuple[str, ...]) -> Steps[None]:
    """Read one call. ``ends``: the texts with which a call can end; the last of a tag's value is found by them."""
    body = bodies[0]
    if len(bodies) > 1:
        yield from source.has()
        is_json = source.text.startswith("{", source.pos)
        body = next(item for item in bodies if isinstance(item, JsonCall) == is_json)
    if isinstance(body, JsonCall):
        yield from (_read_keyed if body.name_is_key else _read_json)(source, sink, body)
    elif isinstance(body, HeadCall):
        yield from _read_head(source, sink, body)
    elif isinstance(body, TagCall):
        yield from _read_tags(source, sink, body, ends)
    elif isinstance(body, PythonCall):
        yield from read_python_call(source, sink)
    else:
        yield from _read_bare_keys(source, sink, body)


class _Members:
    """The members of a call in JSON: what came so far."""

    def __init__(self) -> None:
        self.name = ""
        self.has_begun = False
        self.held: str | None = None  # arguments that came before the name


def _read_json(source: Source, sink: CallSink, body: JsonCall) -> Steps[None]:
    members = _Members()
    yield from _read_members(source, sink, body, members)
    if not members.name:
        raise Malformed
    if not members.has_begun:
        sink.begin(members.name)
        sink.arguments(members.held or "{}")
        sink.end()


def _read_members(source: Source, sink: CallSink, body: JsonCall, members: _Members) -> Steps[None]:
    yield from source.expect("{")
    yield from source.space()
    if (yield from source.accept("}")):
        return
    while True:
        key = yield from json_string(source)
        yield from source.space()
        yield from source.expect(":")
        yield from source.space()
        yield from _read_member(source, sink, body, members, key)
        yield from source.space()
        if (yield from source.expect(",", "}")) == "}":
            return
        yield from source.space()


def _read_member(source: Source, sink: CallSink, body: JsonCall, members: _Members, key: str) -> Steps[None]:
    has_more = yield from source.has()
    begins = source.text[source.pos] if has_more else ""
    if key in body.names and begins == '"' and not members.name:
        members.name = yield from json_string(source)
    elif key == "function" and begins == "{":  # as OpenAI nests it
        yield from _read_members(source, sink, body, members)
    elif key in body.arguments and not members.has_begun:
        if members.name and begins == "{":
            sink.begin(members.name)
            members.has_begun = True
            yield from json_value(source, sink.arguments)
            sink.end()
        else:
            parts: list[str] = []
            yield from json_value(source, parts.append)
            members.held = _object("".join(parts))
    elif sink.only_known and key not in ("type", "id", *body.names):
        raise Malformed
    else:
        yield from json_value(source, lambda text: None)


def _object(text: str) -> str:
    """Return the JSON text of an object that was written as one, as a string of one, or as null."""
    if text.startswith("{"):
        return text
    value = said(text)
    if value is None:
        return "{}"
    if isinstance(value, str) and isinstance(said(value), dict):
        return value
    raise Malformed


def _read_keyed(source: Source, sink: CallSink, body: JsonCall) -> Steps[None]:
    yield from source.expect("{")
    yield from source.space()
    name = yield from json_string(source)
    yield from source.space()
    yield from source.expect(":")
    yield from source.space()
    if not (yield from source.has()) or source.text[source.pos] != "{":
        raise Malformed
    sink.begin(name)
    yield from json_value(source, sink.arguments)
    sink.end()
    yield from source.space()
    yield from source.expect("}")


def _read_head(source: Source, sink: CallSink, body: HeadCall) -> Steps[None]:
    call_id = ""
    if body.id_before_name:
        call_id = yield from source.name()
        yield from source.expect(body.id_before_name)
    yield from _pass(source, body.before_name, body.optional)
    name = yield from source.name()
    if body.name_is_id:
        call_id = name
        match = INDEXED_NAME.fullmatch(name)
        name = match["name"] if match else name
    if body.id_after_name:
        yield from source.space()
        if (yield from source.accept(body.id_after_name)):
            call_id = yield from source.name()
    yield from _pass(source, body.after_name, body.optional)
    yield from source.space()
    if not (yield from source.has()) or source.text[source.pos] != "{":
        raise Malformed
    sink.begin(name, call_id)
    yield from json_value(source, sink.arguments)
    sink.end()
    yield from _pass(source, body.after_arguments, body.optional)


def _pass(source: Source, literals: tuple[str, ...], optional: tuple[str, ...]) -> Steps[None]:
    for literal in literals:
        yield from source.space()
        if literal in optional:
            yield from source.accept(literal)
        else:
            yield from source.expect(literal)


def _read_tags(source: Source, sink: CallSink, body: TagCall, ends: tuple[str, ...]) -> Steps[None]:
    if body.name[0]:
        yield from source.expect(body.name[0])
    name = yield from source.name()
    if body.name[1]:
        yield from source.expect(body.name[1])
    follows = (body.key, *((body.end,) if body.end else ends))
    if not (yield from source.precedes(follows)):
        raise Malformed
    sink.begin(name)
    written = ArgumentsObject(sink)
    try:
        while not (yield from _accepts_end(source, body)):
            yield from _read_tag(source, sink, body, written, name, follows)
    except Malformed:
        written.give_up(source)
        raise
    written.end()
    if body.end:
        yield from source.accept(body.end)


def _accepts_end(source: Source, body: TagCall) -> Steps[bool]:
    """Pass white space; return whether the arguments have ended."""
    yield from source.space()
    if not (yield from source.has()):
        if source.is_cut:
            raise Malformed
        return True
    return not (yield from source.precedes((body.key,)))


def _read_tag(
    source: Source, sink: CallSink, body: TagCall, written: ArgumentsObject, function: str, follows: tuple[str, ...]
) -> Steps[None]:
    source.mark()
    yield from source.expect(body.key)
    parts: list[str] = []
    found = yield from source.until(tuple(end.text for end in body.key_ends), parts.append)
    if found is None:
        raise Malformed
    key = "".join(parts).strip()
    _, is_string, closing = next(end for end in body.key_ends if end.text == found)
    closing += body.value[1]
    if body.value[0]:
        yield from source.space()
        yield from source.expect(body.value[0])
    if body.trims_lines:
        yield from source.accept("\n")
    source.release()
    written.key(key)
    if is_string or (is_string is None and sink.schemas.is_string(function, key)):
        sink.arguments('"')
        yield from _read_value(source, closing, body.trims_lines, follows, escaped(sink.arguments))
        sink.arguments('"')
        return
    value: list[str] = []
    try:
        yield from _read_value(source, closing, body.trims_lines, follows, value.append)
    except Malformed:
        sink.arguments("".join(value))
        raise
    text = "".join(value)
    sink.arguments(text if is_string is False and is_json(text) else sink.schemas.json_of(function, key, text))


def _read_value(source: Source, closing: str, trims_lines: bool, follows: tuple[str, ...], emit: Emit) -> Steps[None]:
    """Emit a value up to its closing tag: the first after which the call goes on. What else looks like it is text."""
    closings = (f"\n{closing}", closing) if trims_lines else (closing,)
    while True:
        found = yield from source.until(closings, emit)
        if found is None:
            raise Malformed
        if (yield from source.precedes(follows)):
            return
        emit(found)


def _read_bare_keys(source: Source, sink: CallSink, body: BareKeysCall) -> Steps[None]:
    yield from source.expect(body.prefix)
    name = yield from source.name()
    if not (yield from source.has()) or source.text[source.pos] != "{":
        raise Malformed
    sink.begin(name)
    yield from _bare_value(source, body.quote, sink.arguments, MAX_DEPTH)
    sink.end()


def _bare_value(source: Source, quote: str, emit: Emit, depth: int) -> Steps[None]:
    """Take a value with bare keys, and emit its JSON."""
    if not depth:
        raise Malformed
    opening = yield from source.accept("{", "[", quote, '"')
    if opening == quote:
        emit('"')
        if (yield from source.until((quote,), escaped(emit))) is None:
            raise Malformed
        emit('"')
    elif opening == '"':
        source.pos -= 1
        yield from json_value(source, emit)
    elif opening is None:
        yield from _bare_scalar(source, emit)
    else:
        yield from _bare_items(source, quote, emit, depth, opening)


def _bare_items(source: Source, quote: str, emit: Emit, depth: int, opening: str) -> Steps[None]:
    closing = {"{": "}", "[": "]"}[opening]
    emit(opening)
    yield from source.space()
    if (yield from source.accept(closing)):
        emit(closing)
        return
    while True:
        if opening == "{":
            emit(json.dumps((yield from _bare_key(source, quote)), ensure_ascii=False) + ": ")
        yield from source.space()
        yield from _bare_value(source, quote, emit, depth - 1)
        yield from source.space()
        if (yield from source.expect(",", closing)) == closing:
            emit(closing)
            return
        emit(", ")
        yield from source.space()


def _bare_key(source: Source, quote: str) -> Steps[str]:
    parts: list[str] = []
    if (yield from source.accept(quote)):
        yield from source.until((quote,), parts.append)
        yield from source.space()
        yield from source.expect(":")
    elif (yield from source.until((":",), parts.append)) is None:
        raise Malformed
    key = "".join(parts).strip()
    return key[1:-1] if len(key) > 1 and key[0] == key[-1] == '"' else key


def _bare_scalar(source: Source, emit: Emit) -> Steps[None]:
    parts: list[str] = []
    found = yield from source.until(SCALAR_ENDS, parts.append)
    if found is None:
        raise Malformed
    source.pos -= len(found)
    text = "".join(parts).strip()
    emit(text if text and is_json(text) else json.dumps(text, ensure_ascii=False))
