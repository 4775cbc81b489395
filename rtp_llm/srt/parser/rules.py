"""Rules of a grammar, as they are written: Lark's syntax as llguidance reads it.

``<[7]>`` is the token 7, ``%json`` a JSON schema, names in capitals are terminals, and a rule with ``[lazy]`` ends
where it first can.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rtp_llm.srt.parser.schemas import without_free_formats

SPACE = "SPACE?"
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,40}"  # between JSON tokens: enough for what is indented
_HEAD = "%llguidance {}\n"
_TERMINALS = (
    "TEXT: /(.|\\n)*/\nSPACE: /[ \\n]{1,2}/\nINDENT: /[ \\n]{1,20}/\n"
    "NUMBER: /[0-9]{1,4}/\nWORD: /[A-Za-z0-9_-]{1,32}/\nKEY: /[A-Za-z0-9_.$-]{1,64}/\n"
    "SPACES: /[\\s\\x1c-\\x1f]*/\n"  # what Python's regular expressions take for white space
)


class CannotWrite(Exception):
    """There is no grammar for a format, or for a schema in a format without JSON; the message says what stands in the
    way."""


class Rules:
    """The rules so far.

    Args:
        token_ids: the special tokens, which a grammar names by their ids.
    """

    def __init__(self, token_ids: Mapping[str, int]) -> None:
        self._rules = ""
        self._num_rules = 0
        self._token_ids = token_ids
        special = sorted(token_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def grammar(self, start: str) -> str:
        """Return the whole grammar. ``start``: what a text must match."""
        return f"{_HEAD}start: {start}\n{self._rules}{_TERMINALS}"

    def parts(self, text: str) -> list[str | int]:
        """Return the parts of a text: special tokens' ids, and what stands between them."""
        parts: list[str | int] = []
        end = 0
        for match in self._special.finditer(text):
            parts += [text[end : match.start()]] if match.start() > end else []
            parts.append(self._token_ids[match[0]])
            end = match.end()
        return [*parts, *([text[end:]] if text[end:] else [])]

    def text(self, text: str) -> str:
        """Return what matches a text."""
        return written(self.parts(text))

    def up_to(self, closing: str) -> str:
        """Return what matches any text up to and with ``closing``."""
        if self._special.match(closing):
            return f"TEXT {self.text(closing)}"
        return self.rule(f"TEXT {json.dumps(closing)}", "[lazy]")

    def rule(self, body: str, attribute: str = "") -> str:
        """Write a rule; return its name."""
        name = self.new_name()
        self.define(f"{name}{attribute}", body)
        return name

    def terminal(self, body: str) -> str:
        """Write a terminal, which may use ``&`` and ``~``; return its name."""
        name = self.new_name().upper()
        self.define(name, body)
        return name

    def new_name(self) -> str:
        """Return a name for ``define``."""
        self._num_rules += 1
        return f"part_{self._num_rules}"

    def define(self, name: str, body: str) -> None:
        """Write a rule, or a terminal, with this name."""
        self._rules += f"{name}: {body}\n"

    def listed(self, items: Sequence[tuple[str, bool]], comma: str) -> str:
        """Return what matches items with commas between, in their order.

        Args:
            items: what matches each, and whether it must be there.
        """
        names = [(self.rule(item), is_required) for item, is_required in items]
        first = next((i for i, (_, is_required) in enumerate(names) if is_required), len(names))
        between = self.text(comma)

        def from_(i: int) -> str:
            rest = (f" {between} {name}" if needed else f" ({between} {name})?" for name, needed in names[i + 1 :])
            return names[i][0] + "".join(rest)

        choices = [from_(i) for i in range(min(first + 1, len(names)))]
        may_be_empty = first == len(names)
        return f"({self.any_of(choices)}){'?' if may_be_empty else ''}" if choices else ""

    def any_of(self, choices: Sequence[str]) -> str:
        return " | ".join(self.rule(choice) for choice in choices)


def joined(*parts: str) -> str:
    return " ".join(part for part in parts if part.strip())


def dumped(schema: Mapping[str, Any]) -> str:
    """Return a schema as it stands after ``%json``."""
    return json.dumps(
        {**without_free_formats(schema), "x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": False}}
    )


def written(parts: Sequence[str | int]) -> str:
    """Return what matches texts and tokens one after the other."""
    return " ".join(json.dumps(part) if isinstance(part, str) else f"<[{part}]>" for part in parts)


def any_text(texts: Sequence[str]) -> str:
    """Return what matches one of the texts, in a terminal too."""
    return f"({' | '.join(map(json.dumps, texts))})"


def token_set(ids: Iterable[int]) -> str:
    """Return what matches one of the tokens."""
    ranges: list[list[int]] = []
    for token_id in sorted(ids):
        if ranges and token_id == ranges[-1][1] + 1:
            ranges[-1][1] = token_id
        else:
            ranges.append([token_id, token_id])
    return f"<[{','.join(str(a) if a == b else f'{a}-{b}' for a, b in ranges)}]>"
