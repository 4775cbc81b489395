"""What all answers at a path have in common beside their bodies, by the dialect that the path speaks."""

from rtp_llm.srt.entrypoints.anthropic.errors import MessagesError
from rtp_llm.srt.entrypoints.errors import ApiError
from rtp_llm.srt.entrypoints.ollama.errors import OllamaError

MESSAGES, COUNT_TOKENS = "/v1/messages", "/v1/messages/count_tokens"
ANTHROPIC = frozenset({MESSAGES, COUNT_TOKENS})
SPOKEN = ("OpenAI", "Anthropic", "Ollama", "llama.cpp", "SGLang")  # whose APIs there are
OLLAMA = "/api/"  # what its paths begin with
REQUEST_ID = b"x-request-id"


def apis() -> str:
    """Return whose APIs there are, for people."""
    return f"{', '.join(SPOKEN[:-1])} and {SPOKEN[-1]}"


def spoken(error: ApiError, path: str) -> ApiError:
    """Return the error in the form that clients of this path know."""
    if path.startswith(OLLAMA):
        return OllamaError.of(error)
    return MessagesError.of(error) if path in ANTHROPIC else error


def takes_any_type(path: str) -> bool:
    """Return whether a body is read as JSON whatever its ``Content-Type``: commands in Ollama's documentation, and many
    scripts, send none. ``Access`` refuses such bodies of other sites' pages."""
    return path.startswith(OLLAMA)


def request_id_headers(path: str) -> tuple[bytes, ...]:
    """Return the names of the headers that tell an answer's request id."""
    return (REQUEST_ID, b"request-id") if path in ANTHROPIC else (REQUEST_ID,)
