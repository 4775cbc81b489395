"""Readers of JSON within a text that arrives in pieces (RFC 8259).

They find where a value ends; the value itself is passed on as it is written, but for control characters in strings,
which JSON wants escaped and models write plainly.
"""

import json
import re

from rtp_llm.srt.parser.source import Emit, Malformed, Source, Steps

STRUCTURE = re.compile(r'["{}\[\]]|[^\s\w:,.+\-]')  # brackets, quotes, and what is no JSON outside of strings
IN_STRING = re.compile(r'["\\\x00-\x1f]')
SCALAR = re.compile(r"[\w.+\-]*")


def json_string(source: Source) -> Steps[str]:
    """Take a string; return what it says."""
    if not (yield from source.has()) or source.text[source.pos] != '"':
        raise Malformed
    parts: list[str] = []
    yield from _string(source, parts.append)
    text = said("".join(parts))
    if not isinstance(text, str):
        raise Malformed
    return text


def said(text: str) -> object:
    """Return the value of a JSON text, or raise Malformed. A string with half a surrogate pair is none."""
    try:
        value = json.loads(text)
        if isinstance(value, str):
            value.encode()
    except (ValueError, RecursionError):
        raise Malformed from None
    return value


def is_json(text: str) -> bool:
    """Return whether a text is a JSON value."""
    try:
        said(text)
    except Malformed:
        return False
    return True


def json_value(source: Source, emit: Emit) -> Steps[None]:
    """Take a value, and emit its JSON text piece by piece.

    Raises:
        Malformed: what is there is not JSON; the value up to there has been emitted.
    """
    if not (yield from source.has()):
        raise Malformed
    first = source.text[source.pos]
    if first == '"':
        yield from _string(source, emit)
    elif first in "{[":
        yield from _structure(source, emit)
    else:
        yield from _scalar(source, emit)


def _scalar(source: Source, emit: Emit) -> Steps[None]:
    parts: list[str] = []
    while True:
        match = SCALAR.match(source.text, source.pos)
        assert match is not None  # it matches nothing, too
        parts.append(match[0])
        source.pos = match.end()
        if source.pos < len(source.text) or source.ended:
            break
        yield
    text = "".join(parts)
    said(text)
    emit(text)


def _structure(source: Source, emit: Emit) -> Steps[None]:
    """Take an object or a list: up to where as many brackets are closed as were opened."""
    depth = 0
    while (yield from source.has()):
        match = STRUCTURE.search(source.text, source.pos)
        if match is None:
            emit(source.text[source.pos :])
            source.pos = len(source.text)
            continue
        emit(source.text[source.pos : match.start()])
        source.pos = match.start()
        if match[0] == '"':
            yield from _string(source, emit)
            continue
        if match[0] not in "{}[]":
            raise Malformed
        depth += 1 if match[0] in "{[" else -1
        emit(match[0])
        source.pos += 1
        if depth == 0:
            return
    raise Malformed


def _string(source: Source, emit: Emit) -> Steps[None]:
    """Take a string with its quotes; the first is there."""
    emit('"')
    source.pos += 1
    while (yield from source.has()):
        match = IN_STRING.search(source.text, source.pos)
        end = len(source.text) if match is None else match.start()
        emit(source.text[source.pos : end])
        source.pos = end
        if match is None:
            continue
        if match[0] == "\\":
            if not (yield from source.has(2)):
                break
            emit(source.text[source.pos : source.pos + 2])
            source.pos += 2
            continue
        source.pos += 1
        emit(match[0] if match[0] == '"' else json.dumps(match[0])[1:-1])
        if match[0] == '"':
            return
    raise Malformed
