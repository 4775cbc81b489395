"""POST /v1/completions."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import Response

from rtp_llm.srt.entrypoints.asgi import JSON, EventStream, event, unless_disconnected
from rtp_llm.srt.entrypoints.errors import error_event
from rtp_llm.srt.entrypoints.frontend import LiveCall
from rtp_llm.srt.entrypoints.openai.base import OpenAIEndpoint, StreamUsage, disconnected_response, finish_reason, usage
from rtp_llm.srt.entrypoints.openai.logprobs import TextOffsets, completion_logprobs, prompt_offsets
from rtp_llm.srt.entrypoints.openai.protocol import CompletionChoice, CompletionRequest
from rtp_llm.srt.entrypoints.serving import check_not_failed, options_of, request_names
from rtp_llm.srt.managers.detokenizer import Completion
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.plan import TokenLogprob
from rtp_llm.srt.sampling_params import InvalidRequest

DEFAULT_MAX_TOKENS = 16
NAMES = {"input_ids": "prompt", "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


@dataclass(slots=True)
class ChoiceState:
    """The position of a choice in its answer or stream."""

    echo: str | None  # the prompt, if it has not been sent yet
    offsets: TextOffsets


class CompletionEndpoint(OpenAIEndpoint):
    async def create(self, body: CompletionRequest, request: Request) -> Response:
        """Generate for a text, or for each of a list. Choices are in order of prompts, ``n`` of each in turn."""
        serving = self._serving
        serving.check_model(body.model)
        serving.check_tokenizer()
        with request_names({}):
            num_prompts = len(_prompts(body))
        with serving.admission(num_prompts * (body.n or 1), "prompt" if num_prompts > 1 else "n"):
            completions = await self._completions(body)
            echoes = self._echoes(body, completions)
            call = serving.start(completions)
        head = self._head(body, "cmpl", "text_completion")
        if body.stream:
            return EventStream(call, self._events(call, body, head, echoes))
        with call:
            if not await unless_disconnected(request.receive, call.wait()):
                return disconnected_response()
        check_not_failed(completions)
        choices = [
            self._choice(body, i, item, self._initial_state(item, echoes[i]), item.text, item.logprobs)
            for i, item in enumerate(completions)
        ]
        return JSON({**head, "choices": choices, "usage": usage(completions, body.n or 1)})

    async def _completions(self, body: CompletionRequest) -> list[Completion]:
        prompts = _prompts(body)
        completions: list[Completion] = []
        for i, prompt in enumerate(prompts):
            if i:
                await asyncio.sleep(0)  # let other requests run
            with request_names(NAMES | body.grammar_names):
                try:
                    completions += await self._of_prompt(body, prompt, _rid(body, i, len(prompts)))
                except InvalidRequest as error:
                    if len(prompts) == 1:
                        raise
                    raise type(error)(f"prompt {i}: {error}", error.param) from None
        return completions

    async def _of_prompt(self, body: CompletionRequest, prompt: str | list[int], rid: str | None) -> list[Completion]:
        ids = prompt if isinstance(prompt, list) else await self._encode(body, prompt)
        wants_logprobs = body.logprobs is not None
        item = Prompt(
            input_ids=ids,
            sampling_params=self._sampling_params(body, body.max_tokens),
            default_max_new_tokens=DEFAULT_MAX_TOKENS,
            options={
                **options_of(body),
                "rid": rid,
                "return_logprob": wants_logprobs,
                "logprob_start_len": 0 if wants_logprobs and body.echo else None,
                "top_logprobs_num": body.logprobs or 0,
            },
        )
        return [self._serving.manager.completion(request) for request in await self._serving.requests(item)]

    async def _encode(self, body: CompletionRequest, prompt: str) -> list[int]:
        return await self._serving.encode(prompt, add_special_tokens=body.add_special_tokens is not False)

    def _echoes(self, body: CompletionRequest, completions: list[Completion]) -> list[str | None]:
        """Return for each choice the text to put before it."""
        if not body.echo:
            return [None] * len(completions)
        n = body.n or 1
        prompts = _prompts(body)
        texts = [p if isinstance(p, str) else self._serving.manager.decode(p) for p in prompts]
        return [text for text in texts for _ in range(n)]

    def _choice(
        self,
        body: CompletionRequest,
        i: int,
        completion: Completion,
        state: ChoiceState,
        text: str,
        logprobs: Sequence[TokenLogprob],
    ) -> CompletionChoice:
        """Return a choice with its new ``text`` and ``logprobs``, after the echo if that has not been sent yet."""
        echo, state.echo = state.echo, None
        logprob_lists = None
        if body.logprobs is not None:
            items, offsets, first_id = list(logprobs), [], None
            if echo is not None:
                first_id = completion.request.prompt_ids[0]
                items = [*completion.prompt_logprobs, *logprobs]
                offsets = prompt_offsets(self.token_texts, completion.request.prompt_ids, echo)
                state.offsets.add_text(echo)
            offsets += [state.offsets.add(item.token_id) for item in logprobs]
            logprob_lists = completion_logprobs(self.token_texts, items, offsets, first_id)
        text = (echo or "") + text
        return {"index": i, "text": text, "logprobs": logprob_lists, "finish_reason": finish_reason(completion)}

    def _initial_state(self, completion: Completion, echo: str | None) -> ChoiceState:
        skips = completion.request.spec.params.skip_special_tokens
        return ChoiceState(echo, TextOffsets(self.token_texts, skips))

    async def _events(
        self, call: LiveCall, body: CompletionRequest, head: dict[str, Any], echoes: list[str | None]
    ) -> AsyncGenerator[bytes, None]:
        stream_usage = StreamUsage(body, call.completions, body.n or 1)
        states = [self._initial_state(item, echo) for item, echo in zip(call.completions, echoes, strict=True)]
        async with error_event() as failure:
            async for i, delta in call.deltas():
                completion = call.completions[i]
                check_not_failed([completion])
                if delta.text or (body.logprobs is not None and delta.logprobs) or states[i].echo is not None:
                    choice = self._choice(body, i, completion, states[i], delta.text, delta.logprobs)
                    yield event({**head, "choices": [{**choice, "finish_reason": None}], **stream_usage.chunk_fields()})
                if completion.finished:
                    yield event({**head, "choices": [_finish(i, completion)], **stream_usage.chunk_fields()})
            if stream_usage.at_end:
                yield event({**head, "choices": [], "usage": stream_usage.current()})
        if failure.body is not None:
            yield event(failure.body)


def _finish(i: int, completion: Completion) -> CompletionChoice:
    return {"index": i, "text": "", "logprobs": None, "finish_reason": finish_reason(completion)}


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt is empty: there must be at least one token to continue", "prompt")
    if isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)  # type: ignore[arg-type]


def _rid(body: CompletionRequest, i: int, num_prompts: int) -> str | None:
    return body.rid if body.rid is None or num_prompts == 1 else f"{body.rid}-{i}"
