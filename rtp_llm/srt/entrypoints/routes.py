"""Which path leads to which endpoint, and by which other names."""

import re
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from rtp_llm.srt.entrypoints.anthropic.errors import MessagesErrorBody
from rtp_llm.srt.entrypoints.anthropic.protocol import AnswerMessage, TokensCount
from rtp_llm.srt.entrypoints.anthropic.serving_messages import MessagesEndpoint
from rtp_llm.srt.entrypoints.dialects import ANTHROPIC, COUNT_TOKENS, MESSAGES
from rtp_llm.srt.entrypoints.docs_page import docs_page
from rtp_llm.srt.entrypoints.errors import OVERLOADED
from rtp_llm.srt.entrypoints.llama_cpp.protocol import AppliedTemplate, LlamaCompletion, Properties
from rtp_llm.srt.entrypoints.llama_cpp.serving import LlamaCppEndpoints
from rtp_llm.srt.entrypoints.llama_cpp.serving_completions import LlamaCompletions
from rtp_llm.srt.entrypoints.llama_cpp.slots import Slots
from rtp_llm.srt.entrypoints.native import Confirmation, NativeEndpoints, Text, Tokens, Version
from rtp_llm.srt.entrypoints.openai.protocol import ChatCompletion, InputTokens, Model, ModelList, TextCompletion
from rtp_llm.srt.entrypoints.openai.responses.protocol import DeletedResponse, ItemList, ResponseObject
from rtp_llm.srt.entrypoints.openai.responses.serving import ResponsesEndpoint
from rtp_llm.srt.entrypoints.openai.serving_chat import ChatEndpoint
from rtp_llm.srt.entrypoints.openai.serving_completions import CompletionEndpoint
from rtp_llm.srt.entrypoints.serving import Serving

# Further paths of an endpoint, for clients of other servers.
ALIASES = {
    "/v1/chat/completions": ("/chat/completions",),
    "/v1/chat/completions/input_tokens": ("/chat/completions/input_tokens",),
    "/v1/completions": ("/completions",),
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


def add_routes(app: FastAPI, serving: Serving, registry: CollectorRegistry, slots: Slots) -> None:
    """Give an application all endpoints.

    Args:
        registry: what /metrics shows.
        slots: observes the requests of ``serving``, for /slots.
    """
    native = NativeEndpoints(serving, registry)
    messages = MessagesEndpoint(serving)
    kept = ResponsesEndpoint(serving)
    chat = ChatEndpoint(serving)
    completions = LlamaCompletions(serving)
    llama_cpp = LlamaCppEndpoints(serving, chat, slots)
    app.add_route("/docs", lambda _: docs_page(app.openapi()), include_in_schema=False)
    for path, methods, handler, answer, tag in (
        ("/v1/chat/completions", ["POST"], chat.create, ChatCompletion, "OpenAI"),
        ("/v1/completions", ["POST"], CompletionEndpoint(serving).create, TextCompletion, "OpenAI"),
        ("/v1/responses", ["POST"], kept.create, ResponseObject, "OpenAI"),
        ("/v1/responses/{response_id}", ["GET"], kept.retrieve, ResponseObject, "OpenAI"),
        ("/v1/responses/{response_id}", ["DELETE"], kept.delete, DeletedResponse, "OpenAI"),
        ("/v1/responses/{response_id}/cancel", ["POST"], kept.cancel, ResponseObject, "OpenAI"),
        ("/v1/responses/{response_id}/input_items", ["GET"], kept.input_items, ItemList, "OpenAI"),
        ("/v1/responses/input_tokens", ["POST"], kept.count_tokens, InputTokens, "OpenAI"),
        ("/v1/models", ["GET"], native.models, ModelList, "OpenAI"),
        ("/v1/models/{model:path}", ["GET"], native.model, Model, "OpenAI"),
        (MESSAGES, ["POST"], messages.create, AnswerMessage, "Anthropic"),
        (COUNT_TOKENS, ["POST"], messages.count_tokens, TokensCount, "Anthropic"),
        ("/completion", ["POST"], completions.complete, LlamaCompletion, "llama.cpp"),
        ("/infill", ["POST"], completions.infill, LlamaCompletion, "llama.cpp"),
        ("/apply-template", ["POST"], llama_cpp.apply_template, AppliedTemplate, "llama.cpp"),
        ("/v1/chat/completions/input_tokens", ["POST"], llama_cpp.count_chat, InputTokens, "llama.cpp"),
        ("/props", ["GET"], llama_cpp.props, Properties, "llama.cpp"),
        ("/slots", ["GET"], llama_cpp.slots, None, "llama.cpp"),
        ("/generate", ["POST", "PUT"], native.generate, None, "native"),
        ("/tokenize", ["POST"], native.tokenize, Tokens, "native"),
        ("/detokenize", ["POST"], native.detokenize, Text, "native"),
        ("/health", ["GET"], native.health, None, "control"),
        ("/health_generate", ["GET"], native.health_generate, None, "control"),
        ("/model_info", ["GET"], native.model_info, None, "control"),
        ("/server_info", ["GET"], native.server_info, None, "control"),
        ("/flush_cache", ["GET", "POST"], native.flush_cache, Confirmation, "control"),
        ("/abort_request", ["POST"], native.abort_request, Confirmation, "control"),
        ("/version", ["GET"], native.version, Version, "control"),
        ("/metrics", ["GET"], native.metrics, None, "control"),
    ):
        for alias in ALIASES.get(path, ()):
            app.add_api_route(alias, handler, methods=methods, response_model=None, include_in_schema=False)
        responses: dict[int | str, dict[str, Any]] = {} if answer is None else {200: {"model": answer}}
        if path in ANTHROPIC:
            responses |= {status: {"model": MessagesErrorBody} for status in (*ERROR_STATUSES, OVERLOADED)}
        for method in methods:
            app.add_api_route(
                path,
                handler,
                methods=[method],
                response_model=None,
                responses=responses,
                operation_id=re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_"),
                tags=[tag],
            )
