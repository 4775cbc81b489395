"""Options declared once, as fields of a dataclass, from which flags, checks and documentation are made."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints


class ServerArgsError(ValueError):
    """An unknown option, or an invalid value."""


def option(
    default: Any,
    *,
    help: str,
    choices: Sequence[Any] | Callable[[], Sequence[Any]] = (),
    aliases: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    server: bool = False,
    default_text: str | None = None,
) -> Any:
    """Return a field. ``aliases``: further flags; numbers lie in ``[low, high]``; ``server``: of the HTTP server only;
    ``default_text``: shown for the default; ``choices`` that may grow are given as a function."""
    fixed = choices if callable(choices) else tuple(choices)
    metadata: dict[str, Any] = {"help": help, "choices": fixed, "aliases": tuple(aliases), "low": low, "high": high}
    metadata |= {"server": server, "default_text": default_text}
    return dataclasses.field(default=default, metadata=metadata)


def check_options(options: Any) -> None:
    """Raise ServerArgsError for the first field of a dataclass with an invalid value."""
    cls = type(options)
    for field in dataclasses.fields(cls):
        _check(field, _types(cls)[field.name], getattr(options, field.name), _is_list(cls, field))


class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors of one line, which name the nearest known flag for an unknown one."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for parser in self._family() for flag in parser._option_string_actions]
            flag = unknown[0].split("=")[0]
            if flag in flags:
                command = getattr(getattr(parsed, "command", None), "name", "")
                where = f"{self.prog} {command}".strip()
                self.error(f"{flag} belongs to other commands: {where} does not take it, and {where} --help lists what")
            if not flag.startswith("-") and hasattr(parsed, "model_path"):
                self.error(f"unknown argument {flag!r}: a model is named by its flag, --model-path {flag}")
            self.error(f"unknown argument {unknown[0]!r}{nearest(flag, flags)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def _family(self) -> Iterable[argparse.ArgumentParser]:
        yield self
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.values()


def add_field_flags(parser: Any, cls: type, names: Sequence[str] | None = None, unset: bool = False) -> None:
    """Add a flag ``--a-name`` for each field ``a_name`` of a dataclass, or for ``names`` only.

    Fields of type bool become switches (``--no-a-name`` for those that are true by default), lists take several
    values. Help, choices and aliases are in the metadata.
    With ``unset``, flags that are not given parse to None instead of the field's default.
    """
    for field in dataclasses.fields(cls):
        if names is None or field.name in names:
            default = None if unset else field.default
            _add_flag(parser, field, _types(cls)[field.name], default, is_list=_is_list(cls, field))


def _add_flag(parser: Any, field: dataclasses.Field, kinds: tuple[type, ...], default: Any, is_list: bool) -> None:
    flags = [_flag(field), *field.metadata.get("aliases", ())]
    options: dict[str, Any] = {"dest": field.name, "help": field.metadata["help"].replace("%", "%%")}
    options["default"] = default
    shown = field.metadata.get("default_text") or "%(default)s"
    options["help"] += "" if default is None or default is False else f" (default: {shown})"
    if kinds[0] is bool:
        action = argparse.BooleanOptionalAction if default is True else "store_true"
        parser.add_argument(*flags, action=action, **options)
        return
    choices = _choices(field)
    options |= {"choices": choices} if choices else {"metavar": {int: "N", float: "X", str: "TEXT"}[kinds[0]]}
    options |= {"nargs": "+", "action": "extend"} if is_list else {}
    parser.add_argument(*flags, type=kinds[0], **options)


def _flag(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def _choices(field: dataclasses.Field) -> Sequence[Any]:
    choices = field.metadata.get("choices", ())
    return choices() if callable(choices) else choices


def _is_list(cls: type, field: dataclasses.Field) -> bool:
    hint = get_type_hints(cls)[field.name]
    kinds = get_args(hint) if isinstance(hint, UnionType) else [hint]
    return field.default_factory is not MISSING or any(get_origin(kind) is list for kind in kinds)


def _types(cls: type) -> dict[str, tuple[type, ...]]:
    """Return each field's types: that of its values first, NoneType last if it may be unset."""
    types = {}
    for name, hint in get_type_hints(cls).items():
        kinds = list(get_args(hint)) if isinstance(hint, UnionType) else [hint]
        kinds = [get_args(kind)[0] if get_args(kind) else kind for kind in kinds]  # list[str]: several str
        types[name] = tuple(sorted(kinds, key=lambda kind: kind is NoneType))
    return types


def _check(field: dataclasses.Field, kinds: tuple[type, ...], value: Any, is_list: bool = False) -> None:
    kind, optional = kinds[0], NoneType in kinds
    if value is None and optional:
        return
    if is_list and kinds.count(kind) > 1 and isinstance(value, kind):  # str | list[str]: one, or several
        value = [value]
    if is_list:
        if not isinstance(value, (list, tuple)) or not value:
            raise ServerArgsError(f"{field.name} must be a list (not an empty one), not {value!r}")
        for item in value:
            _check(field, (kind,), item)
        return
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        unset = " or None" if optional else ""
        raise ServerArgsError(f"{field.name} must be {kind.__name__}{unset}, not {type(value).__name__} {value!r}")
    choices, low, high = _choices(field), field.metadata["low"], field.metadata["high"]
    if choices and value not in choices:
        raise ServerArgsError(f"{field.name} cannot be {value!r}; have {', '.join(map(str, choices))}")
    # written so that NaN, which compares false with everything, is refused
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        wanted = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ServerArgsError(f"{field.name} must be {wanted}, not {value}")


def nearest(name: str, known: Iterable[str]) -> str:
    nearest = get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def markdown_rows(cls: type) -> list[str]:
    """Return the rows of a table of all options: flags, type, default, meaning."""
    return [_markdown_row(field, _types(cls)[field.name]) for field in dataclasses.fields(cls)]


def _markdown_row(field: dataclasses.Field, kinds: tuple[type, ...]) -> str:
    negated = [f"--no-{_flag(field)[2:]}"] if field.default is True else []
    flags = ", ".join(f"`{flag}`" for flag in (_flag(field), *negated, *field.metadata["aliases"]))
    choices = ", ".join(f"`{choice}`" for choice in _choices(field))
    default = field.metadata["default_text"] or ("unset" if field.default is None else f"`{field.default}`")
    return f"| {flags} | {choices or kinds[0].__name__} | {default} | {field.metadata['help']} |"
