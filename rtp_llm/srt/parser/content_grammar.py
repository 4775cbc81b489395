"""Grammars of answers whose content is of another grammar: thinking may come before it, calls of tools in its place."""

from collections.abc import Mapping, Sequence
from typing import Any

from rtp_llm.srt.parser.call_grammar import CallRules, bound_functions, known_calls
from rtp_llm.srt.parser.channel_grammar import ChannelRules
from rtp_llm.srt.parser.formats import Format

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
    functions, loose = bound_functions(tools, strict)
    if form.channels is not None:
        return ChannelRules(form.channels, token_ids, loose).messages(functions, CONTENT)
    rules = CallRules(token_ids, loose)
    choices = [CONTENT]
    if functions:
        choices.append(rules.calls(known_calls(form), functions, is_single))
    return rules.grammar(f"{rules.before(form.thinking, thinks)} ({rules.any_of(choices)})")
