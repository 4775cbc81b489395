"""One answer of a chat as its text comes: content, thinking and calls, whatever the dialect that tells them."""

from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from rtp_llm.srt.managers.detokenizer import Completion
from rtp_llm.srt.parser.chat_parser import ChatParser
from rtp_llm.srt.parser.events import Arguments, CallBegin, CallEnd, Content, Event
from rtp_llm.srt.parser.response_template import ResponseTemplateParser

Parser = ChatParser | ResponseTemplateParser
INVALID_JSON = "INVALID_JSON"  # the argument that holds what the model wrote, if that is no JSON object


class ChatAnswer:
    """An answer.

    Args:
        parser: None: all of the text is content.
        max_calls: further calls are left out; None: any number.
    """

    def __init__(self, completion: Completion, parser: Parser | None, max_calls: int | None = None) -> None:
        self.completion = completion
        self._parser = parser
        self._max_calls = max_calls

    @property
    def num_calls(self) -> int:
        """The number of calls that have begun, those left out included."""
        return 0 if self._parser is None else self._parser.num_calls

    @property
    def reasoning_tokens(self) -> int:
        return 0 if self._parser is None else self.completion.num_tokens_within(self._parser.thinking_spans)

    def events(self, text: str) -> Sequence[Event]:
        """Return what the next part of the text says; once the completion has finished, also what is left to say."""
        if self._parser is None:
            return [Content(text)] if text else []
        events = self._parser.feed(text)
        if (reason := self.completion.finish_reason) is not None:
            events += self._parser.finish(is_cut=reason.type != "stop")
        return [event for event in events if not self._is_left_out(event)]

    def _is_left_out(self, event: Event) -> bool:
        if self._max_calls is None or not isinstance(event, CallBegin | Arguments | CallEnd):
            return False
        return event.index >= self._max_calls


def read_arguments(text: str) -> dict[str, Any]:
    """Return a call's arguments. Of a text that was cut, what is complete of it, as Anthropic's client reads it."""
    try:
        value = from_json(text, allow_partial=True) if text.strip() else {}
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {INVALID_JSON: text}
