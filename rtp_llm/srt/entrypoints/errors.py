"""Errors in the form that most clients get: ``{"error": {"message", "type", "param", "code"}}``."""

import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.responses import Response
from typing_extensions import TypedDict

from rtp_llm.srt.managers.engine_client import EngineStopped
from rtp_llm.srt.sampling_params import ContextLengthExceeded, InvalidRequest

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 5
OVERLOADED = 529  # not in HTTP: what some clients know in place of 503
MAX_MESSAGE_CHARS = 2000
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    503: "overloaded_error",
}


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: ErrorDetail


class ApiError(HTTPException):
    """An answer other than success. ``code`` is for programs; ``param`` names the wrong field, if it is one.

    An HTTPException, since FastAPI hides every other exception raised while a body is read.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> Mapping[str, Any]:
        message = self.message[:MAX_MESSAGE_CHARS]
        return ErrorBody(error={"message": message, "type": self.type, "param": self.param, "code": self.code})

    @property
    def type(self) -> str:
        fallback = "invalid_request_error" if self.status < 500 else "internal_server_error"
        return TYPES.get(self.status, fallback)

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        extra = dict(headers or {})
        if self.status in (503, OVERLOADED):
            extra["Retry-After"] = str(RETRY_AFTER_S)
        if self.status == 401:
            extra["WWW-Authenticate"] = "Bearer"
        content = json.dumps(self.body)  # in ASCII: quotes from a request may be invalid Unicode
        return Response(content, self.status, media_type="application/json", headers=extra)


def invalid(error: InvalidRequest, names: Mapping[str, str] | None = None) -> ApiError:
    """Return a 400. ``names``: engine's field names -> the request's, where they differ."""
    message, param = str(error), error.param
    for ours, theirs in (names or {}).items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
        param = theirs if param == ours else param
    return ApiError(
        400, message, param, "context_length_exceeded" if isinstance(error, ContextLengthExceeded) else None
    )


def unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, code=code)


def stopped(error: EngineStopped) -> ApiError:
    return ApiError(500, str(error), code="engine_failed")


def of_validation(error: RequestValidationError) -> ApiError:
    """Return a 400 for the first wrong field of a request."""
    problems: Sequence[Any] = error.errors()
    first = min(problems, key=lambda problem: (problem["type"] != "extra_forbidden", problem["loc"]))
    place = _place(first)
    path = ".".join(map(str, place))
    param = str(place[0]) if place else None
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequest):  # from a validator of ours, which names the field
        return invalid(cause)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {path!r}: this server does not know it", param, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{path or 'the request body'} is missing", param)
    message = _expected([problem["msg"] for problem in problems if _place(problem) == place]) or first["msg"]
    message = message.removeprefix("Value error, ")
    given = "" if "input" not in first or first["type"] == "value_error" else f", not {_show(first['input'])}"
    return ApiError(400, f"{path or 'the request'}: {message}{given}" if place else message + given, param)


_KINDS = ("str", "int", "float", "bool", "dict", "list")


def _place(problem: Mapping[str, Any]) -> list[str | int]:
    """Return the path in the body, without the names of a union's types, such as ``list[str]``."""
    inner = [part for part in problem["loc"][1:] if not (isinstance(part, str) and "[" in part)]
    return inner[:-1] if len(inner) > 1 and inner[-1] in _KINDS else inner


def _expected(messages: Sequence[str]) -> str | None:
    """Return the types that a field may have, if its type is what is wrong."""
    beginning = "Input should be a valid "
    kinds = dict.fromkeys(message.removeprefix(beginning) for message in messages if message.startswith(beginning))
    return beginning + " or ".join(kinds) if len(kinds) > 1 else None


def _show(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


@dataclass(slots=True)
class Failure:
    error: ApiError | None = None

    @property
    def body(self) -> Mapping[str, Any] | None:
        return None if self.error is None else self.error.body


@asynccontextmanager
async def error_event() -> AsyncIterator[Failure]:
    """Keep an error for a stream's last event, since its status has been sent."""
    failure = Failure()
    try:
        yield failure
    except ApiError as error:
        failure.error = error
    except EngineStopped as error:
        failure.error = stopped(error)
    except Exception:
        logger.exception("a stream broke off")
        failure.error = internal()


def internal() -> ApiError:
    return ApiError(500, "internal error; the server's log says more", code="internal_error")


def add_handlers(app: FastAPI, spoken: Callable[[ApiError, str], ApiError]) -> None:
    """Make an application answer every error in the form that clients of a path know.

    Args:
        spoken: from an error and the request's path to the error in this form.
    """

    def answer(request: Request, error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
        return spoken(error, request.url.path).response(headers)

    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return answer(request, error)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, InvalidRequest)
        return answer(request, invalid(error))

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(request, of_validation(error))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, AnyHTTPException)
        message = error.detail
        if error.status_code == 404:
            message = f"there is no {request.url.path!a} here; GET /openapi.json lists what there is"
        elif error.status_code == 405:
            message = f"{request.method} does not work on {request.url.path!a}"
        ours = ApiError(error.status_code, str(message), code=_http_code(error.status_code))
        return answer(request, ours, error.headers)

    async def on_stopped(request: Request, error: Exception) -> Response:
        assert isinstance(error, EngineStopped)
        return answer(request, stopped(error))

    async def on_bug(request: Request, error: Exception) -> Response:
        """Answer 500 without the traceback, which uvicorn logs."""
        return answer(request, internal())

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(InvalidRequest, on_invalid)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(AnyHTTPException, on_http)
    app.add_exception_handler(EngineStopped, on_stopped)
    app.add_exception_handler(Exception, on_bug)


def _http_code(status: int) -> str:
    return HTTPStatus(status).phrase.lower().replace(" ", "_")
