"""What all endpoints of pooled outputs share: from inputs to outputs, with the limits and errors of all endpoints.

An endpoint reads its body, asks ``PooledEndpoint.pool`` for the outputs of its inputs, and writes its answer.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request

from rtp_llm.srt.entrypoints.asgi import unless_disconnected
from rtp_llm.srt.entrypoints.serving import Serving, check_not_failed, request_names
from rtp_llm.srt.managers.pooled import PooledCompletion, PooledRequests, PoolingPrompt
from rtp_llm.srt.pooling import PooledOutput
from rtp_llm.srt.sampling_params import InvalidRequest


class PooledEndpoint:
    """Base of endpoints that answer with pooled outputs."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._requests = PooledRequests(serving.manager, serving.model_config.sentence_transformer)

    async def pool(
        self,
        request: Request,
        prompts: Sequence[PoolingPrompt],
        param: str,
        names: Mapping[str, str] | None = None,
    ) -> list[PooledCompletion] | None:
        """Return the finished completions of the inputs, in order; None if the client has gone.

        Args:
            param: the field of the body that has the inputs, for errors.
            names: of the engine's options -> of the body's fields, for errors.

        Raises:
            ApiError: an input is wrong (400), there are too many, or the server is busy (503).
        """
        serving = self._serving
        with request_names({"prompt": param, "input_ids": param, **(names or {})}):
            for task, dimensions in {(prompt.task, prompt.options.get("dimensions")) for prompt in prompts}:
                self._requests.check_task(task, dimensions)
        with serving.admission(len(prompts), param):
            completions = await self._completions(prompts, {"prompt": param, "input_ids": param, **(names or {})})
            call = serving.start(list(completions))
        with call:
            if not await unless_disconnected(request.receive, call.wait()):
                return None
        check_not_failed(completions)
        return completions

    async def _completions(self, prompts: Sequence[PoolingPrompt], names: Mapping[str, str]) -> list[PooledCompletion]:
        completions: list[PooledCompletion] = []
        for i, prompt in enumerate(prompts):
            if i % 16 == 15:
                await asyncio.sleep(0)  # let other requests run
            with request_names(names):
                try:
                    completions.append(await self._completion(prompt))
                except InvalidRequest as error:
                    if len(prompts) == 1:
                        raise
                    raise type(error)(f"input {i}: {error}", error.param) from None
        return completions

    async def _completion(self, prompt: PoolingPrompt) -> PooledCompletion:
        num_chars = len(prompt.text) if isinstance(prompt.text, str) else 0
        return await self._serving.off_loop(num_chars, lambda: self._requests.completion(prompt))


def outputs_of(completions: Sequence[PooledCompletion]) -> list[PooledOutput]:
    """Return the outputs of completions that have not failed."""
    return [completion.output for completion in completions if completion.output is not None]


def usage(completions: Sequence[PooledCompletion]) -> dict[str, int]:
    """Return the usage of a request without generated text."""
    num_tokens = sum(completion.prompt_tokens for completion in completions)
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def texts_or_ids(value: Any, param: str) -> list[str | list[int]]:
    """Return the inputs of a field that takes a text, ids, or a list of either.

    Raises:
        InvalidRequest: it is empty.
    """
    if isinstance(value, str):
        return [value]
    if not value:
        raise InvalidRequest(f"{param} is empty: there must be at least one input", param)
    return [value] if isinstance(value[0], int) else list(value)
