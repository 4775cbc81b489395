"""POST /v1/embeddings."""

from typing import Literal

from fastapi import Request
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.asgi import JSON
from rtp_llm.srt.entrypoints.openai.base import disconnected_response
from rtp_llm.srt.entrypoints.openai.protocol import TokenIds
from rtp_llm.srt.entrypoints.pooled import (
    PooledEndpoint,
    PooledUsage,
    numbers_or_base64,
    outputs_of,
    texts_or_ids,
    usage,
)
from rtp_llm.srt.entrypoints.pooled_body import PooledBody
from rtp_llm.srt.entrypoints.serving import request_names


class EmbeddingRequest(PooledBody):
    input: str | TokenIds | list[str | TokenIds] = Field(
        description="a text, token ids, or a list of these; at most --max-sequences-per-request"
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float: lists of numbers; base64: of the bytes of float32, little endian"
    )
    dimensions: int | None = Field(None, ge=1, description="of each vector its first so many components")
    normalize: bool | None = Field(
        None, description="extension: vectors of length one; unset: as the checkpoint has it"
    )
    add_special_tokens: bool | None = Field(None, description="extension: those around a text; unset: true")
    prompt_name: str | None = Field(None, description="extension: of a text of the checkpoint's, put before each input")


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PooledUsage


class EmbeddingsEndpoint(PooledEndpoint):
    async def create(self, body: EmbeddingRequest, request: Request) -> Response:
        """Embed a text, or each of a list. Vectors are in the order of inputs."""
        self._serving.check_model(body.model)
        with request_names({}):
            inputs = texts_or_ids(body.input, "input")
        own = ("dimensions", "normalize", "add_special_tokens", "prompt_name")
        options = body.shared_options() | {name: getattr(body, name) for name in own}
        completions = await self.pool(request, self.prompts("embed", inputs, options, body.rid), "input")
        if completions is None:
            return disconnected_response()
        data: list[Embedding] = [
            {"object": "embedding", "index": i, "embedding": numbers_or_base64(output, body.encoding_format)}
            for i, output in enumerate(outputs_of(completions))
        ]
        return JSON({"object": "list", "data": data, "model": self._serving.model_name, "usage": usage(completions)})
