"""POST /v1/messages and /v1/messages/count_tokens."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

from fastapi import Request
from starlette.responses import Response

from rtp_llm.srt.entrypoints.anthropic.blocks import BlockWriter, StreamEvent, whole_blocks
from rtp_llm.srt.entrypoints.anthropic.conversation import calls_tools, converted
from rtp_llm.srt.entrypoints.anthropic.errors import MessagesError
from rtp_llm.srt.entrypoints.anthropic.protocol import (
    AnswerMessage,
    CountTokensRequest,
    MessagesRequest,
    MessageUsage,
    StopReason,
    TokensCount,
)
from rtp_llm.srt.entrypoints.asgi import JSON, EventStream, event, unless_disconnected
from rtp_llm.srt.entrypoints.chat_answer import ChatAnswer
from rtp_llm.srt.entrypoints.chat_request import ChatRequest, answers_to, encoded_chat, thinking_variables
from rtp_llm.srt.entrypoints.converted import Conversation
from rtp_llm.srt.entrypoints.errors import ApiError, error_event
from rtp_llm.srt.entrypoints.frontend import LiveCall
from rtp_llm.srt.entrypoints.openai.base import disconnected_response
from rtp_llm.srt.entrypoints.serving import Serving, check_not_failed, request_names
from rtp_llm.srt.entrypoints.thinking import may_think
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams

# Engine's name of a field -> the request's.
NAMES = {name: "messages" for name in ("input_ids", "image_data", "video_data")} | {
    "max_new_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
}
NO_THREADS = "thread: this server keeps no conversations; send all messages, without thread"
THREADS_UNSUPPORTED = "thread_unsupported_request"  # by this code clients know that they may go on without


class MessagesEndpoint:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def create(self, body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation, in the form of Anthropic's API."""
        serving = self._serving
        serving.check_model(body.model)
        serving.check_tokenizer()
        if body.thread is not None:
            raise ApiError(400, NO_THREADS, "thread", THREADS_UNSUPPORTED)
        with serving.admission(1, "messages"):
            answer = await self._answer(body, request)
            if answer is None:
                return disconnected_response()
            call = serving.start([answer.completion])
        message = self._head(answer)
        if body.stream:
            return EventStream(call, self._events(call, body, message, answer), end=b"")
        with call:
            if not await unless_disconnected(request.receive, call.wait()):
                return disconnected_response()
        check_not_failed([answer.completion])
        message["content"] = whole_blocks(answer.events(answer.completion.text), _shows_thinking(body))
        message["stop_reason"], message["stop_sequence"] = stop_reason(body, answer)
        message["usage"] = usage(answer)
        return JSON(message)

    async def count_tokens(self, body: CountTokensRequest, request: Request) -> Response:
        """Return the number of tokens of the prompt that the same body would have in /v1/messages."""
        serving = self._serving
        serving.check_model(body.model)
        serving.check_tokenizer()
        with _request_fields(body) as conversation:
            counting = encoded_chat(serving, self._chat_request(body, conversation, SamplingParams()))
            prompt = await unless_disconnected(request.receive, counting)
        if prompt is None:
            return disconnected_response()
        return JSON(TokensCount(input_tokens=len(prompt.input_ids)))

    async def _answer(self, body: MessagesRequest, request: Request) -> ChatAnswer | None:
        with _request_fields(body) as conversation:
            chat_request = self._chat_request(body, conversation, self._sampling_params(body))
            # Not as max_new_tokens, which is an error where the context has less room.
            chat_request = replace(chat_request, default_max_new_tokens=body.max_tokens)
            answers = await answers_to(self._serving, chat_request, request.receive)
        return None if answers is None else answers[0]

    def _chat_request(
        self, body: CountTokensRequest, conversation: Conversation, params: SamplingParams
    ) -> ChatRequest:
        choice, thinking, config = body.tool_choice, body.thinking, body.output_config
        last = body.messages[-1]
        continues = last.role == "assistant"
        if continues and calls_tools(last):
            raise InvalidRequest("the last message calls tools: a user's message with their results must follow it")
        thinks = None if thinking is None else thinking.type != "disabled"
        # One that does not think keeps to any budget.
        budget = thinking.budget_tokens if thinking is not None and may_think(self._serving) else None
        return ChatRequest(
            messages=conversation.messages,
            sampling_params=params,
            **body.tool_fields(),
            has_single_call=choice is not None and (choice.type == "tool" or bool(choice.disable_parallel_tool_use)),
            thinking_budget=budget,
            begins_turn=not continues,
            continues=continues,
            variables=thinking_variables(self._serving.template, thinks, None if config is None else config.effort),
        )

    def _sampling_params(self, body: MessagesRequest) -> SamplingParams:
        output = None if body.output_config is None else body.output_config.format
        given = {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stop": body.stop_sequences,
            "response_format": None if output is None else _response_format(output.json_schema),
        }
        given = {name: value for name, value in given.items() if value is not None}
        return SamplingParams.from_dict(self._serving.sampling_defaults | given)

    def _head(self, answer: ChatAnswer) -> AnswerMessage:
        """Return the message as a stream begins with it."""
        return {
            "id": f"msg_{uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": self._serving.model_name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage(answer),
        }

    async def _events(
        self, call: LiveCall, body: MessagesRequest, message: AnswerMessage, answer: ChatAnswer
    ) -> AsyncGenerator[bytes, None]:
        writer = BlockWriter(_shows_thinking(body))
        async with error_event() as failure:
            yield _sent({"type": "message_start", "message": message})
            yield _sent({"type": "ping"})
            async for _, delta in call.deltas():
                check_not_failed([answer.completion])
                for said in writer.write(answer.events(delta.text)):
                    yield _sent(said)
            for said in (*writer.close(), *_end(body, answer)):
                yield _sent(said)
        if failure.error is not None:
            yield event(MessagesError.of(failure.error).body, "error")


