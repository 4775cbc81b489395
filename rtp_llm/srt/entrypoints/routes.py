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
from rtp_llm.srt.entrypoints.ollama.serving_models import ModelEndpoints
from rtp_llm.srt.entrypoints.openai.protocol import ChatCompletion, InputTokens, Model, ModelList, TextCompletion
from rtp_llm.srt.entrypoints.openai.responses.protocol import DeletedResponse, ItemList, ResponseObject
from rtp_llm.srt.entrypoints.openai.responses.serving import ResponsesEndpoint
from rtp_llm.srt.entrypoints.openai.serving_chat import ChatEndpoint
from rtp_llm.srt.entrypoints.openai.serving_completions import CompletionEndpoint
from rtp_llm.srt.entrypoints.openai.serving_embeddings import EmbeddingList, EmbeddingsEndpoint
from rtp_llm.srt.entrypoints.serving import Serving

Handler = Callable[..., Coroutine[Any, Any, Response]]

# Further paths of an endpoint, for clients of other servers.
ALIASES = {
    "/v1/chat/completions": ("/chat/completions",),
    "/v1/chat/completions/input_tokens": ("/chat/completions/input_tokens",),
    "/v1/completions": ("/completions",),
    "/v1/embeddings": ("/embeddings",),
    "/v1/responses": ("/responses",),
    "/v1/responses/input_tokens": ("/responses/input_tokens",),
    "/v1/models": ("/models",),
    "/tokenize": ("/v1/tokenize",),
    "/detokenize": ("/v1/detokenize",),
    "/health": ("/v1/health", "/ready", "/ping"),
    "/model_info": ("/get_model_info",),
    "/server_info": ("/get_server_info",),
}
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


def dialect_lines(app: FastAPI) -> list[str]:
    """Return a line for each dialect with its paths, for the summary at the start."""
    paths: dict[str, dict[str, None]] = {tag: {} for tag in SPOKEN}
    for route in app.routes:
        if isinstance(route, APIRoute) and route.include_in_schema and "{" not in route.path:
            paths.get(str(route.tags[0]), {})[route.path] = None
    heads = ["  speaks    ", *["            "] * len(paths)]
    return [f"{head}{tag}: {' '.join(found)}" for head, (tag, found) in zip(heads, paths.items(), strict=False)]


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
    for name in ("embed", "embeddings"):
        yield f"/api/{name}", ["POST"], models.refuse_embeddings


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
