"""POST /pooling: any pooled output that the model has, in vLLM's form."""

import time
from typing import Literal
from uuid import uuid4

from fastapi import Request
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.asgi import JSON
from rtp_llm.srt.entrypoints.openai.base import disconnected_response
from rtp_llm.srt.entrypoints.openai.protocol import Name, TokenIds
from rtp_llm.srt.entrypoints.pooled import (
    PooledEndpoint,
    PooledUsage,
    first_task,
    numbers_or_base64,
    outputs_of,
    texts_or_ids,
    usage,
)
from rtp_llm.srt.entrypoints.pooled_body import UsesActivation
from rtp_llm.srt.entrypoints.serving import request_names

NAMES = {"normalize": "use_activation"}  # of the engine's options -> of the body's fields


class PoolingRequest(UsesActivation):
    input: str | TokenIds | list[str | TokenIds] = Field(
        description="a text, token ids, or a list of these; at most --max-sequences-per-request"
    )
    task: Name | None = Field(None, description="one of tasks in /model_info; unset: the model's main one")
    dimensions: int | None = Field(None, ge=1, description="of each vector its first so many components")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float: lists of numbers; base64: of the bytes of float32, little endian, line after line"
    )
    add_special_tokens: bool | None = Field(None, description="extension: those around a text; unset: true")


class Pooled(TypedDict):
    index: int
    object: Literal["pooling"]
    data: list[float] | list[list[float]] | str


class PooledList(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Pooled]
    usage: PooledUsage


class PoolingEndpoint(PooledEndpoint):
    async def create(self, body: PoolingRequest, request: Request) -> Response:
        """Make a pooled output of a text, or of each of a list. One of tokens has a line for each token."""
        serving = self._serving
        serving.check_model(body.model)
        task = body.task or first_task(serving.manager.outputs)
        with request_names({}):
            self._requests.check_task(task, body.dimensions, "model" if body.task is None else "task")
            inputs = texts_or_ids(body.input, "input")
        options = body.shared_options() | {
            "normalize": body.use_activation,
            "dimensions": body.dimensions,
            "add_special_tokens": body.add_special_tokens,
        }
        prompts = self.prompts(task, inputs, options, body.rid)
        completions = await self.pool(request, prompts, "input", NAMES)
        if completions is None:
            return disconnected_response()
        answer: PooledList = {
            "id": f"pool-{body.rid or uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": serving.model_name,
            "data": [
                {"index": i, "object": "pooling", "data": numbers_or_base64(output, body.encoding_format)}
                for i, output in enumerate(outputs_of(completions))
            ],
            "usage": usage(completions),
        }
        return JSON(answer)
