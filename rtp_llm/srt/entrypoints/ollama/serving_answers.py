"""POST /api/chat and /api/generate."""

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request
from starlette.responses import Response

from rtp_llm.srt.entrypoints.asgi import JSON, EventStream, line, unless_disconnected
from rtp_llm.srt.entrypoints.chat_answer import ChatAnswer
from rtp_llm.srt.entrypoints.chat_request import ChatRequest, answers_to, thinking_variables
from rtp_llm.srt.entrypoints.converted import Conversation
from rtp_llm.srt.entrypoints.errors import ApiError, error_event
from rtp_llm.srt.entrypoints.frontend import LiveCall
from rtp_llm.srt.entrypoints.llama_cpp.infill import Filler, FillTokens
from rtp_llm.srt.entrypoints.ollama import options
from rtp_llm.srt.entrypoints.ollama.conversation import image_sources, of_chat, of_completion
from rtp_llm.srt.entrypoints.ollama.errors import OllamaError
from rtp_llm.srt.entrypoints.ollama.models import can_think, check_name
from rtp_llm.srt.entrypoints.ollama.protocol import AskingBody, ChatBody, GenerateBody, TokenLogprob
from rtp_llm.srt.entrypoints.ollama.replies import (
    Layout,
    Logprobs,
    Reply,
    chat_layout,
    generate_layout,
    message_of,
    timestamp,
)
from rtp_llm.srt.entrypoints.openai.base import disconnected_response
from rtp_llm.srt.entrypoints.openai.logprobs import TokenTexts, chat_logprobs
from rtp_llm.srt.entrypoints.serving import Serving, check_not_failed, request_names
from rtp_llm.srt.managers.generate_options import GenerateOptions
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.plan import TokenLogprob as CoreLogprob
from rtp_llm.srt.sampling_params import InvalidRequest

NDJSON = "application/x-ndjson"
# Engine's name of a field -> the request's.
CHAT_NAMES = {name: "messages" for name in ("input_ids", "image_data", "video_data")} | options.NAMES
GENERATE_NAMES = {"messages": "prompt", "input_ids": "prompt", "image_data": "images", **options.NAMES}


