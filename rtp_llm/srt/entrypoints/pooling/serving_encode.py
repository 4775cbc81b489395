"""POST /encode: vectors or rewards, in SGLang's form."""

from typing import Any, Self

from fastapi import Request
from pydantic import Field, model_validator
from starlette.responses import Response

from rtp_llm.srt.entrypoints.asgi import JSON
from rtp_llm.srt.entrypoints.neutral import GENERATE
from rtp_llm.srt.entrypoints.openai.base import disconnected_response
from rtp_llm.srt.entrypoints.openai.protocol import Body, Name, Salt, TokenIds
from rtp_llm.srt.entrypoints.pooled import PooledEndpoint, first_task, numbers_or_base64, outputs_of, texts_or_ids
from rtp_llm.srt.entrypoints.serving import request_names
from rtp_llm.srt.sampling_params import InvalidRequest


class EncodeRequest(Body):
    unsupported = {**GENERATE, "sampling_params": (), "image_data": (), "video_data": (), "audio_data": ()}

    text: str | list[str] | None = Field(None, description="a text, or a list; at most --max-sequences-per-request")
    input_ids: TokenIds | list[TokenIds] | None = Field(None, description="instead of text: ids, or lists of them")
    dimensions: int | None = Field(None, ge=1, description="of each vector its first so many components")
    rid: Name | list[Name] | None = Field(None, description="for /abort_request; of several inputs a list")
    cache_salt: Salt | None = Field(None, description="extension: share cached prefixes only with equal salts")
    priority: int | None = Field(None, description="extension: lower is earlier; with --schedule-policy priority")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.text is None) == (self.input_ids is None):
            raise InvalidRequest("give either text or input_ids, and not both", "text")
        return self


class EncodeEndpoint(PooledEndpoint):
    async def create(self, body: EncodeRequest, request: Request) -> Response:
        """Make the model's vector, reward or other main output of one input, or of each of a list: then a list."""
        param, given = ("text", body.text) if body.input_ids is None else ("input_ids", body.input_ids)
        with request_names({}):
            inputs = texts_or_ids(given, param)
        is_list = isinstance(given, list) and not (given and isinstance(given[0], int))
        options: dict[str, Any] = {
            "dimensions": body.dimensions,
            "cache_salt": body.cache_salt,
            "priority": body.priority,
        }
        task = first_task(self._serving.manager.outputs)
        prompts = self.prompts(task, inputs, options, None)
        for prompt, rid in zip(prompts, _rids(body.rid, len(inputs)), strict=True):
            prompt.options["rid"] = rid
        completions = await self.pool(request, prompts, param)
        if completions is None:
            return disconnected_response()
        results = [
            {"embedding": numbers_or_base64(output, None), "meta_info": completion.result()["meta_info"]}
            for output, completion in zip(outputs_of(completions), completions, strict=True)
        ]
        return JSON(results if is_list else results[0])


def _rids(given: str | list[str] | None, count: int) -> list[str | None]:
    """Return a name for each input."""
    if given is None:
        return [None] * count
    names = [given] if isinstance(given, str) else given
    if len(names) != count:
        raise InvalidRequest(f"rid must be a list of {count} names for {count} inputs", "rid")
    return list(names)
