"""Which path does what, by dialect."""

import re
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry
from starlette.responses import Response

from rtp_llm.srt.entrypoints.anthropic.errors import MessagesErrorBody
from rtp_llm.srt.entrypoints.anthropic.protocol import AnswerMessage, TokensCount
from rtp_llm.srt.entrypoints.anthropic.serving_messages import MessagesEndpoint
from rtp_llm.srt.entrypoints.dialects import ANTHROPIC, COUNT_TOKENS, MESSAGES, OLLAMA, SPOKEN
from rtp_llm.srt.entrypoints.docs_page import docs_page
from rtp_llm.srt.entrypoints.errors import OVERLOADED
from rtp_llm.srt.entrypoints.llama_cpp.protocol import AppliedTemplate, LlamaCompletion, Properties
from rtp_llm.srt.entrypoints.llama_cpp.serving import LlamaCppEndpoints
from rtp_llm.srt.entrypoints.llama_cpp.serving_completions import LlamaCompletions
from rtp_llm.srt.entrypoints.llama_cpp.slots import Slots
from rtp_llm.srt.entrypoints.loads import LoadEndpoints
from rtp_llm.srt.entrypoints.native import Confirmation, NativeEndpoints, Text, Tokens, Version
from rtp_llm.srt.entrypoints.ollama.errors import OllamaErrorBody
from rtp_llm.srt.entrypoints.ollama.protocol import (
    ApiVersion,
    ChatReply,
    GenerateReply,
    LoadedModels,
    Models,
    ShownModel,
)
from rtp_llm.srt.entrypoints.ollama.serving_answers import AnswerEndpoints
from rtp_llm.srt.entrypoints.ollama.serving_embed import Embeddings, EmbedEndpoints, OneEmbedding
from rtp_llm.srt.entrypoints.ollama.serving_models import ModelEndpoints
from rtp_llm.srt.entrypoints.openai.protocol import ChatCompletion, InputTokens, Model, ModelList, TextCompletion
from rtp_llm.srt.entrypoints.openai.responses.protocol import DeletedResponse, ItemList, ResponseObject
from rtp_llm.srt.entrypoints.openai.responses.serving import ResponsesEndpoint
from rtp_llm.srt.entrypoints.openai.serving_chat import ChatEndpoint
from rtp_llm.srt.entrypoints.openai.serving_completions import CompletionEndpoint
from rtp_llm.srt.entrypoints.openai.serving_embeddings import EmbeddingList, EmbeddingsEndpoint
from rtp_llm.srt.entrypoints.pooling.serving_classify import ClassificationList, ClassifyEndpoint
from rtp_llm.srt.entrypoints.pooling.serving_encode import EncodeEndpoint
from rtp_llm.srt.entrypoints.pooling.serving_pooling import PooledList, PoolingEndpoint
from rtp_llm.srt.entrypoints.pooling.serving_rerank import Ranking, RerankEndpoint
from rtp_llm.srt.entrypoints.pooling.serving_rtp import RtpEndpoints, Similarities, VectorList
from rtp_llm.srt.entrypoints.pooling.serving_score import ScoreEndpoint, ScoreList
from rtp_llm.srt.entrypoints.serving import Serving
from rtp_llm.srt.pooling import ONLY_TOKENS, TASKS, PooledOutputs

Handler = Callable[..., Coroutine[Any, Any, Response]]

# Further paths of an endpoint, for clients of other servers.
ALIASES = {
    "/v1/chat/completions": ("/chat/completions",),
    "/v1/chat/completions/input_tokens": ("/chat/completions/input_tokens",),
    "/v1/completions": ("/completions",),
    "/v1/embeddings": ("/embeddings", "/v1/embeddings/dense"),
    "/v1/rerank": ("/rerank",),
    "/v1/score": ("/score",),
    "/classify": ("/v1/classify",),
    "/v1/responses": ("/responses",),
    "/v1/responses/input_tokens": ("/responses/input_tokens",),
    "/v1/models": ("/models",),
    "/tokenize": ("/v1/tokenize",),
    "/detokenize": ("/v1/detokenize",),
    "/health": ("/v1/health", "/ready", "/ping"),
    "/model_info": ("/get_model_info",),
    "/server_info": ("/get_server_info",),
}
# Paths of pooled outputs -> the outputs, one of which a model must have for it.
POOLED_PATHS: dict[str, tuple[str, ...]] = {
    "/v1/embeddings": ("embed",),
    "/v1/rerank": ("score", "embed"),
    "/v2/rerank": ("score", "embed"),
    "/v1/score": ("score", "embed"),
    "/classify": ("classify",),
    "/pooling": tuple(TASKS),
    "/encode": tuple(TASKS),
    "/v1/embeddings/sparse": ("sparse",),
    "/v1/embeddings/colbert": ("token_embed",),
    "/v1/embeddings/similarity": ("embed", "sparse"),
    "/api/embed": ("embed",),
    "/api/embeddings": ("embed",),
}
POOLED_SPOKEN = ("Cohere", "vLLM", "RTP-LLM")  # whose APIs are beside SPOKEN for models with pooled outputs
OF_ANY_MODEL = frozenset(
    {"/v1/models", "/api/tags", "/api/show", "/api/ps", "/api/version", "/props", "/slots", "/tokenize", "/detokenize"}
)  # of the dialects' paths, those that need no output
ERROR_STATUSES = (400, 401, 403, 408, 413, 415, 500, 503)


