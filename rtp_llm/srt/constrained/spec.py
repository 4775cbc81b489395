"""From sampling parameters to the description of a grammar, checked as far as that needs no grammar compiler."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from rtp_llm.srt.request_spec import GrammarSpec
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams

MAX_GRAMMAR_CHARS = 2**18  # of a schema, an expression or a grammar
ANY_OBJECT = '{"type": "object"}'
NO_SPACE = ""
# Options of ``structured_outputs`` beside the kind of grammar, and the values that change nothing here.
_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "disable_fallback": (None, False, True),  # there is no other back end to fall back on
    "disable_additional_properties": (None, False),
    "disable_any_whitespace": (None, False, True),
    "whitespace_pattern": (),
}

# Fields of each type of ``response_format``, and of its ``json_schema``.
_FORMATS: Mapping[Any, tuple[str, ...]] = {
    "text": ("type",),
    "json_object": ("type", "schema"),
    "json_schema": ("type", "json_schema"),
}
_OF_SCHEMA = ("name", "description", "schema", "strict")

Reader = Callable[[str, Any], GrammarSpec | None]


def asks_for_grammar(given: Any) -> bool:
    """Return whether sampling parameters, or one of a list of them, may ask for a grammar, which takes time to check.

    Args:
        given: SamplingParams, or a request's object of them, not checked yet.
    """
    if isinstance(given, list):
        return any(asks_for_grammar(item) for item in given)
    if isinstance(given, Mapping):
        return any(given.get(name) is not None for name in _PARAMS)
    return any(getattr(given, name, None) is not None for name in _PARAMS)


def asked_grammar(params: SamplingParams) -> tuple[str, GrammarSpec] | None:
    """Return the parameter that asks for a grammar, and the grammar; None: the text is free.

    Raises:
        InvalidRequest: there are two, or one is of a wrong type or too long.
    """
    asked = [(name, spec) for name in _PARAMS if (spec := _asked(name, getattr(params, name))) is not None]
    if len(asked) > 1:
        (first, _), (second, _) = asked[:2]
        raise InvalidRequest(f"{first} and {second} are two grammars for one text: give one of them", second)
    return asked[0] if asked else None


def _asked(name: str, value: Any) -> GrammarSpec | None:
    spec = None if value is None else _PARAMS[name](name, value)
    if spec is not None:
        _check_length(name, spec.text)
    return spec


def _check_length(name: str, text: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(
            f"{name} has {len(text)} characters; grammars of at most {MAX_GRAMMAR_CHARS} are taken", _param_of(name)
        )


def _structured_outputs(name: str, value: Any) -> GrammarSpec:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must be an object, not {type(value).__name__}", name)
    for key, option in value.items():
        if key not in _KINDS and key not in _OPTIONS:
            raise InvalidRequest(f"{name} has no field {key!r}; known are {', '.join((*_KINDS, *_OPTIONS))}", name)
        if (usual := _OPTIONS.get(key)) and option not in usual:
            raise InvalidRequest(f"{name}.{key} is not supported with this value", name)
    given = [key for key in _KINDS if value.get(key) is not None]
    if len(given) != 1:
        shown = " and ".join(given) or "none"
        raise InvalidRequest(f"{name} must have one of {', '.join(_KINDS)}, not {shown}", name)
    spec = _KINDS[given[0]](f"{name}.{given[0]}", value[given[0]])
    whitespace = NO_SPACE if value.get("disable_any_whitespace") else value.get("whitespace_pattern")
    if whitespace is None:
        return spec
    if not isinstance(whitespace, str) or spec.kind != "json_schema":
        raise InvalidRequest(f"{name}: options of whitespace are for json and json_object; a pattern is a text", name)
    return GrammarSpec(spec.kind, spec.text, whitespace)


def _response_format(name: str, value: Any) -> GrammarSpec | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "structural_tag":
        return _structural_tag(name, {key: item for key, item in value.items() if key != "type"})
    if kind not in _FORMATS:
        raise InvalidRequest(
            f"{name} must be an object whose type is text, json_object, json_schema or structural_tag", name
        )
    _check_fields(name, name, value, _FORMATS[kind])
    if kind == "text":
        return None
    if kind == "json_object":  # with a schema it is llama.cpp's form
        schema = value.get("schema")
        return GrammarSpec("json_schema", ANY_OBJECT) if schema is None else _json_schema(f"{name}.schema", schema)
    described = value.get("json_schema")
    if isinstance(described, Mapping):
        _check_fields(name, f"{name}.json_schema", described, _OF_SCHEMA)
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if schema is None:
        raise InvalidRequest(f"{name} of type json_schema must have json_schema.schema", name)
    return _json_schema(name, schema)


def _check_fields(param: str, name: str, value: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise InvalidRequest for a field that would be passed over."""
    for key, item in value.items():
        if key not in known and item is not None:
            raise InvalidRequest(f"{name} has no field {str(key)[:64]!r} here; known are {', '.join(known)}", param)


def _json_schema(name: str, value: Any) -> GrammarSpec:
    return GrammarSpec("json_schema", _dumped(name, _json_object(name, value)))


def _json_object(name: str, value: Any) -> dict[str, Any]:
    """Return an object that is given as such, or as JSON."""
    if isinstance(value, str):
        _check_length(name, value)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{name} is not JSON: {error}", _param_of(name)) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} must be an object, or JSON of one, not {type(value).__name__}", _param_of(name))
    return value


def _any_object(name: str, value: Any) -> GrammarSpec:
    if value is not True:
        raise InvalidRequest(f"{name} must be true, or left out", _param_of(name))
    return GrammarSpec("json_schema", ANY_OBJECT)


def _regex(name: str, value: Any) -> GrammarSpec:
    return GrammarSpec("regex", _text(name, value))


def _grammar(name: str, value: Any) -> GrammarSpec:
    return GrammarSpec("grammar", _text(name, value))


def _choice(name: str, value: Any) -> GrammarSpec:
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(item, str) for item in value):
        raise InvalidRequest(f"{name} must be a list of strings with at least one", _param_of(name))
    return GrammarSpec("choice", json.dumps(list(value)))


def _structural_tag(name: str, value: Any) -> GrammarSpec:
    return GrammarSpec("structural_tag", _dumped(name, _json_object(name, value)))


def _dumped(name: str, value: dict[str, Any]) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} is not JSON: {error}", _param_of(name)) from None


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{name} must be a non-empty string", _param_of(name))
    return value


def _param_of(name: str) -> str:
    return name.partition(".")[0]


_PARAMS: Mapping[str, Reader] = {
    "json_schema": _json_schema,
    "regex": _regex,
    "ebnf": _grammar,
    "structural_tag": _structural_tag,
    "structured_outputs": _structured_outputs,
    "response_format": _response_format,
}
_KINDS: Mapping[str, Callable[[str, Any], GrammarSpec]] = {
    "json": _json_schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _any_object,
    "structural_tag": _structural_tag,
}
