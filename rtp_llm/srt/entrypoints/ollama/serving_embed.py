"""POST /api/embed and /api/embeddings."""

import time
from typing import Any

from fastapi import Request
from pydantic import Field, field_validator
from starlette.responses import Response
from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.asgi import JSON
from rtp_llm.srt.entrypoints.ollama import models
from rtp_llm.srt.entrypoints.ollama.options import check_context
from rtp_llm.srt.entrypoints.ollama.protocol import Options, check_keep_alive
from rtp_llm.srt.entrypoints.openai.base import disconnected_response
from rtp_llm.srt.entrypoints.openai.protocol import Body, Finite
from rtp_llm.srt.entrypoints.pooled import PooledEndpoint, numbers_or_base64, outputs_of, usage
from rtp_llm.srt.entrypoints.serving import request_names
from rtp_llm.srt.managers.pooled import PooledCompletion


class VectorsBody(Body):
    """Fields that both share."""

    model: str | None = Field(None, description="one of /api/tags, also without its tag :latest; may be left out")
    options: Options | None = Field(None, description="checked; none of them changes a vector")
    keep_alive: Finite | str | None = Field(None, description="accepted: the model stays as long as the server runs")

    @field_validator("keep_alive", mode="after")
    @classmethod
    def _check_keep_alive(cls, value: float | str | None) -> float | str | None:
        return check_keep_alive(value)


class EmbedBody(VectorsBody):
    input: str | list[str] | None = Field(None, description="a text, or a list; none: the model is loaded anyway")
    truncate: bool | None = Field(None, description="true: longer inputs are cut; otherwise they are an error")
    dimensions: int | None = Field(None, ge=1, description="of each vector its first so many components")


class EmbeddingsBody(VectorsBody):
    prompt: str | None = Field(None, description="a text; none: the model is loaded anyway")


class Embeddings(TypedDict):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OneEmbedding(TypedDict):
    embedding: list[float]


class EmbedEndpoints(PooledEndpoint):
    async def embed(self, body: EmbedBody, request: Request) -> Response:
        """Embed a text, or each of a list, in the form of Ollama's API: vectors of length one. Without any, say that
        the model is loaded."""
        start_s = time.perf_counter()
        inputs = [body.input] if isinstance(body.input, str) and body.input else list(body.input or ())
        cut = -1 if body.truncate else None
        given = {"dimensions": body.dimensions, "truncate_prompt_tokens": cut, "normalize": True}
        completions = await self._vectors(body, request, inputs, "input", given)
        if completions is None:
            return disconnected_response()
        answer: Embeddings = {
            "model": body.model or models.tagged(self._serving.model_name),
            "embeddings": [numbers_or_base64(output, None) for output in outputs_of(completions)],
            "total_duration": round((time.perf_counter() - start_s) * 1e9),
            "load_duration": 0,
            "prompt_eval_count": usage(completions)["prompt_tokens"],
        }
        return JSON(answer)

    async def embeddings(self, body: EmbeddingsBody, request: Request) -> Response:
        """Embed a text, in the older form of Ollama's API."""
        completions = await self._vectors(body, request, [body.prompt] if body.prompt else [], "prompt", {})
        if completions is None:
            return disconnected_response()
        vectors = [numbers_or_base64(output, None) for output in outputs_of(completions)]
        return JSON(OneEmbedding(embedding=vectors[0] if vectors else []))

    async def _vectors(
        self, body: VectorsBody, request: Request, inputs: list[str], param: str, given: dict[str, Any]
    ) -> list[PooledCompletion] | None:
        serving = self._serving
        models.check_name(serving, body.model)
        with request_names({}):
            if body.options is not None:
                check_context(serving, body.options)
            self._requests.check_task("embed")
        if not inputs:
            return []
        return await self.pool(request, self.prompts("embed", [*inputs], given, None), param)
