"""A chat's answers: from a completion's text to OpenAI's messages and deltas, with thinking and calls told apart."""

from collections.abc import Mapping, Sequence
from typing import Any

from rtp_llm.srt.chat.messages import ChatPrompt
from rtp_llm.srt.constrained.json_schema import check_schema
from rtp_llm.srt.constrained.spec import MAX_GRAMMAR_CHARS
from rtp_llm.srt.conversation import Template
from rtp_llm.srt.entrypoints.openai.base import finish_reason
from rtp_llm.srt.entrypoints.openai.protocol import (
    AssistantMessage,
    CalledFunctionDelta,
    ChatCompletionRequest,
    ChatDelta,
    FinishReason,
    ToolCall,
)
from rtp_llm.srt.entrypoints.serving import Serving
from rtp_llm.srt.managers.detokenizer import Completion
from rtp_llm.srt.parser.call_grammar import call_grammar
from rtp_llm.srt.parser.chat_parser import ChatParser
from rtp_llm.srt.parser.choose import begins_thinking
from rtp_llm.srt.parser.events import Arguments, CallBegin, CallEnd, Content, Event, Reasoning
from rtp_llm.srt.parser.response_template import ResponseTemplateParser
from rtp_llm.srt.parser.schemas import ToolSchemas
from rtp_llm.srt.request_spec import GrammarSpec
from rtp_llm.srt.sampling_params import InvalidRequest

THINKING_SWITCHES = ("enable_thinking", "thinking")  # variables by which templates turn thinking on and off


Parser = ChatParser | ResponseTemplateParser


class Answer:
    """One choice of a chat.

    Args:
        parser: None: all of the text is content.
    """

    def __init__(self, body: ChatCompletionRequest, completion: Completion, parser: Parser | None) -> None:
        self.completion = completion
        self._parser = parser
        self._has_reasoning = body.include_reasoning is not False
        self._max_calls = 1 if body.parallel_tool_calls is False else None

    @property
    def finish_reason(self) -> FinishReason | None:
        reason = finish_reason(self.completion)
        return "tool_calls" if reason == "stop" and self._parser is not None and self._parser.num_calls else reason

    @property
    def reasoning_tokens(self) -> int:
        return 0 if self._parser is None else self.completion.num_tokens_within(self._parser.thinking_spans)

    def message(self) -> AssistantMessage:
        """Return the message of a finished completion."""
        deltas = self.deltas(self.completion.text)
        content = "".join(delta.get("content", "") for delta in deltas)
        reasoning = "".join(delta.get("reasoning", "") for delta in deltas)
        calls: list[ToolCall] = []
        for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
            if "id" in part:
                name = part["function"].get("name", "")
                calls.append({"id": part["id"], "type": "function", "function": {"name": name, "arguments": ""}})
            calls[-1]["function"]["arguments"] += part["function"]["arguments"]
        message: AssistantMessage = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return message

    def deltas(self, text: str) -> list[ChatDelta]:
        """Return what the next part of the text says; once the completion has finished, also what is left to say."""
        if self._parser is None:
            return [{"content": text}] if text else []
        events = self._parser.feed(text)
        if (reason := self.completion.finish_reason) is not None:
            events += self._parser.finish(is_cut=reason.type != "stop")
        return [delta for event in events if (delta := self._delta(event)) is not None]

    def _delta(self, event: Event) -> ChatDelta | None:
        if isinstance(event, Content):
            return {"content": event.text}
        if isinstance(event, Reasoning):
            return {"reasoning_content": event.text, "reasoning": event.text} if self._has_reasoning else None
        if isinstance(event, CallEnd) or (self._max_calls is not None and event.index >= self._max_calls):
            return None
        if isinstance(event, Arguments):
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        assert isinstance(event, CallBegin)  # the last kind
        function: CalledFunctionDelta = {"name": event.name, "arguments": ""}
        return {"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}


def answer_parser(serving: Serving, body: ChatCompletionRequest, chat: ChatPrompt) -> Parser | None:
    """Return a parser for one answer to a chat; None: all of it is content."""
    tools = body.shown_tools()
    separates = body.separate_reasoning is not False
    if serving.response_template is not None:
        return ResponseTemplateParser(serving.response_template, chat.text, tools or None, separates)
    form = serving.answer_format
    if form.is_plain:
        return None
    begins = separates and begins_thinking(form, chat.text, _continued(body))
    return ChatParser(form, ToolSchemas(tools) if tools else None, begins, separates)


def grammar_of_calls(serving: Serving, body: ChatCompletionRequest, chat: ChatPrompt) -> GrammarSpec | None:
    """Return the grammar of answers that call what ``tool_choice`` demands; None: it demands nothing.

    The core compiles it; what is found there ends the request with a 400.
    """
    tools = body.demanded_tools()
    if not tools:
        return None
    for tool in tools:
        try:
            check_schema(tool["function"]["parameters"])
        except InvalidRequest as error:
            name = tool["function"]["name"]
            raise InvalidRequest(f"tool_choice: the parameters of {name}: {error}", "tools") from None
    form = serving.answer_format
    is_single = body.tool_choice != "required" or body.parallel_tool_calls is False
    thinks = begins_thinking(form, chat.text, _continued(body))
    text = None
    if serving.response_template is None:
        text = call_grammar(form, tools, serving.special_token_ids(), thinks, is_single)
    if text is None:
        raise InvalidRequest(
            "tool_choice: there is no grammar for this model's form of calls: leave it out, or choose 'auto'",
            "tool_choice",
        )
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(
            f"tool_choice: the grammar of these {len(tools)} tools has {len(text)} characters; at most "
            f"{MAX_GRAMMAR_CHARS} are taken: demand one of fewer",
            "tools",
        )
    return GrammarSpec("grammar", text)


def _continued(body: ChatCompletionRequest) -> str | None:
    """Return the beginning of the answer that a request wants continued; None: it wants a new one."""
    content = body.messages[-1].content
    return (content if isinstance(content, str) else "") if body.continue_final_message else None


def check_takes_tools(serving: Serving, tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise InvalidRequest if there are tools and the model's calls could not be told from text."""
    if tools and serving.response_template is None and not serving.answer_format.has_calls:
        raise InvalidRequest(
            "the form of this model's tool calls is not known from its chat template: start the server with "
            "--tool-call-parser, or leave out tools",
            "tools",
        )


def template_variables(body: ChatCompletionRequest, template: Template | None) -> dict[str, Any]:
    """Return ``chat_template_kwargs`` with what ``reasoning_effort`` asks for, unless they say it themselves."""
    given = dict(body.chat_template_kwargs or {})
    effort = body.reasoning_effort
    if effort is None:
        return given
    known = frozenset() if template is None else template.variables
    asked: dict[str, Any] = {name: effort != "none" for name in THINKING_SWITCHES if name in known}
    if "reasoning_effort" in known:
        asked["reasoning_effort"] = effort
    if not asked and effort != "none":
        raise InvalidRequest("reasoning_effort: the model's chat template has no such setting", "reasoning_effort")
    return asked | given
