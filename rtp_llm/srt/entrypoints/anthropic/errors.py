"""Errors in Anthropic's form: ``{"type": "error", "error": {"type", "message", "details": {"error_code"}}}``."""

from typing import Literal, NotRequired, Self

from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.errors import MAX_MESSAGE_CHARS, OVERLOADED, ApiError

# By status. Others are invalid requests below 500, and ``api_error`` from there on.
ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}


class ErrorCode(TypedDict):
    error_code: str


class MessagesErrorDetail(TypedDict):
    """``details`` is there if the error has a code."""

    type: str
    message: str
    details: NotRequired[ErrorCode]


class MessagesErrorBody(TypedDict):
    type: Literal["error"]
    error: MessagesErrorDetail


class MessagesError(ApiError):
    """An ApiError for clients of /v1/messages. What is a 503 elsewhere has the status 529 here."""

    @classmethod
    def of(cls, error: ApiError) -> Self:
        status = OVERLOADED if error.status == 503 else error.status
        return cls(status, error.message, error.param, error.code)

    @property
    def type(self) -> str:
        return ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")

    @property
    def body(self) -> MessagesErrorBody:
        error: MessagesErrorDetail = {"type": self.type, "message": self.message[:MAX_MESSAGE_CHARS]}
        if self.code is not None:
            error["details"] = {"error_code": self.code}
        return {"type": "error", "error": error}