class Route(NamedTuple):
    """``answer``: the type of a good answer's body, if it is described."""

    path: str
    methods: Sequence[str]
    handler: Handler
    answer: Any
    tag: str


def add_routes(app: FastAPI, serving: Serving, registry: CollectorRegistry, slots: Slots) -> None:
    """Give an application all endpoints.

    Args:
        registry: what /metrics shows.
        slots: observes the requests of ``serving``, for /slots.
    """
    app.add_route("/docs", lambda _: docs_page(app.openapi()), include_in_schema=False)
    native, chat, models = NativeEndpoints(serving, registry), ChatEndpoint(serving), ModelEndpoints(serving)
    for route in (
        *_openai(serving, native, chat),
        *_anthropic(serving),
        *_ollama(serving, models),
        *_llama_cpp(serving, chat, slots),
        *_native(native),
        *_loads(LoadEndpoints(serving)),
        *_pooled(serving),
    ):
        for alias in ALIASES.get(route.path, ()):
            _add_hidden(app, alias, route.methods, route.handler)
        for method in route.methods:
            app.add_api_route(
                route.path,
                route.handler,
                methods=[method],
                response_model=None,
                responses=_responses(route),
                operation_id=re.sub(r"\W+", "_", f"{method.lower()}{route.path}").strip("_"),
                tags=[route.tag],
            )
    for path, methods, handler in _unlisted(models):
        _add_hidden(app, path, methods, handler)


def dialect_lines(app: FastAPI, outputs: PooledOutputs = ONLY_TOKENS) -> list[str]:
    """Return a line for each dialect with its paths that a model with these outputs answers, for the summary at the
    start."""
    paths: dict[str, dict[str, None]] = {tag: {} for tag in (*SPOKEN, *POOLED_SPOKEN)}
    for route in app.routes:
        if isinstance(route, APIRoute) and route.include_in_schema and "{" not in route.path:
            tasks = POOLED_PATHS.get(route.path)
            has_it = outputs.generates if tasks is None else any(outputs.find(task) is not None for task in tasks)
            if has_it or route.path in OF_ANY_MODEL:
                paths.get(str(route.tags[0]), {})[route.path] = None
    found = [f"{tag}: {' '.join(listed)}" for tag, listed in paths.items() if listed]
    return ["  speaks    " + line if i == 0 else "            " + line for i, line in enumerate(found)]


def _openai(serving: Serving, native: NativeEndpoints, chat: ChatEndpoint) -> Iterator[Route]:
    kept, tag = ResponsesEndpoint(serving), "OpenAI"
    yield Route("/v1/chat/completions", ["POST"], chat.create, ChatCompletion, tag)
    yield Route("/v1/completions", ["POST"], CompletionEndpoint(serving).create, TextCompletion, tag)
    yield Route("/v1/embeddings", ["POST"], EmbeddingsEndpoint(serving).create, EmbeddingList, tag)
    yield Route("/v1/responses", ["POST"], kept.create, ResponseObject, tag)
    yield Route("/v1/responses/{response_id}", ["GET"], kept.retrieve, ResponseObject, tag)
    yield Route("/v1/responses/{response_id}", ["DELETE"], kept.delete, DeletedResponse, tag)
    yield Route("/v1/responses/{response_id}/cancel", ["POST"], kept.cancel, ResponseObject, tag)
    yield Route("/v1/responses/{response_id}/input_items", ["GET"], kept.input_items, ItemList, tag)
    yield Route("/v1/responses/input_tokens", ["POST"], kept.count_tokens, InputTokens, tag)
    yield Route("/v1/models", ["GET"], native.models, ModelList, tag)
    yield Route("/v1/models/{model:path}", ["GET"], native.model, Model, tag)


def _anthropic(serving: Serving) -> Iterator[Route]:
    messages = MessagesEndpoint(serving)
    yield Route(MESSAGES, ["POST"], messages.create, AnswerMessage, "Anthropic")
    yield Route(COUNT_TOKENS, ["POST"], messages.count_tokens, TokensCount, "Anthropic")


def _ollama(serving: Serving, models: ModelEndpoints) -> Iterator[Route]:
    answers, tag = AnswerEndpoints(serving), "Ollama"
    yield Route("/api/chat", ["POST"], answers.chat, ChatReply, tag)
    yield Route("/api/generate", ["POST"], answers.generate, GenerateReply, tag)
    embed = EmbedEndpoints(serving)
    yield Route("/api/embed", ["POST"], embed.embed, Embeddings, tag)
    yield Route("/api/embeddings", ["POST"], embed.embeddings, OneEmbedding, tag)
    yield Route("/api/tags", ["GET"], models.tags, Models, tag)
    yield Route("/api/show", ["POST"], models.show, ShownModel, tag)
    yield Route("/api/ps", ["GET"], models.ps, LoadedModels, tag)
    yield Route("/api/version", ["GET"], models.version, ApiVersion, tag)


