"""POST /v1/chat/completions."""

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from fastapi import Request
from starlette.responses import Response

from rtp_llm.srt.entrypoints.asgi import JSON, EventStream, event, unless_disconnected
from rtp_llm.srt.entrypoints.chat_request import ChatRequest, answers_to
from rtp_llm.srt.entrypoints.errors import error_event
from rtp_llm.srt.entrypoints.frontend import LiveCall
from rtp_llm.srt.entrypoints.openai.answers import Answer, template_variables, thinking_budget
from rtp_llm.srt.entrypoints.openai.base import OpenAIEndpoint, StreamUsage, disconnected_response, usage
from rtp_llm.srt.entrypoints.openai.logprobs import chat_logprobs
from rtp_llm.srt.entrypoints.openai.protocol import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    NamedTool,
)
from rtp_llm.srt.entrypoints.serving import check_not_failed, options_of, request_names
from rtp_llm.srt.managers.detokenizer import Delta
from rtp_llm.srt.plan import TokenLogprob


class ChatEndpoint(OpenAIEndpoint):
    async def create(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation. Without ``max_completion_tokens`` the answer may fill the context."""
        serving = self._serving
        serving.check_model(body.model)
        serving.check_tokenizer()
        with serving.admission(body.n or 1, "n"):
            answers = await self._answers(body, request)
            if answers is None:
                return disconnected_response()
            call = serving.start([answer.completion for answer in answers])
        head = self._head(body, "chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion")
        if body.stream:
            return EventStream(call, self._events(call, body, head, answers))
        with call:
            if not await unless_disconnected(request.receive, call.wait()):
                return disconnected_response()
        completions = list(call.completions)
        check_not_failed(completions)
        choices = [self._choice(body, i, answer) for i, answer in enumerate(answers)]
        return JSON({**head, "choices": choices, "usage": usage(completions, len(answers), _reasoning_tokens(answers))})

    async def _answers(self, body: ChatCompletionRequest, request: Request) -> list[Answer] | None:
        with request_names(chat_names(body)):
            answers = await answers_to(self._serving, self.chat_request(body), request.receive)
        return None if answers is None else [Answer(body, answer) for answer in answers]

    def chat_request(self, body: ChatCompletionRequest) -> ChatRequest:
        """Return what a body asks for. Raise InvalidRequest for an option that does not fit."""
        max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        return ChatRequest(
            messages=[message.model_dump(exclude_none=True) for message in body.messages],
            sampling_params=self._sampling_params(body, max_tokens),
            **body.tool_fields(),
            has_single_call=isinstance(body.tool_choice, NamedTool) or body.parallel_tool_calls is False,
            begins_turn=_begins_turn(body),
            continues=bool(body.continue_final_message),
            variables=template_variables(body, self._serving.template),
            separates_thinking=body.separate_reasoning is not False,
            thinking_budget=thinking_budget(body),
            options={
                **options_of(body),
                "return_logprob": bool(body.logprobs),
                "top_logprobs_num": body.top_logprobs or 0,
            },
        )

    def _logprobs(self, body: ChatCompletionRequest, items: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        return chat_logprobs(self.token_texts, items, body.top_logprobs or 0) if body.logprobs else None

    def _choice(self, body: ChatCompletionRequest, i: int, answer: Answer) -> ChatChoice:
        return {
            "index": i,
            "message": answer.message(),
            "logprobs": self._logprobs(body, answer.completion.logprobs),
            "finish_reason": answer.finish_reason or "stop",
        }

    async def _events(
        self, call: LiveCall, body: ChatCompletionRequest, head: dict[str, Any], answers: Sequence[Answer]
    ) -> AsyncGenerator[bytes, None]:
        """Yield role, what the answer says, and finish reason in chunks of their own, in this order for each choice."""
        stream_usage = StreamUsage(body, call.completions, len(answers), partial(_reasoning_tokens, answers))
        begun: set[int] = set()
        async with error_event() as failure:
            async for i, delta in call.deltas():
                check_not_failed([call.completions[i]])
                for choice in self._chunk_choices(body, i, answers[i], delta, is_first=i not in begun):
                    begun.add(i)
                    yield event({**head, "choices": [choice], **stream_usage.chunk_fields()})
            if stream_usage.at_end:
                yield event({**head, "choices": [], "usage": stream_usage.current()})
        if failure.body is not None:
            yield event(failure.body)

    def _chunk_choices(
        self, body: ChatCompletionRequest, i: int, answer: Answer, delta: Delta, is_first: bool
    ) -> Iterator[ChatChunkChoice]:
        finished = answer.completion.finished
        deltas = answer.deltas(delta.text)
        if not (deltas or body.logprobs or finished):
            return
        if is_first:
            yield _chunk_choice(i, {"role": "assistant", "content": ""})
        logprobs = self._logprobs(body, delta.logprobs) if delta.logprobs or deltas else None
        for said in deltas or ([{"content": ""}] if logprobs else []):
            yield {**_chunk_choice(i, said), "logprobs": logprobs}
            logprobs = None
        if finished:
            yield {**_chunk_choice(i, {}), "finish_reason": answer.finish_reason}


def chat_names(body: ChatCompletionRequest) -> dict[str, str]:
    """Return the names that errors have for fields of a chat: the engine's -> the request's."""
    asked = "max_completion_tokens" if body.max_tokens is None else "max_tokens"
    names = {name: "messages" for name in ("input_ids", "image_data", "video_data")}
    return names | body.grammar_names | {"max_new_tokens": asked, "min_new_tokens": "min_tokens"}


def _reasoning_tokens(answers: Iterable[Answer]) -> int:
    return sum(answer.reasoning_tokens for answer in answers)


def _chunk_choice(i: int, delta: ChatDelta) -> ChatChunkChoice:
    return {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}


def _begins_turn(body: ChatCompletionRequest) -> bool:
    if body.add_generation_prompt is None:
        return not body.continue_final_message
    return body.add_generation_prompt
