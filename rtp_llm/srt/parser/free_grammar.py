"""Grammars of free text in which a call, once it is opened, is one of given functions, with arguments by its schema.

A text goes through states, each a rule of the grammar. In each, text is free up to what leads to another state:

    free      content; the opening of a call leads into the call, and on to ``fresh``
    fresh     the same where nothing but space has come since the answer's beginning, or since thinking or a call ended:
              here a call may begin with what marks none elsewhere, and thinking may be opened
    thinking  up to its closing tag, which leads to ``fresh``
    last      after the only call that there may be: no other is opened

Where ``fresh`` and ``thinking`` are no different from ``free``, there is but that.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rtp_llm.srt.parser.call_grammar import CallRules, Function, bound_functions, known_calls
from rtp_llm.srt.parser.channel_grammar import ChannelRules
from rtp_llm.srt.parser.formats import Calls, Format
from rtp_llm.srt.parser.rules import any_text, token_set, written
from rtp_llm.srt.parser.states import Lead, States


def free_grammar(
    form: Format,
    tools: Sequence[Mapping[str, Any]],
    strict: frozenset[str],
    token_ids: Mapping[str, int],
    thinks: bool,
    is_single: bool,
) -> str:
    """Return the grammar of answers that may call the tools.

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
        return ChannelRules(form.channels, token_ids, loose).free(functions, is_single)
    text = _FreeText(CallRules(token_ids, loose), form, known_calls(form), token_ids.values())
    return text.write(functions, thinks, is_single)


class _FreeText:
    def __init__(self, rules: CallRules, form: Format, calls: Calls, special_ids: Iterable[int]) -> None:
        self._rules = rules
        self._hidden = form.hidden
        self._calls = calls
        self._special_ids = frozenset(special_ids)
        self._states = States(rules, self._special_ids)
        thinking = form.thinking
        differs = thinking is not None and (not thinking.ends_at_call or bool(calls.bare))
        self._thinking = thinking if differs else None  # if its text is not like any other
        self._has_fresh = bool(calls.bare) or (self._thinking is not None and not self._thinking.anywhere)

    def write(self, functions: Sequence[Function], thinks: bool, is_single: bool) -> str:
        rules, calls, thinking = self._rules, self._calls, self._thinking
        follows = "last" if is_single else "fresh"
        openings: list[Lead] = []
        for opening in calls.triggers:
            body = rules.rule(rules.after(calls, opening, functions, is_single))
            openings.append((opening, f"{body} {follows}"))
        leads = list(openings)
        if thinking is not None and thinking.anywhere:
            leads.append((thinking.open, "thinking"))
        if self._has_fresh:
            leads += [(tag, "fresh") for tag in self._hidden]
        self._states.define("free", leads)
        bare = f"{rules.calls(calls, functions, is_single)} {follows}" if calls.bare else ""
        self._define_fresh(leads, bare)
        if thinking is not None:
            self._states.define("thinking", [(thinking.close, "fresh"), *(openings if thinking.ends_at_call else [])])
        if is_single:
            self._define_last()
        return rules.grammar("thinking" if thinks and thinking is not None else "fresh")

    def _define_fresh(self, leads: Sequence[Lead], bare: str) -> None:
        rules, thinking = self._rules, self._thinking
        if not self._has_fresh:
            rules.define("fresh", "free")
            return
        choices = [f"SPACES {bare}"] if bare else []
        barred: list[str | int] = list(self._calls.bare)
        if thinking is not None and not thinking.anywhere:
            opening = rules.parts(thinking.open)
            choices.append(f"SPACES {written(opening)} thinking")
            barred.append(opening[0])
        texts = [text for text in barred if isinstance(text, str)]
        bar = f" & ~(SPACES {any_text(texts)} TEXT)" if texts else ""
        rules.define("FRESH", f"TEXT & ~SPACES{bar}")
        leading, ids = self._states.leading("FRESH", bar, leads)
        choices += ["SPACES", "FRESH", *leading]
        if others := self._special_ids - ids:
            choices.append(f"{self._states.before(leads, 'FRESH')} {token_set(others)} free")
        if others := others - {part for part in barred if isinstance(part, int)}:
            choices.append(f"SPACES {token_set(others)} fresh")
        rules.define("fresh", " | ".join(choices))

    def _define_last(self) -> None:
        tags = [self._rules.parts(opening) for opening in self._calls.triggers]
        texts = [parts[0] for parts in tags if len(parts) == 1 and isinstance(parts[0], str)]
        self._rules.define("LAST", f"TEXT & ~(TEXT {any_text(texts)} TEXT)" if texts else "TEXT")
        others = self._special_ids - {part for parts in tags for part in parts if isinstance(part, int)}
        self._rules.define("last", f"LAST | LAST {token_set(others)} last" if others else "LAST")
