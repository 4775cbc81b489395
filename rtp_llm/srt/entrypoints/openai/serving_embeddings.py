"""POST /v1/embeddings."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Self

from fastapi import Request
from pydantic import Field, model_validator
from starlette.responses import Response
from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.asgi import JSON, unless_disconnected
from rtp_llm.srt.entrypoints.chat_request import ChatRequest, encoded_chat
from rtp_llm.srt.entrypoints.openai.base import disconnected_response
from rtp_llm.srt.entrypoints.openai.protocol import Message, TokenIds
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
from rtp_llm.srt.managers.pooled import MEDIA
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.sampling_params import InvalidRequest


class EmbeddingRequest(PooledBody):
    input: str | TokenIds | list[str | TokenIds] | None = Field(
        None, description="a text, token ids, or a list of these; at most --max-sequences-per-request"
    )
    messages: list[Message] | None = Field(
        None,
        min_length=1,
        description="extension: in place of input, a conversation that becomes one input by the chat template; with "
        "images and videos, if the model takes them",
    )
    add_generation_prompt: bool | None = Field(None, description="extension: of messages; true: begin an answer")
    continue_final_message: bool | None = Field(None, description="extension: of messages; leave the last one open")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float: lists of numbers; base64: of the bytes of float32, little endian"
    )
    dimensions: int | None = Field(None, ge=1, description="of each vector its first so many components")
    normalize: bool | None = Field(
        None, description="extension: vectors of length one; unset: as the checkpoint has it"
    )
    use_activation: bool | None = Field(None, description="extension: vLLM's name of normalize")
    add_special_tokens: bool | None = Field(None, description="extension: those around a text; unset: true")
    prompt_name: str | None = Field(None, description="extension: of a text of the checkpoint's, put before each input")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.input is None and self.messages is None:
            raise InvalidRequest("input is missing", "input")
        if self.input is not None and self.messages is not None:
            raise InvalidRequest("give either input or messages, and not both", "messages")
        if self.messages is None and (self.add_generation_prompt or self.continue_final_message):
            raise InvalidRequest("add_generation_prompt and continue_final_message are for messages", "messages")
        if self.normalize is not None and self.use_activation is not None:
            raise InvalidRequest("use_activation and normalize mean the same: give one of them", "use_activation")
        return self


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
        """Embed a text, or each of a list, or a conversation. Vectors are in the order of inputs."""
        self._serving.check_model(body.model)
        own = ("dimensions", "add_special_tokens", "prompt_name")
        options = body.shared_options() | {name: getattr(body, name) for name in own}
        options["normalize"] = body.use_activation if body.normalize is None else body.normalize
        if body.messages is None:
            with request_names({}):
                inputs = texts_or_ids(body.input, "input")
            param, prompts = "input", self.prompts("embed", inputs, options, body.rid)
        else:
            encoded = await unless_disconnected(request.receive, self._encoded(body.messages, body))
            if encoded is None:
                return disconnected_response()
            [prompt] = self.prompts("embed", [encoded.input_ids], options, body.rid)
            param, prompts = "messages", [replace(prompt, media=encoded.media)]
        completions = await self.pool(request, prompts, param)
        if completions is None:
            return disconnected_response()
        data: list[Embedding] = [
            {"object": "embedding", "index": i, "embedding": numbers_or_base64(output, body.encoding_format)}
            for i, output in enumerate(outputs_of(completions))
        ]
        return JSON({"object": "list", "data": data, "model": self._serving.model_name, "usage": usage(completions)})

    async def _encoded(self, messages: Sequence[Message], body: EmbeddingRequest) -> Prompt:
        """Return a conversation as ids, with its media placed among them."""
        asked = ChatRequest(
            messages=[message.model_dump(exclude_none=True) for message in messages],
            begins_turn=bool(body.add_generation_prompt),
            continues=bool(body.continue_final_message),
        )
        with request_names({name: "messages" for name in ("input_ids", "prompt", *MEDIA)}):
            self._requests.check_task("embed", body.dimensions)
            if self._serving.template is None:
                raise InvalidRequest("messages need a chat template, which this model lacks: give input", "messages")
            return await encoded_chat(self._serving, asked)
