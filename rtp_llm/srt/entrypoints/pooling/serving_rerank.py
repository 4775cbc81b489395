"""POST /v1/rerank and /v2/rerank: documents sorted by how well they fit a query, in the form of Jina's and Cohere's
APIs; /v1/rerank also as SGLang answers (--rerank-format sglang)."""

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any, NotRequired
from uuid import uuid4

from fastapi import Request
from pydantic import ConfigDict, Field
from starlette.responses import Response
from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.asgi import JSON
from rtp_llm.srt.entrypoints.openai.base import disconnected_response
from rtp_llm.srt.entrypoints.openai.protocol import Body
from rtp_llm.srt.entrypoints.pooled import ENCODED_TOGETHER, PooledEndpoint, PooledUsage, usage
from rtp_llm.srt.entrypoints.pooled_body import UNSUPPORTED, TakesInstruction, UsesActivation
from rtp_llm.srt.entrypoints.serving import request_names
from rtp_llm.srt.managers.pooled import PooledCompletion
from rtp_llm.srt.managers.scoring import Sides, first_tokens, ranked

NAMES = {"normalize": "use_activation"}  # of the engine's options -> of the body's fields
SGLANG = "sglang"


class Document(Body):
    """A text with whatever else a client keeps of it, which the answer holds, too."""

    model_config = ConfigDict(extra="allow", strict=True)
    unsupported = {"image": ()}

    text: str


class RerankRequest(UsesActivation, TakesInstruction):
    unsupported = {**UNSUPPORTED, "rank_fields": (["text"],), "max_chunks_per_doc": ()}

    query: str | Document = Field(description='what is looked for: a text, or {"text"}')
    documents: list[str | Document] = Field(
        min_length=1,
        description='texts, or objects with a "text", to sort; at most --max-sequences-per-request',
    )
    top_n: int | None = Field(None, ge=0, description="answer with so many of the best; unset or 0: with all")
    return_documents: bool | None = Field(
        None, description="the answer holds the documents' texts; unset: of /v1/rerank it does, of /v2/rerank not"
    )

    max_tokens_per_doc: int | None = Field(
        None, ge=0, description="read so many tokens of each document, without special ones; unset or 0: all"
    )

    def sides(self) -> Sides:
        return Sides([_text(self.query)], [_text(item) for item in self.documents], ("query", "documents"), True)


class RerankResult(TypedDict):
    index: int
    relevance_score: float
    document: NotRequired[dict[str, Any]]


class Ranking(TypedDict):
    id: str
    model: str
    results: list[RerankResult]
    usage: PooledUsage


class RerankEndpoint(PooledEndpoint):
    async def create(self, body: RerankRequest, request: Request) -> Response:
        """Sort documents by how well they fit a query."""
        return await self._answer(body, request, body.return_documents is not False)

    async def create_v2(self, body: RerankRequest, request: Request) -> Response:
        """Sort documents by how well they fit a query; without their texts."""
        return await self._answer(body, request, body.return_documents is True)

    async def _answer(self, body: RerankRequest, request: Request, with_texts: bool) -> Response:
        serving = self._serving
        serving.check_model(body.model)
        sides = await self._cut(body.sides(), body.max_tokens_per_doc)
        options = body.shared_options() | {"normalize": body.use_activation, "rid": body.rid}
        found = await self.score(request, sides, options, NAMES, body.score_by)
        if found is None:
            return disconnected_response()
        scores, completions = found
        order = ranked(scores, body.top_n or None)
        shown_documents = [_shown(item) for item in body.documents] if with_texts else None
        if serving.args.rerank_format == SGLANG and not request.url.path.startswith("/v2"):
            return JSON(_list(order, shown_documents, completions[-len(scores) :]))
        results: list[RerankResult] = []
        for index, score in order:
            result: RerankResult = {"index": index, "relevance_score": score}
            if shown_documents is not None:
                result["document"] = shown_documents[index]
            results.append(result)
        ranking: Ranking = {
            "id": f"rerank-{body.rid or uuid4().hex}",
            "model": serving.model_name,
            "results": results,
            "usage": usage(completions),
        }
        return JSON(ranking)

    async def _cut(self, sides: Sides, max_tokens: int | None) -> Sides:
        """Return the texts, of the right ones no more than so many tokens of each; all for None and 0."""
        serving = self._serving
        if not max_tokens or len(sides.right) > serving.args.max_sequences_per_request:  # an error that comes later
            return sides
        cut = []
        for i, text in enumerate(sides.right):
            if i and i % ENCODED_TOGETHER == 0:
                await asyncio.sleep(0)  # let other requests run
            with request_names({"prompt": "documents"}):
                cut.append(await serving.off_loop(len(text), partial(first_tokens, self._requests, text, max_tokens)))
        return replace(sides, right=cut)


def _list(order: list[tuple[int, float]], documents: Any, completions: list[PooledCompletion]) -> list[dict[str, Any]]:
    """Return SGLang's answer: a plain list."""
    return [
        {
            "score": score,
            **({} if documents is None else {"document": documents[index]["text"]}),
            "index": index,
            "meta_info": completions[index].result()["meta_info"],
        }
        for index, score in order
    ]


def _text(value: str | Document) -> str:
    return value if isinstance(value, str) else value.text


def _shown(document: str | Document) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else document.model_dump()
