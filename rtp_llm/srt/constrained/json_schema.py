"""Keywords of JSON schemas that the compiler would not honour wholly, or not see: they are refused by name."""

from collections.abc import Iterator, Mapping
from typing import Any

from rtp_llm.srt.constrained.backend import GrammarError
from rtp_llm.srt.parser.schemas import BY_NAME, VALUES

_OF_DRAFT_3 = frozenset({"disallow", "divisibleBy", "extends"})  # unknown to the compiler, which passes over them


def check_schema(schema: Any) -> None:
    """Raise GrammarError if a keyword cannot be enforced; the compiler itself refuses most of those."""
    for item in _schemas(schema):
        for name in sorted(_OF_DRAFT_3 & item.keys()):
            raise GrammarError(f"keywords that cannot be enforced: {name}")
        step = item.get("multipleOf")
        if isinstance(step, float) and not step.is_integer():
            raise GrammarError(f"multipleOf is {step}: only whole numbers can be enforced exactly")


def _schemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a schema and those within it that are objects."""
    waiting = [schema]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += item
        elif isinstance(item, Mapping):
            yield item
            for name, value in item.items():
                if name in BY_NAME and isinstance(value, Mapping):
                    waiting += value.values()
                elif name not in VALUES:
                    waiting.append(value)
