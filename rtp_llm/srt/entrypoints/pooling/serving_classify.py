"""POST /classify: the probabilities of a classifier's labels, in vLLM's form."""

import time
from typing import Literal
from uuid import uuid4

from fastapi import Request
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.asgi import JSON
from rtp_llm.srt.entrypoints.openai.base import disconnected_response
from rtp_llm.srt.entrypoints.openai.protocol import TokenIds
from rtp_llm.srt.entrypoints.pooled import PooledEndpoint, PooledUsage, outputs_of, texts_or_ids, usage
from rtp_llm.srt.entrypoints.pooled_body import UsesActivation
from rtp_llm.srt.entrypoints.serving import request_names
from rtp_llm.srt.managers.scoring import classified, labels_of

NAMES = {"normalize": "use_activation"}  # of the engine's options -> of the body's fields


class ClassificationRequest(UsesActivation):
    input: str | TokenIds | list[str | TokenIds] = Field(
        description="a text, token ids, or a list of these; at most --max-sequences-per-request"
    )
    add_special_tokens: bool | None = Field(None, description="extension: those around a text; unset: true")


class Classification(TypedDict):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassificationList(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classification]
    usage: PooledUsage


class ClassifyEndpoint(PooledEndpoint):
    async def create(self, body: ClassificationRequest, request: Request) -> Response:
        """Classify a text, or each of a list: its most probable label, and the probability of each."""
        serving = self._serving
        serving.check_model(body.model)
        with request_names({}):
            inputs = texts_or_ids(body.input, "input")
        options = body.shared_options() | {
            "normalize": body.use_activation,
            "add_special_tokens": body.add_special_tokens,
        }
        prompts = self.prompts("classify", inputs, options, body.rid)
        completions = await self.pool(request, prompts, "input", NAMES)
        if completions is None:
            return disconnected_response()
        outputs = outputs_of(completions)
        labels = labels_of(serving.model_config.hf_config, outputs[0].shape[-1])
        answer: ClassificationList = {
            "id": f"classify-{body.rid or uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": serving.model_name,
            "data": [
                {"index": i, **classified(output, labels)}  # type: ignore[typeddict-item]
                for i, output in enumerate(outputs)
            ],
            "usage": usage(completions),
        }
        return JSON(answer)
