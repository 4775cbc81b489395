"""Grammars of free text with tags, each of which holds JSON by a schema."""

from collections.abc import Mapping
from typing import Any

from rtp_llm.srt.constrained.backend import GrammarError
from rtp_llm.srt.constrained.json_schema import check_schema
from rtp_llm.srt.parser.rules import Rules, dumped, joined
from rtp_llm.srt.parser.states import States


def tag_grammar(tag: Mapping[str, Any], token_ids: Mapping[str, int]) -> str:
    """Return the grammar.

    Args:
        tag: ``{"structures": [{"begin", "schema", "end"}], "triggers": [...]}``: what begins with a trigger goes on as
            one of the structures that begin with it.
        token_ids: the special tokens.

    Raises:
        GrammarError: it is not of this form, or a schema cannot be enforced.
    """
    if "format" in tag:
        raise GrammarError("a structural tag with 'format' is not supported: give 'structures' and 'triggers'")
    structures, triggers = tag.get("structures"), tag.get("triggers")
    if not isinstance(structures, list) or not structures or not isinstance(triggers, list):
        raise GrammarError("a structural tag must have 'structures', a list of objects, and 'triggers', texts")
    rules = Rules(token_ids)
    followed: dict[str, list[str]] = {}
    for item in structures:
        fields = item if isinstance(item, dict) else {}
        begin, schema, end = fields.get("begin"), fields.get("schema"), fields.get("end")
        if not isinstance(begin, str) or not isinstance(end, str) or not isinstance(schema, dict):
            raise GrammarError("each structure of a structural tag must have 'begin', 'schema' and 'end'")
        trigger = next((text for text in triggers if isinstance(text, str) and text and begin.startswith(text)), None)
        if trigger is None:
            raise GrammarError(f"no trigger of the structural tag begins {begin[:80]!r}")
        check_schema(schema)
        rest = joined(rules.text(begin.removeprefix(trigger)), f"%json {dumped(schema)}", rules.text(end))
        followed.setdefault(trigger, []).append(rest)
    leads = [(trigger, f"({rules.any_of(rests)}) free") for trigger, rests in followed.items()]
    States(rules, frozenset(token_ids.values())).define("free", leads)
    return rules.grammar("free")
