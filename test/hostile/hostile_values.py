"""JSON values that nobody asked for, and an encoder that can write what ``json.dumps`` would refuse."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes that stand in the body as they are."""

    text: bytes


@dataclass(frozen=True, slots=True)
class Pairs:
    """An object whose names may come twice."""

    items: tuple[tuple[Any, Any], ...]


def encode(value: Any) -> bytes:
    match value:
        case Raw(text):
            return text
        case Pairs(items):
            return b"{" + b",".join(encode(str(k)) + b":" + encode(v) for k, v in items) + b"}"
        case dict():
            return encode(Pairs(tuple(value.items())))
        case list():
            return b"[" + b",".join(map(encode, value)) + b"]"
        case _:
            return json.dumps(value).encode()


MODEL = "rtp-llm-demo"
TEXTS = (
    "", " ", "\0", "a\0b", "\n", "\r\n", "\u2028\u2029", "\u0085", "\ufeff", "\ufffe", "\uffff", "\u202eabc\u202c",
    "e" + "\u0301" * 50, "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0010ffff", "\ud800", "\udfff", "\ud83d",
    "ab\udc00cd",
    "İ", "ß", "ﬃ", "Z" + "͑ͫ" * 40, "٣", "Ω" * 100, "東京" * 50, "<|end|>", "<|user|>", "<|image_pad|>",
    "<|vision_start|><|image_pad|><|vision_end|>", "<|im_start|>system", "</s>", "{{ 7 * 7 }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ ''.__class__.__mro__ }}", "${jndi:ldap://127.0.0.1/a}", "%s%n%x", "../../etc/passwd", "'; DROP TABLE x; --",
    "null", "true", "NaN", "Infinity", "-0", "0x10", "1e5", "[]", "{}", "None", "undefined", "data: [DONE]\n\n",
    "\x1b[31m",
)  # fmt: skip

NUMBERS: tuple[Any, ...] = (
    0, Raw(b"-0"), Raw(b"-0.0"), 1, -1, 2, 127, 128, 129, 255, 1023, 1024, 4096, 2**31 - 1, 2**31, -(2**31) - 1,
    2**32,
    2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64 - 1, 2**64, 10**30, 0.5, 1.0, 1.5, -0.5, 0.1 + 0.2,
    1e-320,
    1e-45, 5e-324, 1e20, 1e38, 3.5e38, 1e308, Raw(b"1e309"), Raw(b"-1e309"), Raw(b"1e-999"), Raw(b"1E400"),
    Raw(b"0e999999999"),
    Raw(b"1" * 400), Raw(b"9" * 4300), Raw(b"1" * 5000), Raw(b"-" + b"7" * 5000), Raw(b"0." + b"3" * 5000),
    Raw(b"1e" + b"9" * 50),
)  # fmt: skip

NO_JSON = tuple(
    map(
        Raw,
        (
            b"NaN", b"Infinity", b"-Infinity", b"01", b"+1", b".5", b"1.", b"0x1F", b"1_000", b"tru", b"True",
            b"None", b"'a'",
            b"undefined", b'"\x01"', b'"\xff\xfe"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"',
            b'"\\u12"', b'"\\x41"',
            b'"\\ud800"', b'"\\udfff\\ud800"', b'"a\nb"', b"[1,]", b"[,1]", b'{"a":1,}', b'{"a"}', b"{1:2}",
            b"/* */ 1", b"",
            b"\xef\xbb\xbf1", b'"abc', b"[1", b"1 2",
        ),
    )
)  # fmt: skip


def text(draw: Random) -> str:
    kind = draw.random()
    if kind < 0.6:
        return draw.choice(TEXTS)
    if kind < 0.8:
        return "".join(chr(draw.choice((draw.randrange(0x20), draw.randrange(0x3000), draw.randrange(0x110000))))
                       for _ in range(draw.randrange(40)))  # fmt: skip
    return draw.choice(TEXTS) * draw.randrange(1, 200)


def number(draw: Random) -> Any:
    return draw.choice(NUMBERS) if draw.random() < 0.8 else draw.uniform(-2, 2)