def _unlisted(models: ModelEndpoints) -> Iterator[tuple[str, Sequence[str], Handler]]:
    """Yield the paths of Ollama's that only say that something is there, or refuse: path, methods, handler."""
    yield "/", ["GET", "HEAD"], models.running
    yield "/api/tags", ["HEAD"], models.tags
    yield "/api/version", ["HEAD"], models.version
    for name in ("pull", "push", "create", "copy"):
        yield f"/api/{name}", ["POST"], models.refuse_changes
    yield "/api/delete", ["DELETE"], models.refuse_changes
    yield "/api/blobs/{digest}", ["POST"], models.refuse_changes


def _llama_cpp(serving: Serving, chat: ChatEndpoint, slots: Slots) -> Iterator[Route]:
    completions, others, tag = LlamaCompletions(serving), LlamaCppEndpoints(serving, chat, slots), "llama.cpp"
    yield Route("/completion", ["POST"], completions.complete, LlamaCompletion, tag)
    yield Route("/infill", ["POST"], completions.infill, LlamaCompletion, tag)
    yield Route("/apply-template", ["POST"], others.apply_template, AppliedTemplate, tag)
    yield Route("/v1/chat/completions/input_tokens", ["POST"], others.count_chat, InputTokens, tag)
    yield Route("/props", ["GET"], others.props, Properties, tag)
    yield Route("/slots", ["GET"], others.slots, None, tag)


def _native(native: NativeEndpoints) -> Iterator[Route]:
    yield Route("/generate", ["POST", "PUT"], native.generate, None, "SGLang")
    yield Route("/tokenize", ["POST"], native.tokenize, Tokens, "SGLang")
    yield Route("/detokenize", ["POST"], native.detokenize, Text, "SGLang")
    yield Route("/health", ["GET"], native.health, None, "control")
    yield Route("/health_generate", ["GET"], native.health_generate, None, "control")
    yield Route("/model_info", ["GET"], native.model_info, None, "control")
    yield Route("/server_info", ["GET"], native.server_info, None, "control")
    yield Route("/flush_cache", ["GET", "POST"], native.flush_cache, Confirmation, "control")
    yield Route("/abort_request", ["POST"], native.abort_request, Confirmation, "control")
    yield Route("/version", ["GET"], native.version, Version, "control")
    yield Route("/metrics", ["GET"], native.metrics, None, "control")


def _loads(loads: LoadEndpoints) -> Iterator[Route]:
    yield Route("/v1/loads", ["GET"], loads.loads, None, "control")
    yield Route("/get_load", ["GET"], loads.get_load, None, "control")
    yield Route("/load", ["GET"], loads.server_load, None, "control")
    yield Route("/kv_event_sources", ["GET"], loads.kv_event_sources, None, "control")


def _pooled(serving: Serving) -> Iterator[Route]:
    rerank = RerankEndpoint(serving)
    yield Route("/v1/rerank", ["POST"], rerank.create, Ranking, "Cohere")
    yield Route("/v2/rerank", ["POST"], rerank.create_v2, Ranking, "Cohere")
    yield Route("/v1/score", ["POST"], ScoreEndpoint(serving).create, ScoreList, "vLLM")
    yield Route("/classify", ["POST"], ClassifyEndpoint(serving).create, ClassificationList, "vLLM")
    yield Route("/pooling", ["POST"], PoolingEndpoint(serving).create, PooledList, "vLLM")
    yield Route("/encode", ["POST"], EncodeEndpoint(serving).create, None, "SGLang")
    rtp = RtpEndpoints(serving)
    yield Route("/v1/embeddings/sparse", ["POST"], rtp.sparse, VectorList, "RTP-LLM")
    yield Route("/v1/embeddings/colbert", ["POST"], rtp.colbert, VectorList, "RTP-LLM")
    yield Route("/v1/embeddings/similarity", ["POST"], rtp.similarity, Similarities, "RTP-LLM")


def _add_hidden(app: FastAPI, path: str, methods: Sequence[str], handler: Handler) -> None:
    """Add a path that the document does not name."""
    app.add_api_route(path, handler, methods=list(methods), response_model=None, include_in_schema=False)


def _responses(route: Route) -> dict[int | str, dict[str, Any]]:
    responses: dict[int | str, dict[str, Any]] = {} if route.answer is None else {200: {"model": route.answer}}
    if route.path in ANTHROPIC:
        responses |= {status: {"model": MessagesErrorBody} for status in (*ERROR_STATUSES, OVERLOADED)}
    if route.path.startswith(OLLAMA):
        responses |= {status: {"model": OllamaErrorBody} for status in ERROR_STATUSES}
    return responses
