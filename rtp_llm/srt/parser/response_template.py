"""Answers by a checkpoint's own description of them: a tokenizer's ``response_template``, which transformers reads."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import ResponseTemplate, load_response_template

from rtp_llm.srt.parser.answer_writer import AnswerWriter
from rtp_llm.srt.parser.events import Event, merged

THINKING = frozenset({"thinking", "reasoning", "reasoning_content"})  # names of regions
CALLS = "tool_calls"


def read_response_template(tokenizer: Any) -> ResponseTemplate | None:
    """Return the description that comes with a tokenizer; None: there is none.

    Raises:
        ValueError: it is not a valid one.
    """
    given = getattr(tokenizer, "response_template", None)  # few kinds of tokenizers have one
    return None if given is None else load_response_template(given)


class ResponseTemplateParser(AnswerWriter):
    """Reads one answer with the interface of ChatParser. Calls are told when they are complete.

    What is not as the template describes it is content, and so is all that follows.

    Args:
        prefix: the prompt, of which the last message may have begun regions.
        tools: the request's; None: calls are text.
    """

    def __init__(
        self,
        template: ResponseTemplate,
        prefix: str,
        tools: Sequence[Mapping[str, Any]] | None = None,
        separates: bool = True,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        super().__init__(separates, new_id)
        self._parser: ResponseParser | None = ResponseParser(template, prefix=prefix, tools=list(tools or ()))
        self._takes_calls = tools is not None
        self._held = ""  # text of a region that becomes a call
        self._num_read = 0
        for event in self._parser.initial_events:
            if event["type"] == "region_open":
                self._open(event["field"])
            elif event["type"] == "region_close":
                self.end_thinking()

    @property
    def offset(self) -> int:
        return self._num_read

    def feed(self, piece: str) -> list[Event]:
        """Take the next piece; return what is certain. Character by character: so a failure ends at a known place."""
        for character in piece:
            self._num_read += 1
            parser = self._parser
            if parser is None:
                self.content(character)
            else:
                self._read(lambda parser=parser, text=character: parser.feed(text))  # type: ignore[misc]
        return self.take()

    def finish(self, is_cut: bool = False) -> list[Event]:
        """Return the rest: the text has ended."""
        parser = self._parser
        if parser is not None:
            self._read(lambda: parser.finalize()[1])
        return merged([*self.take(), *self.take_rest()])

    def _read(self, events: Callable[[], list[dict[str, Any]]]) -> None:
        try:
            for event in events():
                self._take(event)
        except Exception:  # a checkpoint's template may raise anything, mostly ValueError
            self._parser = None
            self.content(self._held)

    def _take(self, event: Mapping[str, Any]) -> None:
        field = event["field"]
        if event["type"] == "region_open":
            self._open(field)
        elif event["type"] == "region_chunk":
            self._say_in(field, event["text"])
        else:
            held, self._held = self._held, ""
            if field == CALLS and not self._call(event["value"]):
                self.content(held)
            self.end_thinking()

    def _open(self, field: str) -> None:
        if field in THINKING:
            self.begin_thinking(0)
        else:
            self.border()

    def _say_in(self, field: str, text: str) -> None:
        if field == CALLS:
            self._held += text
        elif field in THINKING:
            self.reasoning(text)
        else:
            self.content(text)

    def _call(self, value: Any) -> bool:
        """Tell a call, or a list of them; return False if it is none."""
        functions = [_function(item) for item in (value if isinstance(value, list) else [value])]
        if not self._takes_calls or None in functions:
            return False
        for name, arguments in filter(None, functions):
            self.begin(name)
            self.arguments(arguments)
            self.end()
        return True


def _function(call: Any) -> tuple[str, str] | None:
    """Return a call's name and its arguments as JSON; None: it has no name."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return None
    name = function.get("name")
    if not isinstance(name, str) or not name:
        return None
    arguments = function.get("arguments")
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
