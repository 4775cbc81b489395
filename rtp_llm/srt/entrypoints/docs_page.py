"""GET /docs: the OpenAPI document as an HTML page, which loads no other file and runs no script."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from starlette.responses import HTMLResponse

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
summary { cursor: pointer; padding: .4rem 0 } code, summary b { font-family: ui-monospace, monospace }
summary b { display: inline-block; min-width: 4rem; color: #06c }
table { border-collapse: collapse; margin: .5rem 0 1rem 1rem; font-size: 15px }
td, th { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #eee }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } summary b { color: #6af }
  td, th, h2 { border-color: #333 } }
"""
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}

Schema = Mapping[str, Any]


def docs_page(document: Schema) -> HTMLResponse:
    """Return the page of an OpenAPI document."""
    return HTMLResponse("".join(_page(document)), headers=HEADERS)


def _page(document: Schema) -> Iterator[str]:
    info = document["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    yield f"<h1>{title}</h1><p>{escape(info.get('description', ''))}</p>"
    yield '<p>For programs: <a href="openapi.json">openapi.json</a></p>'
    tags: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            tag = operation.get("tags", ["other"])[0]
            tags.setdefault(tag, []).append("".join(_operation(document, path, method, operation)))
    for tag, operations in tags.items():
        yield f"<h2>{escape(tag)}</h2>{''.join(operations)}"
    yield "</html>"


def _operation(document: Schema, path: str, method: str, operation: Schema) -> Iterator[str]:
    yield f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code></summary>"
    yield f"<p>{escape(operation.get('description', ''))}</p>"
    body = _schema_of(operation.get("requestBody", {}))
    answer = _schema_of(operation.get("responses", {}).get("200", {}))
    for name, schema in (("Body", body), ("Answer", answer)):
        fields = _resolved(document, schema).get("properties")
        if fields:
            required = _resolved(document, schema).get("required", ())
            rows = "".join(_row(field, value, field in required) for field, value in fields.items())
            yield f"<table><tr><th>{name}</th><th>Type</th><th></th></tr>{rows}</table>"
    yield "</details>"


def _row(name: str, schema: Schema, is_required: bool) -> str:
    default = "" if is_required or schema.get("default") is None else f" ({escape(repr(schema['default']))})"
    needed = " <em>required</em>" if is_required else default
    about = escape(schema.get("description", ""))
    return f"<tr><td><code>{escape(name)}</code>{needed}</td><td>{escape(_type(schema))}</td><td>{about}</td></tr>"


def _type(schema: Schema) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(item) for item in schema["anyOf"] if item.get("type") != "null"))
    if "const" in schema:
        return repr(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "any value"))


def _schema_of(holder: Schema) -> Schema:
    return holder.get("content", {}).get("application/json", {}).get("schema", {})


def _resolved(document: Schema, schema: Schema) -> Schema:
    if "$ref" not in schema:
        return schema
    return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
