"""POST /completion and /infill, in the form of llama.cpp."""

from collections.abc import AsyncGenerator, Sequence
from uuid import uuid4

from fastapi import Request
from starlette.responses import Response

from rtp_llm.srt.entrypoints.asgi import JSON, EventStream, event, unless_disconnected
from rtp_llm.srt.entrypoints.errors import ApiError, error_event
from rtp_llm.srt.entrypoints.frontend import LiveCall
from rtp_llm.srt.entrypoints.llama_cpp.infill import Filler, FillTokens, fill_prompt
from rtp_llm.srt.entrypoints.llama_cpp.protocol import (
    CompletionOptions,
    InfillRequest,
    LlamaCompletionRequest,
    Pieces,
    PromptObject,
)
from rtp_llm.srt.entrypoints.llama_cpp.written import CompletionWriter
from rtp_llm.srt.entrypoints.openai.base import disconnected_response
from rtp_llm.srt.entrypoints.openai.logprobs import TokenTexts
from rtp_llm.srt.entrypoints.serving import Serving, check_not_failed, request_names
from rtp_llm.srt.managers.detokenizer import Completion
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.sampling_params import SamplingParams, token_ids

NEVER = -1e9  # added to the logit of a token that is not to come
# Engine's name of a field -> the request's.
NAMES = {
    "input_ids": "prompt",
    "max_new_tokens": "n_predict",
    "repetition_penalty": "repeat_penalty",
    "ebnf": "grammar",
    "top_logprobs_num": "n_probs",
}


class LlamaCompletions:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._token_texts: TokenTexts | None = None
        self._filler: Filler | None = None

    async def complete(self, body: LlamaCompletionRequest, request: Request) -> Response:
        """Generate for a text, token ids, or each of a list. Without ``n_predict`` a text may fill the context."""
        self._serving.check_tokenizer()
        with request_names({}):
            prompts = body.prompts()
        num_prompts = len(prompts)
        with self._serving.admission(num_prompts * (body.n_cmpl or 1), "prompt" if num_prompts > 1 else "n_cmpl"):
            with request_names(NAMES):
                params = await self._params(body)
                ids = [await self._prompt_ids(prompt) for prompt in prompts]
                completions = await self._completions(body, ids, params)
            call = self._serving.start(completions)
        is_list = isinstance(body.prompt, list) and body.prompt is not prompts[0]
        return await self._answer(body, call, is_list or len(completions) > 1, request)

    async def infill(self, body: InfillRequest, request: Request) -> Response:
        """Generate what stands between a prefix and a suffix, if the model has learned to."""
        self._serving.check_tokenizer()
        filler, tokens = self._fill_tokens()
        prefix = body.input_prefix + (body.prompt or "")
        extras = [(extra.filename, extra.text) for extra in body.input_extra or ()]
        num_chars = len(prefix) + len(body.input_suffix) + sum(len(name) + len(text) for name, text in extras)
        with self._serving.admission(body.n_cmpl or 1, "n_cmpl"):
            with request_names(NAMES | {"prompt": "input_prefix"}):
                params = await self._params(body)
                params.stop_token_ids = tokens.ends
                filled = await self._serving.off_loop(
                    num_chars, lambda: fill_prompt(tokens, filler.encode, prefix, body.input_suffix, extras)
                )
                completions = await self._completions(body, [[*filler.beginning, *filled]], params)
            call = self._serving.start(completions)
        return await self._answer(body, call, len(completions) > 1, request)

    def _fill_tokens(self) -> tuple[Filler, FillTokens]:
        if self._filler is None:
            self._filler = Filler(self._serving.manager)
        if self._filler.tokens is None:
            raise ApiError(
                400, "the model's tokenizer has no tokens for filling in: it has not learned to", code="not_supported"
            )
        return self._filler, self._filler.tokens

    async def _params(self, body: CompletionOptions) -> SamplingParams:
        params = SamplingParams.from_dict(self._serving.sampling_defaults | body.params)
        given = body.logit_bias or {}
        for key, bias in given.items() if isinstance(given, dict) else given:
            for token_id in await self._biased(key, from_object=isinstance(given, dict)):
                added = NEVER if bias is False else bias
                params.logit_bias[token_id] = params.logit_bias.get(token_id, 0.0) + added
        return params

    async def _biased(self, key: int | str, from_object: bool) -> list[int]:
        """Return the ids that a key of ``logit_bias`` names: an object's is a text unless it is a number."""
        if isinstance(key, int):
            return [key]
        if from_object and key.isascii() and key.isdigit():
            return token_ids("logit_bias", [int(key[:20])])
        return await self._serving.encode(key, add_special_tokens=False)

    async def _prompt_ids(self, prompt: str | PromptObject | Pieces) -> list[int]:
        text = prompt.prompt_string if isinstance(prompt, PromptObject) else prompt
        if isinstance(text, str):
            return await self._serving.encode(text, add_special_tokens=True)
        ids: list[int] = []
        for i, item in enumerate(text):
            ids += [item] if isinstance(item, int) else await self._serving.encode(item, add_special_tokens=i == 0)
        return ids

    async def _completions(
        self, body: CompletionOptions, prompts: Sequence[list[int]], params: SamplingParams
    ) -> list[Completion]:
        completions = []
        for ids in prompts:
            prompt = Prompt(
                input_ids=ids,
                sampling_params=params,
                default_max_new_tokens=None,
                options={
                    "return_logprob": bool(body.n_probs),
                    "top_logprobs_num": body.n_probs or 0,
                    "cache_salt": uuid4().hex if body.cache_prompt is False else None,
                },
            )
            requests = await self._serving.requests(prompt)
            completions += [self._serving.manager.completion(request) for request in requests]
        return completions

    async def _answer(self, body: CompletionOptions, call: LiveCall, many: bool, request: Request) -> Response:
        if self._token_texts is None:
            self._token_texts = TokenTexts(self._serving.manager.tokenizer)
        writers = [
            CompletionWriter(self._serving, body, i, completion, self._token_texts)
            for i, completion in enumerate(call.completions)
        ]
        if body.stream:
            return EventStream(call, _events(call, writers), end=b"")
        with call:
            if not await unless_disconnected(request.receive, call.wait()):
                return disconnected_response()
        check_not_failed(call.completions)
        answers = [
            writer.whole(item.text, item.output_ids) for writer, item in zip(writers, call.completions, strict=True)
        ]
        return JSON(answers if many else answers[0])


async def _events(call: LiveCall, writers: Sequence[CompletionWriter]) -> AsyncGenerator[bytes, None]:
    """Yield parts of the completions, each with ``stop`` false, and for each its end, with ``stop`` true."""
    async with error_event() as failure:
        async for i, delta in call.deltas():
            completion = call.completions[i]
            check_not_failed([completion])
            if delta.text or delta.token_ids:
                yield event(writers[i].part(delta))
            if completion.finished:
                yield event(writers[i].whole("", []))
    if failure.body is not None:
        yield event(failure.body)
