"""A chat's answers: from a completion's text to OpenAI's messages and deltas, with thinking and calls told apart."""

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
from rtp_llm.srt.parser.events import Arguments, CallBegin, CallEnd, Content, Event, Reasoning
from rtp_llm.srt.sampling_params import InvalidRequest


class Answer:
    """One choice of a chat, in OpenAI's form."""

    def __init__(self, body: ChatCompletionRequest, answer: ChatAnswer) -> None:
        self.completion = answer.completion
        self._answer = answer
        self._has_reasoning = body.include_reasoning is not False

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
        return [delta for event in self._answer.events(text) if (delta := self._delta(event)) is not None]

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


def template_variables(body: ChatCompletionRequest, template: Template | None) -> dict[str, Any]:
    """Return ``chat_template_kwargs`` with what ``reasoning_effort`` asks for, unless they say it themselves."""
    given = dict(body.chat_template_kwargs or {})
    effort = body.reasoning_effort
    if effort is None:
        return given
    asked = thinking_variables(template, effort != "none", effort)
    if not asked and effort != "none":
        raise InvalidRequest("reasoning_effort: the model's chat template has no such setting", "reasoning_effort")
    return asked | given
