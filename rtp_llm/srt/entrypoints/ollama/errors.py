"""Errors in Ollama's form: ``{"error": MESSAGE}``."""

from typing import Self

from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.errors import MAX_MESSAGE_CHARS, ApiError


class OllamaErrorBody(TypedDict):
    error: str


class OllamaError(ApiError):
    """An ApiError for clients of Ollama's API."""

    @classmethod
    def of(cls, error: ApiError) -> Self:
        return cls(error.status, error.message, error.param, error.code)

    @property
    def body(self) -> OllamaErrorBody:
        return {"error": self.message[:MAX_MESSAGE_CHARS]}