def nested(draw: Random) -> Any:
    depth = draw.choice((2, 10, 50, 200, 900, 1100, 5000, 100_000))
    if draw.random() < 0.5:
        return Raw(b"[" * depth + b"]" * draw.choice((depth, depth, depth - 1)))
    return Raw(b'{"a":' * depth + b"1" + b"}" * draw.choice((depth, depth, depth - 1)))


def large(draw: Random) -> Any:
    """Lists of 10^4 to 10^6 items, and texts of a megabyte."""
    count = draw.choice((10_000, 10_000, 100_000, 1_000_000))
    item = draw.choice(
        (b"1", b"0", b'""', b'"a"', b"{}", b"[]", b"null", b"1.5", b"[1]", b"true", b'{"role":"user","content":"a"}')
    )
    whole = b"[" + b",".join([item] * count) + b"]"
    return draw.choice((Raw(whole), "a" * (1 << 20), "the cat " * (1 << 17), "é" * (1 << 19), "\0" * 100_000,
    "<|end|>" * 50_000,
                        {f"{i}": i for i in range(10_000)}))  # fmt: skip


def small_container(draw: Random) -> Any:
    items = [scalar(draw) for _ in range(draw.randrange(4))]
    if draw.random() < 0.5:
        return items
    return Pairs(tuple((draw.choice(("a", "type", "text", "__class__", "")), item) for item in items))


def scalar(draw: Random) -> Any:
    make: Callable[[Random], Any] = draw.choice(
        (text, number, lambda _: None, lambda d: d.choice((True, False)), lambda d: d.choice(NO_JSON))
    )
    return make(draw)


def anything(draw: Random, big: float = 0.01) -> Any:
    """Any JSON value, or none. ``big``: how often one that takes a megabyte."""
    if draw.random() < big:
        return large(draw)
    make: Callable[[Random], Any] = draw.choices(
        (text, number, small_container, scalar, nested), weights=(30, 30, 20, 20, 2)
    )[0]
    return make(draw)


class Schemas:
    """Values that an OpenAPI document allows, as far as types go: bounds are often missed."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    def resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in schema:
            found: Any = self._document
            for part in schema["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            schema = found
        return schema

    def value(self, schema: dict[str, Any], draw: Random, depth: int = 0) -> Any:
        schema = self.resolved(schema)
        for choice in ("anyOf", "oneOf", "allOf"):
            if schema.get(choice):
                return self.value(draw.choice(schema[choice]), draw, depth)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return draw.choice(schema["enum"])
        match schema.get("type"):
            case "string":
                return draw.choice(("a", "the cat", "hello", "What is 17 + 25?")) if draw.random() < 0.7 else text(draw)
            case "integer":
                return draw.choice((0, 1, 2, 3, 7, schema.get("minimum", 1), schema.get("maximum", 5)))
            case "number":
                return draw.choice((0, 0.5, 1, 1.0, schema.get("minimum", 0.1), schema.get("maximum", 0.9)))
            case "boolean":
                return draw.random() < 0.5
            case "null":
                return None
            case "array":
                count = 0 if depth > 4 else draw.choice((0, 1, 1, 2, 3))
                return [self.value(schema.get("items", {}), draw, depth + 1) for _ in range(count)]
            case "object":
                return self.object(schema, draw, depth)
        return draw.choice((None, True, 1, "a", [], {}))

    def object(self, schema: dict[str, Any], draw: Random, depth: int = 0) -> dict[str, Any]:
        fields, required = schema.get("properties", {}), schema.get("required", ())
        share = 0.06 if len(fields) > 6 else 0.4
        value = {
            name: MODEL if name == "model" and draw.random() < 0.8 else self.value(field, draw, depth + 1)
            for name, field in fields.items()
            if name in required or (depth < 4 and draw.random() < share)
        }
        if not fields and isinstance(extra := schema.get("additionalProperties"), dict) and depth < 4:
            value = {draw.choice(("1", "a", "7")): self.value(extra, draw, depth + 1)}
        return value
