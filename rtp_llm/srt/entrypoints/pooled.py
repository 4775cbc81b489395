"""What all endpoints of pooled outputs share: from inputs to outputs, with the limits and errors of all endpoints.

An endpoint reads its body, asks ``PooledEndpoint.pool`` for the outputs of its inputs, and writes its answer.
"""

import asyncio
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

from fastapi import Request
from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.asgi import unless_disconnected
from rtp_llm.srt.entrypoints.serving import Serving, check_not_failed, request_names
from rtp_llm.srt.managers.pooled import PooledCompletion, PooledRequests, PoolingOptions, PoolingPrompt
from rtp_llm.srt.managers.scoring import Sides, scoring
from rtp_llm.srt.pooling import PooledOutput, PooledOutputs
from rtp_llm.srt.sampling_params import InvalidRequest

ENCODED_TOGETHER = 32  # inputs, before other requests' turn
WINDOW = 256  # inputs of one request that the core has at once: those of other requests come between


class PooledEndpoint:
    """Base of endpoints that answer with pooled outputs."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._requests = PooledRequests(serving.manager, serving.model_config.sentence_transformer)

    def prompts(
        self, task: str, inputs: Sequence[str | list[int]], options: Mapping[str, Any], rid: str | None
    ) -> list[PoolingPrompt]:
        """Return the prompts of inputs that ask for the same; ``rid``: of the request, to which numbers are added."""
        prompts = []
        for i, value in enumerate(inputs):
            is_one = len(inputs) == 1
            own = cast(PoolingOptions, {**options, "rid": rid if rid is None or is_one else f"{rid}-{i}"})
            text, ids = (value, None) if isinstance(value, str) else (None, value)
            prompts.append(PoolingPrompt(task, text, ids, own, place="" if is_one else f"input {i}"))
        return prompts

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
            call = serving.start(list(completions[:WINDOW]))
        for start in range(0, len(completions), WINDOW):
            window = completions[start : start + WINDOW]
            if start:
                call = serving.start(list(window))
            with call:
                if not await unless_disconnected(request.receive, call.wait()):
                    return None
            check_not_failed(window)
        return completions

    async def score(
        self,
        request: Request,
        sides: Sides,
        options: Mapping[str, Any],
        names: Mapping[str, str],
        score_by: str | None = None,
    ) -> tuple[list[float], list[PooledCompletion]] | None:
        """Return the scores of pairs of texts, and the completions that made them; None if the client has gone.

        Args:
            options, score_by, names: see ``scoring`` and ``pool``.

        Raises:
            ApiError: as in ``pool``; the model scores no texts (400).
        """
        with request_names(names):
            asked = scoring(self._requests, sides, options, score_by)
        completions: list[PooledCompletion] = []
        for prompts in asked.rounds(completions):
            made = await self.pool(request, prompts, sides.names[1], names)
            if made is None:
                return None
            completions += made
        num_bytes = sum(len(output.data) for output in outputs_of(completions))
        return await self._serving.off_loop(num_bytes, lambda: asked.scores(completions)), completions

    async def _completions(self, prompts: Sequence[PoolingPrompt], names: Mapping[str, str]) -> list[PooledCompletion]:
        completions: list[PooledCompletion] = []
        for start in range(0, len(prompts), ENCODED_TOGETHER):
            together = prompts[start : start + ENCODED_TOGETHER]
            if start:
                await asyncio.sleep(0)  # let other requests run
            num_chars = sum(len(prompt.text) for prompt in together if isinstance(prompt.text, str))
            await self._serving.off_loop(num_chars, partial(self._requests.encode_together, together))
            for prompt in together:
                with request_names(names):
                    completions.append(await self._completion(prompt))
        return completions

    async def _completion(self, prompt: PoolingPrompt) -> PooledCompletion:
        num_chars = len(prompt.text) if isinstance(prompt.text, str) and prompt.encoded is None else 0
        return await self._serving.off_loop(num_chars, lambda: self._requests.completion(prompt))


def outputs_of(completions: Sequence[PooledCompletion]) -> list[PooledOutput]:
    """Return the outputs of completions that have not failed."""
    return [completion.output for completion in completions if completion.output is not None]


class PooledUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


def usage(completions: Sequence[PooledCompletion]) -> PooledUsage:
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


def first_task(outputs: PooledOutputs) -> str:
    """Return the name of a model's main output."""
    names = outputs.names or ["embed"]
    return next((name for name in ("embed", "reward") if name in names), names[0])


def numbers_or_base64(output: PooledOutput, encoding_format: str | None) -> Any:
    """Return an output as JSON has it: numbers, or a list of them for each line; or base64 of the bytes of all."""
    if encoding_format == "base64":
        return b64encode(output.data).decode()
    value = output.value()
    return [line.tolist() for line in value] if isinstance(value, list) else value.tolist()
