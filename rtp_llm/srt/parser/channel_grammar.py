"""Grammars of messages with headers (``formats.Channels``)."""

from collections.abc import Mapping, Sequence

from rtp_llm.srt.parser.call_grammar import CallRules, Function
from rtp_llm.srt.parser.formats import Channels
from rtp_llm.srt.parser.rules import CannotWrite, token_set

CONSTRAIN = "<|constrain|>"  # before the language of a call's arguments
LANGUAGE = "json"
CHANNEL = "commentary"  # of calls
FINAL = "final"  # the channel of the answer itself
RECIPIENT = "to="


class ChannelRules(CallRules):
    """See CallRules."""

    def __init__(self, form: Channels, token_ids: Mapping[str, int], loose: frozenset[str] = frozenset()) -> None:
        super().__init__(token_ids, loose)
        self._form = form
        self._token_ids = token_ids

    def messages(self, functions: Sequence[Function], content: str = "") -> str:
        """Return the grammar of thinking, or none, and then one call, or a message of the answer.

        Args:
            content: what matches the answer; empty: there is to be a call.
        """
        form = self._form
        calls = [f"{self.text(f'{form.channel}{FINAL}{form.message}')} {content}"] if content else []
        for item in functions:
            header = f"{form.channel}{CHANNEL} {RECIPIENT}{form.function}{item['name']} "
            calls.append(f"{self.text(f'{header}{CONSTRAIN}{LANGUAGE}{form.message}')} {self.json(item)}")
        return self.grammar(f"{self._thinking()} ({self.any_of(calls)})")

    def _thinking(self) -> str:
        """Return what matches a message of thinking and the beginning of the next one, or nothing."""
        form = self._form
        head = self.text(f"{form.channel}{form.thinking[0]}{form.message}")
        return f"({head} {self.up_to(form.ends[0])} {self.text(f'{form.start}assistant')})?"

    def free(self, functions: Sequence[Function], is_single: bool) -> str:
        """Return the grammar of messages of which those to functions are calls.

            header   from its beginning to ``message``; a recipient in it is one of the functions
            body     what follows, to an end
            between  text after an end, to the next header

        Raises:
            CannotWrite: a tag is no special token.
        """
        form = self._form
        if missing := {form.start, form.channel, form.message} - self._token_ids.keys():
            raise CannotWrite(f"{', '.join(sorted(missing))}: no special token of this model")
        ids = frozenset(self._token_ids.values())
        start, channel, message = (self._token_ids[tag] for tag in (form.start, form.channel, form.message))
        ends = {self._token_ids[tag] for tag in form.ends if tag in self._token_ids}
        visible = {start, channel, *ends}
        for suffix, may_call in (("", True), *((("_last", False),) if is_single else ())):
            header, body, between = (f"{name}{suffix}" for name in ("header", "body", "between"))
            choices = ["HEADER", f"HEADER {token_set(visible)} {header}", f"HEADER {token_set({message})} {body}"]
            if hidden := ids - visible - {message}:  # no word may be put together around it
                choices.append(f"(HEADER SPACE)? {token_set(hidden)} {header}")
            if may_call:
                choices.append(f"{self._recipient()} {self._calls(functions)} {'body_last' if is_single else body}")
            self.define(header, " | ".join(choices))
            self.define(body, self._text(body, ids, {start: header} | dict.fromkeys(ends, between)))
            self.define(between, self._text(between, ids, {start: header, channel: header}))
        self.define("HEADER", f'TEXT & ~(TEXT "{RECIPIENT}" TEXT)')
        return self.grammar("header")

    def _recipient(self) -> str:
        return self.rule(self.terminal(f'TEXT "{RECIPIENT}"'), "[lazy]")

    def _calls(self, functions: Sequence[Function]) -> str:
        """Return what matches the rest of a header after ``to=``, and the arguments."""
        form = self._form
        where = f"({self.text(f'{form.channel}{CHANNEL}')})?"
        language = f'(" " {self.text(CONSTRAIN)}? "{LANGUAGE}")?'
        rest = self.rule(f'{where} {language} " "? {self.text(form.message)}')
        calls = []
        for item in functions:
            calls.append(f"{self.text(form.function + item['name'])} {rest} {self.json(item)}")
        return f"({self.any_of(calls)})"

    @staticmethod
    def _text(name: str, ids: frozenset[int], leads: Mapping[int, str]) -> str:
        choices = [f"TEXT {token_set({token_id})} {follows}" for token_id, follows in leads.items()]
        if others := ids - leads.keys():
            choices.append(f"TEXT {token_set(others)} {name}")
        return " | ".join(["TEXT", *choices])