class AnswerEndpoints:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._token_texts: TokenTexts | None = None
        self._filler: Filler | None = None

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answer a conversation, in the form of Ollama's API. Without messages, say that the model is loaded."""
        started_s = time.perf_counter()
        self._check(body)
        if not body.messages:
            return self._idle(body, chat_layout)
        with self._serving.admission(1, "messages"):
            with request_names(CHAT_NAMES):
                conversation = of_chat(body)
                with conversation.naming_places():
                    asked = self._asked(body, conversation)
                    asked = replace(asked, tools=body.shown_tools(), strict=body.strict_names())
                    answer = await self._answer(asked, request)
            if answer is None:
                return disconnected_response()
            call = self._serving.start([answer.completion])
        reply = Reply(answer, self._name(body), chat_layout, started_s, self._logprobs(body))
        return await self._sent(body, call, reply, request)

    async def generate(self, body: GenerateBody, request: Request) -> Response:
        """Answer a prompt, in the form of Ollama's API: as a user's message, or, with ``raw``, by going on with it.
        Without a prompt, say that the model is loaded."""
        started_s = time.perf_counter()
        self._check(body)
        if not (body.prompt or body.suffix):
            return self._idle(body, generate_layout)
        with self._serving.admission(1, "prompt"):
            names = GENERATE_NAMES | ({"input_ids": "context"} if body.context else {})
            with request_names(names):
                answer = await self._completed(body, request)
            if answer is None:
                return disconnected_response()
            call = self._serving.start([answer.completion])
        gives_context = not (body.raw or body.images or body.suffix)
        reply = Reply(answer, self._name(body), generate_layout, started_s, self._logprobs(body), gives_context)
        return await self._sent(body, call, reply, request)

    def _check(self, body: AskingBody) -> None:
        check_name(self._serving, body.model)
        self._serving.check_tokenizer()
        if body.think and not can_think(self._serving):
            raise ApiError(400, f"{self._name(body)!a} does not support thinking: leave out think", "think")

    def _idle(self, body: AskingBody, layout: Layout) -> Response:
        """Return what is said to a request that has nothing to answer."""
        if body.unloads:
            raise ApiError(
                400, "keep_alive: the model cannot be unloaded; it stays as long as the server runs", "keep_alive"
            )
        head = {"model": self._name(body), "created_at": timestamp()}
        return JSON({**head, **layout(message_of()), "done": True, "done_reason": "load"})

    def _name(self, body: AskingBody) -> str:
        return body.model or self._serving.model_name

    async def _answer(self, asked: ChatRequest, request: Request) -> ChatAnswer | None:
        answers = await answers_to(self._serving, asked, request.receive)
        return None if answers is None else answers[0]

    async def _completed(self, body: GenerateBody, request: Request) -> ChatAnswer | None:
        """Return the answer to a prompt; a model that never learned to chat goes on with it."""
        if body.suffix:
            tokens, prompt_ids = await self._filled(body)
            return await self._unparsed(body, Prompt(input_ids=prompt_ids), tokens.ends)
        if body.raw or (self._serving.template is None and not body.system):
            prompt = await self._raw_prompt(body, request)
            return None if prompt is None else await self._unparsed(body, prompt)
        conversation = of_completion(body)
        with conversation.naming_places():
            asked = replace(self._asked(body, conversation), prefix_ids=body.context or ())
            return await self._answer(asked, request)

    async def _raw_prompt(self, body: GenerateBody, request: Request) -> Prompt | None:
        """Return the prompt as it is given; None if the client has gone while images were decoded."""
        serving = self._serving
        if body.images:
            prompt = Prompt(text=body.prompt, image_data=image_sources(body.images))
            return await unless_disconnected(request.receive, serving.manager.with_media(prompt))
        ids = await serving.encode(body.prompt or "", add_special_tokens=not body.context)
        return Prompt(input_ids=[*(body.context or ()), *ids])

    async def _filled(self, body: GenerateBody) -> tuple[FillTokens, list[int]]:
        """Return the ids of a prompt whose answer stands between the given one and the suffix, and its tokens."""
        if self._filler is None:
            self._filler = Filler(self._serving.manager)
        filler, tokens = self._filler, self._filler.tokens
        if tokens is None:
            raise InvalidRequest(f"{self._name(body)!a} does not support insert: leave out suffix", "suffix")
        before, after = body.prompt or "", body.suffix or ""

        def ids() -> list[int]:
            parts = (tokens.prefix, *filler.encode(before), tokens.suffix, *filler.encode(after), tokens.middle)
            return [*filler.beginning, *parts]

        return tokens, await self._serving.off_loop(len(before) + len(after), ids)

    async def _unparsed(self, body: GenerateBody, prompt: Prompt, end_ids: Sequence[int] = ()) -> ChatAnswer:
        """Return the answer to a prompt, all of it content. ``end_ids``: end it, too."""
        prompt = replace(
            prompt,
            sampling_params=replace(options.sampling_params(self._serving, body), stop_token_ids=list(end_ids)),
            default_max_new_tokens=options.most_new(body.options),
            options=_generate_options(body),
        )
        [made] = await self._serving.requests(prompt)
        return ChatAnswer(self._serving.manager.completion(made), None)

    def _asked(self, body: AskingBody, conversation: Conversation) -> ChatRequest:
        """Return what is asked for; a last message of an assistant's is gone on with."""
        last = conversation.messages[-1]
        continues = last["role"] == "assistant"
        if continues and last.get("tool_calls"):
            raise InvalidRequest("the last message calls tools: a message with a result must follow it", "messages")
        return ChatRequest(
            messages=conversation.messages,
            sampling_params=options.sampling_params(self._serving, body),
            begins_turn=not continues,
            continues=continues,
            variables=self._variables(body),
            default_max_new_tokens=options.most_new(body.options),
            options=_generate_options(body),
        )

    def _variables(self, body: AskingBody) -> dict[str, Any]:
        """Return the chat template's variables of ``think``."""
        think = body.think
        if think is None:
            return {}
        return thinking_variables(self._serving.template, bool(think), think if isinstance(think, str) else None)

    def _logprobs(self, body: AskingBody) -> Logprobs | None:
        if not body.logprobs:
            return None
        if self._token_texts is None:
            self._token_texts = TokenTexts(self._serving.manager.tokenizer)
        return partial(_token_logprobs, self._token_texts, body.top_logprobs or 0)

    async def _sent(self, body: AskingBody, call: LiveCall, reply: Reply, request: Request) -> Response:
        if body.stream is not False:
            return EventStream(call, self._lines(call, reply), end=b"", media_type=NDJSON)
        with call:
            if not await unless_disconnected(request.receive, call.wait()):
                return disconnected_response()
        check_not_failed(call.completions)
        return JSON(reply.whole())

    async def _lines(self, call: LiveCall, reply: Reply) -> AsyncGenerator[bytes, None]:
        async with error_event() as failure:
            async for _, delta in call.deltas():
                check_not_failed(call.completions)
                for part in reply.parts(delta):
                    yield line(part)
            yield line(reply.end())
        if failure.error is not None:
            yield line(OllamaError.of(failure.error).body)


def _generate_options(body: AskingBody) -> GenerateOptions:
    return {"return_logprob": bool(body.logprobs), "top_logprobs_num": body.top_logprobs or 0}


def _token_logprobs(texts: TokenTexts, num_top: int, items: Sequence[CoreLogprob]) -> list[TokenLogprob]:
    found = chat_logprobs(texts, items, num_top)["content"]
    if num_top:
        return [{**item} for item in found]
    return [{"token": item["token"], "logprob": item["logprob"], "bytes": item["bytes"]} for item in found]
