"""Grammars of answers whose content, after free thinking, is of a certain form."""

import json
from collections.abc import Mapping
from typing import Any

from rtp_llm.srt.parser.channel_grammar import ChannelRules
from rtp_llm.srt.parser.formats import Format
from rtp_llm.srt.parser.rules import SPACE, WHITESPACE, Rules, any_text
from rtp_llm.srt.request_spec import GrammarSpec


def form_after_thinking(form: Format, spec: GrammarSpec, token_ids: Mapping[str, int]) -> str | None:
    """Return the grammar of answers that think and then are of a form; None: there is none for this kind of form.

    Args:
        form: with tags, the prompt has opened the thinking; with headers, the answer may begin with a message of it.
        spec: of the content.
        token_ids: the special tokens, which a grammar names by their ids.
    """
    content = _content(spec)
    if content is None:
        return None
    if form.channels is not None:
        return ChannelRules(form.channels, token_ids).messages([], content)
    assert form.thinking is not None  # the prompt has opened it
    rules = Rules(token_ids)
    return rules.grammar(f"{rules.up_to(form.thinking.close)} {SPACE} {content}")


def _content(spec: GrammarSpec) -> str | None:
    if spec.kind == "json_schema":
        pattern = WHITESPACE if spec.whitespace is None else spec.whitespace
        space: dict[str, Any] = {"whitespace_pattern": pattern} if pattern else {"whitespace_flexible": False}
        return f"%json {json.dumps({**json.loads(spec.text), 'x-guidance': {**space, 'lenient': False}})}"
    return any_text(json.loads(spec.text)) if spec.kind == "choice" else None
