"""A chat's answers: from a completion's text to OpenAI's messages and deltas, with thinking and calls told apart."""

from collections.abc import Iterable
from typing import Any

from rtp_llm.srt.conversation import Template
from rtp_llm.srt.entrypoints.chat_answer import ChatAnswer
from rtp_llm.srt.entrypoints.chat_request import thinking_variables
from rtp_llm.srt.entrypoints.openai.base import finish_reason
from rtp_llm.srt.entrypoints.openai.protocol import (
    AssistantMessage,
    CalledFunctionDelta,
    ChatCompletionRequest,
    ChatDelta,
    FinishReason,
    ToolCall,
)
from rtp_llm.srt.entrypoints.thinking import BUDGET
from rtp_llm.srt.parser.events import Arguments, CallBegin, CallEnd, Content, Event, Reasoning
from rtp_llm.srt.sampling_params import InvalidRequest

BUDGETS = ("thinking_token_budget", BUDGET, "max_thinking_tokens")


class Answer:
    """One choice of a chat, in OpenAI's form."""

    def __init__(self, body: ChatCompletionRequest, answer: ChatAnswer) -> None:
        self.completion = answer.completion
        self._answer = answer
        self._has_reasoning = body.include_reasoning is not False
        self._thinks_in_one_piece = body.stream_reasoning is False
        self._thought = ""  # what is still to be sent in one piece

    @property
    def finish_reason(self) -> FinishReason | None:
        reason = finish_reason(self.completion)
        return "tool_calls" if reason == "stop" and self._answer.num_calls else reason

    @property
    def reasoning_tokens(self) -> int:
        return self._answer.reasoning_tokens

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
        events = self._answer.events(text)
        if self._thinks_in_one_piece:
            events = self._with_whole_thinking(events)
        return [delta for event in events if (delta := self._delta(event)) is not None]

    def _with_whole_thinking(self, events: Iterable[Event]) -> list[Event]:
        """Hold thinking back until something else comes, or the end."""
        passed: list[Event] = []
        for event in events:
            if isinstance(event, Reasoning):
                self._thought += event.text
            else:
                passed += [*self._take_thought(), event]
        return passed + (self._take_thought() if self.completion.finished else [])

    def _take_thought(self) -> list[Event]:
        text, self._thought = self._thought, ""
        return [Reasoning(text)] if text else []

    def _delta(self, event: Event) -> ChatDelta | None:
        if isinstance(event, Content):
            return {"content": event.text}
        if isinstance(event, Reasoning):
            return {"reasoning_content": event.text, "reasoning": event.text} if self._has_reasoning else None
        if isinstance(event, CallEnd):
            return None
        if isinstance(event, Arguments):
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        assert isinstance(event, CallBegin)  # the last kind
        function: CalledFunctionDelta = {"name": event.name, "arguments": ""}
        return {"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}


def thinking_budget(body: ChatCompletionRequest) -> int | None:
    """Return the most tokens of thinking; None: any number.

    Raises:
        InvalidRequest: it is given twice, with different values.
    """
    given = {name: value for name in BUDGETS if (value := getattr(body, name)) is not None}
    in_template = (body.chat_template_kwargs or {}).get(BUDGET)
    if isinstance(in_template, int) and not isinstance(in_template, bool):
        given[f"chat_template_kwargs.{BUDGET}"] = in_template
    if len(set(given.values())) > 1:
        (first, a), (second, b) = list(given.items())[:2]
        raise InvalidRequest(f"{first} ({a}) and {second} ({b}) differ; give one", second.partition(".")[0])
    budget = next(iter(given.values()), -1)
    return None if budget < 0 else budget


def template_variables(body: ChatCompletionRequest, template: Template | None) -> dict[str, Any]:
    """Return ``chat_template_kwargs`` with what ``reasoning_effort`` asks for, unless they say it themselves."""
    given = dict(body.chat_template_kwargs or {})
    budget = thinking_budget(body)
    if budget is not None and template is not None and BUDGET in template.variables:
        given[BUDGET] = budget
    effort = body.reasoning_effort
    if effort is None:
        return given
    asked = thinking_variables(template, effort != "none", effort)
    if not asked and effort != "none":
        raise InvalidRequest("reasoning_effort: the model's chat template has no such setting", "reasoning_effort")
    return asked | given
