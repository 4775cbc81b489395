"""POST /v1/embeddings."""

from base64 import b64encode
from typing import Any, Literal

from fastapi import Request
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.asgi import JSON
from rtp_llm.srt.entrypoints.openai.base import disconnected_response
from rtp_llm.srt.entrypoints.openai.protocol import Body, Name, Salt, TokenIds
from rtp_llm.srt.entrypoints.pooled import PooledEndpoint, outputs_of, texts_or_ids, usage
from rtp_llm.srt.entrypoints.serving import request_names
from rtp_llm.srt.managers.pooled import PoolingOptions, PoolingPrompt
from rtp_llm.srt.pooling import PooledOutput

UNSUPPORTED: dict[str, tuple[Any, ...]] = {"messages": (), "lora_path": (), "embed_dtype": ("float32",)}


class EmbeddingRequest(Body):
    unsupported = UNSUPPORTED

    input: str | TokenIds | list[str | TokenIds] = Field(
        description="a text, token ids, or a list of these; at most --max-sequences-per-request"
    )
    model: str | None = Field(None, description="one of /v1/models; may be left out")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float: lists of numbers; base64: of the bytes of float32, little endian"
    )
    dimensions: int | None = Field(None, ge=1, description="of each vector its first so many components")
    user: str | None = Field(None, description="accepted; not used")

    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="extension: cut inputs to so many tokens, -1: to as many as the model takes"
    )
    normalize: bool | None = Field(
        None, description="extension: vectors of length one; unset: as the checkpoint has it"
    )
    add_special_tokens: bool | None = Field(None, description="extension: those around a text; unset: true")
    prompt_name: str | None = Field(None, description="extension: of a text of the checkpoint's, put before each input")
    cache_salt: Salt | None = Field(None, description="extension: share cached prefixes only with equal salts")
    priority: int | None = Field(None, description="extension: lower is earlier; with --schedule-policy priority")
    rid: Name | None = Field(None, description="extension: for /abort_request")


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class EmbeddingsEndpoint(PooledEndpoint):
    async def create(self, body: EmbeddingRequest, request: Request) -> Response:
        """Embed a text, or each of a list. Vectors are in the order of inputs."""
        self._serving.check_model(body.model)
        with request_names({}):
            inputs = texts_or_ids(body.input, "input")
        prompts = [_prompt(body, value, i if len(inputs) > 1 else None) for i, value in enumerate(inputs)]
        completions = await self.pool(request, prompts, "input")
        if completions is None:
            return disconnected_response()
        data: list[Embedding] = [
            {"object": "embedding", "index": i, "embedding": _encoded(output, body.encoding_format)}
            for i, output in enumerate(outputs_of(completions))
        ]
        return JSON({"object": "list", "data": data, "model": self._serving.model_name, "usage": usage(completions)})


def _prompt(body: EmbeddingRequest, value: str | list[int], number: int | None) -> PoolingPrompt:
    """``number``: of the input in a list of several."""
    options: PoolingOptions = {
        "dimensions": body.dimensions,
        "normalize": body.normalize,
        "truncate_prompt_tokens": body.truncate_prompt_tokens,
        "add_special_tokens": body.add_special_tokens,
        "prompt_name": body.prompt_name,
        "cache_salt": body.cache_salt,
        "priority": body.priority,
        "rid": body.rid if body.rid is None or number is None else f"{body.rid}-{number}",
    }
    if isinstance(value, str):
        return PoolingPrompt("embed", text=value, options=options)
    return PoolingPrompt("embed", input_ids=value, options=options)


def _encoded(output: PooledOutput, encoding_format: str | None) -> list[float] | str:
    return b64encode(output.data).decode() if encoding_format == "base64" else output.numbers().tolist()
