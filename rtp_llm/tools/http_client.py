"""A small client of OpenAI-compatible servers on the standard library: JSON answers, or streams of JSON."""

import json
from collections.abc import Generator
from contextlib import closing
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

TIMEOUT_S = 600  # of silence: a long prompt may take long before the first token
MAX_ERROR_CHARS = 500


class ServerError(Exception):
    """A server that cannot be reached, refuses (then with its HTTP ``status``), or breaks the protocol."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def api_url(url: str) -> str:
    """Return ``http://host:port/v1``, given with or without ``/v1``."""
    if not url.startswith(("http://", "https://")):
        raise ServerError(f"the URL of a server must begin with http:// or https://, not {url!r}")
    url = url.rstrip("/")
    return url if url.endswith("/v1") else url + "/v1"


def served_models(url: str, api_key: str | None = None) -> list[dict[str, Any]]:
    """Return the models of ``/v1/models``, each with at least ``id``; ``url`` as from ``api_url``."""
    answer = get_json(f"{url}/models", api_key)
    models = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(models, list) or not all(isinstance(model, dict) and "id" in model for model in models):
        raise ServerError(
            f"{url}/models does not answer as an OpenAI-compatible server does: there is no list of models"
        )
    return models


def get_json(url: str, api_key: str | None = None) -> Any:
    with closing(_open(url, None, api_key)) as response:
        return _parsed(_read(response), url)


def stream_json(url: str, body: dict[str, Any], api_key: str | None = None) -> Generator[dict[str, Any], None, None]:
    """Post ``body``; yield the server-sent objects up to ``[DONE]``. Closing it disconnects.

    Raises:
        ServerError: also if an object is an error, or the stream ends early.
    """
    with closing(_open(url, body, api_key)) as response:
        while line := _read(response, lines=True):
            if not line.startswith(b"data:"):
                continue  # comments, blank lines, names of events
            content = line[len(b"data:") :].strip()
            if content == b"[DONE]":
                return
            event = _parsed(content, url)
            if not isinstance(event, dict):
                raise ServerError(f"{url} sent something that is no object: {content[:80]!r}")
            if event.get("error"):
                raise ServerError(_message(event))
            yield event
    raise ServerError(f"{url} broke off in the middle of the answer")


def _open(url: str, body: dict[str, Any] | None, api_key: str | None) -> Any:
    headers = {"Accept": "application/json, text/event-stream"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        return urlopen(Request(url, data, headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        with closing(error):
            raise ServerError(_refusal(url, error.code, error.read()), error.code) from None
    except URLError as error:
        raise ServerError(f"cannot reach {url}: {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise ServerError(f"cannot talk to {url}: {error or type(error).__name__}") from error


def _read(response: Any, lines: bool = False) -> bytes:
    try:
        return response.readline() if lines else response.read()
    except TimeoutError:
        raise ServerError(f"the server has been silent for {TIMEOUT_S} s") from None
    except (OSError, HTTPException) as error:
        raise ServerError(f"the connection broke: {error or type(error).__name__}") from error


def _parsed(content: bytes, url: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ServerError(f"{url} sent something that is no JSON: {content[:80]!r}") from error


def _refusal(url: str, status: int, content: bytes) -> str:
    try:
        return f"{_message(json.loads(content))} (status {status})"
    except ValueError:
        said = " ".join(content.decode(errors="replace").split())[:MAX_ERROR_CHARS]
        return f"{url} answers with status {status}{': ' + said if said else ''}"


def _message(answer: Any) -> str:
    """Return the message of an OpenAI-style error, and its code, by which too long a prompt is recognised."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if not isinstance(error, dict) or not error.get("message"):
        return str(error)[:MAX_ERROR_CHARS]
    code = error.get("code")
    return str(error["message"]) + (f" [{code}]" if isinstance(code, str) else "")
