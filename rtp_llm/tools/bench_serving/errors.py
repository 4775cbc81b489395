"""What is wrong with a server's answer."""

import json
from typing import Any


class RequestFailed(Exception):
    """A request got no complete answer; the message says why."""


class BrokenResponse(RequestFailed):
    """The answer is not valid HTTP, or not a valid event stream."""


def error_message(value: Any) -> str:
    """Return the message of an error object, in OpenAI's form or another."""
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            return error_message(value[key])
    return value if isinstance(value, str) else json.dumps(value)
