"""Grammars of answers whose content is of another grammar, and that may call tools instead."""

from collections.abc import Mapping, Sequence
from typing import Any

from rtp_llm.srt.parser.call_grammar import NO_FORM, CallRules
from rtp_llm.srt.parser.channel_grammar import ChannelRules
from rtp_llm.srt.parser.formats import Format
from rtp_llm.srt.parser.rules import CannotWrite

CONTENT = "@content"  # the other grammar


def content_grammar(
    form: Format,
    tools: Sequence[Mapping[str, Any]],
    strict: frozenset[str],
    token_ids: Mapping[str, int],
    thinks: bool,
    is_single: bool,
) -> str:
    """Return the grammar of answers that are thinking, or none, and then ``@content``, or calls instead.

    Args:
        tools: ``{"type": "function", "function": {"name", "parameters"}}`` each.
        strict: names of those whose arguments fit their schemas; the arguments of others may be any.
        token_ids: the special tokens, which a grammar names by their ids.
        thinks: the prompt has opened the thinking.
        is_single: at most one call.

    Raises:
        CannotWrite: there is none for this format, or these tools.
    """
    functions = [tool["function"] for tool in tools]
    loose = frozenset(function["name"] for function in functions) - strict
    if form.channels is not None:
        return ChannelRules(form.channels, token_ids, loose).messages(functions, CONTENT)
    if form.calls is None:
        raise CannotWrite(NO_FORM)
    rules = CallRules(token_ids, loose)
    choices = rules.any_of([CONTENT, rules.calls(form.calls, functions, is_single)])
    return rules.grammar(f"{rules.before(form.thinking, thinks)} ({choices})")
