"""POST /v1/score: how well texts fit each other, in vLLM's form."""

import time
from typing import Any, Literal, Self
from uuid import uuid4

from fastapi import Request
from pydantic import Field, model_validator
from starlette.responses import Response
from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.asgi import JSON
from rtp_llm.srt.entrypoints.openai.base import disconnected_response
from rtp_llm.srt.entrypoints.pooled import PooledEndpoint, PooledUsage, usage
from rtp_llm.srt.entrypoints.pooled_body import UNSUPPORTED, TakesInstruction, UsesActivation
from rtp_llm.srt.managers.scoring import Sides
from rtp_llm.srt.sampling_params import InvalidRequest

NAMES = {"normalize": "use_activation"}  # of the engine's options -> of the body's fields
FORMS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
Texts = str | list[str] | None


class ScoreRequest(UsesActivation, TakesInstruction):
    # The others are SGLang's, for probabilities of chosen tokens.
    unsupported = {**UNSUPPORTED, "query": (), "label_token_ids": (), "apply_softmax": (), "item_first": ()}

    text_1: Texts = Field(None, description="a text to compare with each of text_2, or as many texts")
    text_2: Texts = Field(None, description="a text, or a list; at most --max-sequences-per-request")
    queries: Texts = Field(None, description="another name of text_1")
    documents: Texts = Field(None, description="another name of text_2, with queries")
    items: Texts = Field(None, description="another name of documents")
    data_1: Texts = Field(None, description="another name of text_1")
    data_2: Texts = Field(None, description="another name of text_2, with data_1")

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        given = {name for form in FORMS for name in form if getattr(self, name) is not None}
        if all(given != set(form) for form in FORMS):
            forms = ", ".join(" and ".join(form) for form in FORMS)
            raise InvalidRequest(f"give two fields, one of {forms}; given: {sorted(given) or 'none'}", "text_1")
        return self

    def sides(self) -> Sides:
        names = next(form for form in FORMS if all(getattr(self, name) is not None for name in form))
        first, second = ([value] if isinstance(value := getattr(self, name), str) else value for name in names)
        return Sides(first, second, names, names[0] == "queries")


class Score(TypedDict):
    index: int
    object: Literal["score"]
    score: float


class ScoreList(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: PooledUsage


class ScoreEndpoint(PooledEndpoint):
    async def create(self, body: ScoreRequest, request: Request) -> Response:
        """Score pairs of texts: one with each of several, or each of several with its partner."""
        self._serving.check_model(body.model)
        options: dict[str, Any] = body.shared_options() | {"normalize": body.use_activation, "rid": body.rid}
        found = await self.score(request, body.sides(), options, NAMES, body.score_by)
        if found is None:
            return disconnected_response()
        scores, completions = found
        answer: ScoreList = {
            "id": f"score-{body.rid or uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": self._serving.model_name,
            "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)],
            "usage": usage(completions),
        }
        return JSON(answer)