@contextmanager
def _request_fields(body: CountTokensRequest) -> Iterator[Conversation]:
    """Convert the conversation, and turn InvalidRequest into an ApiError with the request's own names and places."""
    with request_names(NAMES):
        conversation = converted(body)
        with conversation.naming_places():
            yield conversation


def stop_reason(body: MessagesRequest, answer: ChatAnswer) -> tuple[StopReason, str | None]:
    """Return why a finished answer ended, and the stop sequence, if it was one. What was aborted has been cut."""
    reason = answer.completion.finish_reason
    if reason is None or reason.type == "abort":
        return "max_tokens", None
    if reason.type == "length":
        is_whole = len(answer.completion.output_ids) >= body.max_tokens
        return "max_tokens" if is_whole else "model_context_window_exceeded", None
    if isinstance(reason.matched, str) and reason.matched in (body.stop_sequences or ()):
        return "stop_sequence", reason.matched
    return "tool_use" if answer.num_calls else "end_turn", None


def usage(answer: ChatAnswer) -> MessageUsage:
    completion = answer.completion
    return {
        "input_tokens": completion.prompt_tokens - completion.cached_tokens,
        "cache_creation_input_tokens": 0,  # nobody pays for what the prefix cache keeps
        "cache_read_input_tokens": completion.cached_tokens,
        "output_tokens": len(completion.output_ids),
        "output_tokens_details": {"thinking_tokens": answer.reasoning_tokens},
    }


def _end(body: MessagesRequest, answer: ChatAnswer) -> Iterator[StreamEvent]:
    reason, sequence = stop_reason(body, answer)
    delta = {"stop_reason": reason, "stop_sequence": sequence}
    yield {"type": "message_delta", "delta": delta, "usage": usage(answer)}
    yield {"type": "message_stop"}


def _sent(said: StreamEvent) -> bytes:
    return event(said, said["type"])


def _response_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def _shows_thinking(body: MessagesRequest) -> bool:
    return body.thinking is None or body.thinking.display != "omitted"
