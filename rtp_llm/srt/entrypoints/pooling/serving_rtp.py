"""POST /v1/embeddings/sparse, /colbert and /similarity, in RTP-LLM's form (/v1/embeddings/dense is /v1/embeddings)."""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.asgi import JSON
from rtp_llm.srt.entrypoints.errors import ApiError
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
from rtp_llm.srt.managers.pooled import PooledCompletion
from rtp_llm.srt.managers.scoring import cosine, overlap, weights_of

SPARSE, TOKENS, DENSE = "sparse", "token_embed", "embed"
OBJECTS = {SPARSE: "sparse_embedding", TOKENS: "colbert_embedding"}
MAX_COMPARED = 1 << 24  # numbers of one comparison: pairs times components
Weights = dict[str, float]


class VectorsRequest(PooledBody):
    input: str | TokenIds | list[str | TokenIds] = Field(
        description="a text, token ids, or a list of these; at most --max-sequences-per-request"
    )
    add_special_tokens: bool | None = Field(None, description="extension: those around a text; unset: true")


class SparseRequest(VectorsRequest):
    return_decoded: bool | None = Field(None, description="true or unset: by tokens' texts; false: by their ids")


class SimilarityRequest(PooledBody):
    left: list[str] = Field(min_length=1, description="texts to compare with each of right")
    right: list[str] = Field(min_length=1, description="texts; with left, at most --max-sequences-per-request")
    return_response: bool | None = Field(None, description="true: the answer holds the vectors, too")


class VectorItem(TypedDict):
    object: str
    index: int
    embedding: Any


class VectorList(TypedDict):
    object: str
    data: list[VectorItem]
    model: str
    usage: PooledUsage


class Similarities(TypedDict, total=False):
    model: str
    similarity: list[list[float]]
    left_response: VectorList
    right_response: VectorList


class RtpEndpoints(PooledEndpoint):
    async def sparse(self, body: SparseRequest, request: Request) -> Response:
        """Return the weight of each token that has one, for lexical matching: of the input's own, the largest of a
        token's (BGE-M3), or of the vocabulary (SPLADE)."""
        completions = await self._completions_of(SPARSE, body, request)
        if completions is None:
            return disconnected_response()
        is_decoded = body.return_decoded is not False
        num_bytes = sum(len(output.data) for output in outputs_of(completions))
        weights = await self._serving.off_loop(
            num_bytes, lambda: [self._weights(completion, is_decoded) for completion in completions]
        )
        return JSON(self._list(OBJECTS[SPARSE], weights, completions))

    async def colbert(self, body: VectorsRequest, request: Request) -> Response:
        """Return a vector for each token."""
        completions = await self._completions_of(TOKENS, body, request)
        if completions is None:
            return disconnected_response()
        vectors = [numbers_or_base64(output, None) for output in outputs_of(completions)]
        return JSON(self._list(OBJECTS[TOKENS], vectors, completions))

    async def similarity(self, body: SimilarityRequest, request: Request) -> Response:
        """Compare each text of the left with each of the right: by the cosine of vectors, or by the weights of equal
        tokens where the model has no vectors of whole texts."""
        serving = self._serving
        serving.check_model(body.model)
        outputs = serving.manager.outputs
        task = SPARSE if outputs.find(DENSE) is None and outputs.find(SPARSE) is not None else DENSE
        inputs: list[str | list[int]] = [*body.left, *body.right]
        width = 1 if (found := outputs.find(task)) is None else found.width
        if len(body.left) * len(body.right) * width > MAX_COMPARED:
            raise ApiError(
                400,
                f"{len(body.left)} times {len(body.right)} vectors of {width} components are more than the "
                f"{MAX_COMPARED} numbers that one request may compare: send several, or compare the vectors of "
                "/v1/embeddings",
                "left",
            )
        options = body.shared_options() | ({"normalize": True} if task == DENSE else {})
        completions = await self.pool(request, self.prompts(task, inputs, options, body.rid), "left")
        if completions is None:
            return disconnected_response()
        count = len(body.left)
        compare: Callable[[Any, Any], float] = cosine if task == DENSE else overlap
        kind = "embedding" if task == DENSE else OBJECTS[SPARSE]
        vectors: list[Any] = await serving.off_loop(
            len(completions) * width,
            lambda: [_numbers(item) if task == DENSE else self._weights(item, False) for item in completions],
        )
        answer: Similarities = {
            "model": serving.model_name,
            "similarity": await serving.off_loop(
                count * (len(vectors) - count) * width, lambda: _table(vectors[:count], vectors[count:], compare)
            ),
        }
        if body.return_response:
            shown = [vector if isinstance(vector, dict) else vector.tolist() for vector in vectors]
            answer["left_response"] = self._list(kind, shown[:count], completions[:count])
            answer["right_response"] = self._list(kind, shown[count:], completions[count:])
        return JSON(answer)

    async def _completions_of(self, task: str, body: VectorsRequest, request: Request) -> list[PooledCompletion] | None:
        self._serving.check_model(body.model)
        with request_names({}):
            inputs = texts_or_ids(body.input, "input")
        options = body.shared_options() | {"add_special_tokens": body.add_special_tokens}
        return await self.pool(request, self.prompts(task, inputs, options, body.rid), "input")

    def _weights(self, completion: PooledCompletion, is_decoded: bool) -> Weights:
        """Return the weights of tokens that have one, without special ones of the input."""
        manager = self._serving.manager
        largest = weights_of(completion, self._requests.special_ids)
        if not is_decoded or manager.tokenizer is None:
            return {str(token): weight for token, weight in largest.items()}
        return {manager.decode([token]): weight for token, weight in largest.items()}

    def _list(self, kind: str, values: Sequence[Any], completions: Sequence[PooledCompletion]) -> VectorList:
        return {
            "object": "list",
            "data": [{"object": kind, "index": i, "embedding": value} for i, value in enumerate(values)],
            "model": self._serving.model_name,
            "usage": usage(completions),
        }


def _numbers(completion: PooledCompletion) -> Any:
    assert completion.output is not None
    return completion.output.numbers()


def _table(left: Sequence[Any], right: Sequence[Any], compare: Callable[[Any, Any], float]) -> list[list[float]]:
    return [[compare(a, b) for b in right] for a in left]
