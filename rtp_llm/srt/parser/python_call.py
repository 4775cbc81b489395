"""Reader of calls in Python's syntax (``formats.PythonCall``)."""

import ast
import json
import re

from rtp_llm.srt.parser.call_sink import ArgumentsObject, CallSink
from rtp_llm.srt.parser.json_text import is_json
from rtp_llm.srt.parser.source import Malformed, Source, Steps

MAX_LITERAL_CHARS = 1 << 20  # of a Python value that is read as one
MAX_LITERAL_SIGNS = 1024  # brackets and signs outside of its strings
PYTHON_WORD = re.compile(r"\b(?:true|false|null)\b")
PYTHON_SPELLED = {"true": "True", "false": "False", "null": "None"}
PYTHON_MARK = re.compile(r"""[\[\](){},"']""")
UNESCAPED = {"\n": "\\n", "\r": "\\r", "\0": "\\0"}  # models write them plainly, which Python does not allow


def read_python_call(source: Source, sink: CallSink) -> Steps[None]:
    name = yield from source.name()
    yield from source.expect("(")
    yield from source.space()
    is_empty = (yield from source.accept(")")) is not None
    key = "" if is_empty else (yield from _keyword(source))
    sink.begin(name)
    written = ArgumentsObject(sink)
    try:
        while not is_empty:
            text, num_signs, end = yield from _python_value(source)
            written.key(key)
            sink.arguments(_json_of_python(text, num_signs))
            yield from source.space()
            if end == ")" or (yield from source.accept(")")):
                break
            source.mark()
            key = yield from _keyword(source)
            source.release()
    except Malformed:
        written.give_up(source)
        raise
    written.end()


def _keyword(source: Source) -> Steps[str]:
    key = yield from source.name()
    yield from source.space()
    yield from source.expect("=")
    yield from source.space()
    return key


def _python_value(source: Source) -> Steps[tuple[str, int, str]]:
    """Take a value and what ends it, ``,`` or ``)``; return it, its number of brackets and signs, and the end."""
    source.mark()
    parts: list[str] = []
    depth, num_signs = 0, 0
    while (yield from source.has()):
        match = PYTHON_MARK.search(source.text, source.pos)
        end = len(source.text) if match is None else match.start()
        parts.append(source.text[source.pos : end])
        num_signs += sum(map(parts[-1].count, "-+~"))
        source.pos = end
        if match is None:
            continue
        mark = match[0]
        if depth == 0 and mark in ",)":
            source.pos += 1
            source.release()
            return "".join(parts).strip(), num_signs, mark
        if mark in "\"'":
            parts.append((yield from _python_string(source)))
            continue
        depth += {"[": 1, "(": 1, "{": 1, "]": -1, ")": -1, "}": -1}.get(mark, 0)
        num_signs += mark in "[({"
        parts.append(mark)
        source.pos += 1
    raise Malformed


def _python_string(source: Source) -> Steps[str]:
    quote = source.text[source.pos]
    triple = yield from source.accept(quote * 3)
    if triple is None:
        source.pos += 1
    ends = triple or quote
    parts = [ends]
    while True:
        found = yield from source.until((ends, "\\", *UNESCAPED), parts.append)
        if found is None:
            raise Malformed
        parts.append(UNESCAPED.get(found, found))
        if found == ends:
            return "".join(parts)
        if found in UNESCAPED:
            continue
        if (yield from source.has()):
            parts.append(source.text[source.pos])
            source.pos += 1


def _json_of_python(text: str, num_signs: int) -> str:
    """Return the JSON of a Python literal, or of JSON; of anything else, a string of it."""
    if is_json(text):
        return text
    for spelled in (text, PYTHON_WORD.sub(lambda match: PYTHON_SPELLED[match[0]], text)):
        try:
            if max(len(text) / MAX_LITERAL_CHARS, num_signs / MAX_LITERAL_SIGNS) > 1:
                break
            written = json.dumps(ast.literal_eval(spelled), ensure_ascii=False, allow_nan=False)
            written.encode()
            return written
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return json.dumps(text, ensure_ascii=False)
