"""Grammars under which an answer consists of calls."""

from collections.abc import Mapping, Sequence
from typing import Any

from rtp_llm.srt.parser.call_grammar import CallRules, known_calls
from rtp_llm.srt.parser.channel_grammar import ChannelRules
from rtp_llm.srt.parser.formats import Format


def demanded_grammar(
    form: Format,
    tools: Sequence[Mapping[str, Any]],
    token_ids: Mapping[str, int],
    thinks: bool,
    is_single: bool,
) -> str:
    """Return the grammar of answers that call one of the tools.

    Args:
        tools: ``{"type": "function", "function": {"name", "parameters"}}`` each.
        token_ids: the special tokens, which a grammar names by their ids.
        thinks: the prompt has opened the thinking.
        is_single: exactly one call; otherwise one or more.

    Raises:
        CannotWrite: there is none for this format, or these tools.
    """
    functions = [tool["function"] for tool in tools]
    if form.channels is not None:
        return ChannelRules(form.channels, token_ids).messages(functions)
    calls, rules = known_calls(form), CallRules(token_ids)
    return rules.grammar(f"{rules.before(form.thinking, thinks)} {rules.calls(calls, functions, is_single)}")
